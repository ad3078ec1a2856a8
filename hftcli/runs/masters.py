"""The float32 masters that a round leaves beside its checkpoint, and what rounding them to its file took."""

from typing import Literal

from pydantic import Field

from hftcli.recipe.section import Section
from hftcli.runs.seals import FileSeal

MastersState = Literal["none", "taken", "missing", "converted"]

STATES: dict[MastersState, str] = {
    "none": "begins from the weights of its files",
    "taken": "begins from the float32 masters beside its checkpoint",
    "missing": "its float32 masters are not beside it: begins from its files, which hold them rounded",
    "converted": "model.dtype converts its files: begins from these, and not from the float32 masters beside them",
}


class MastersReport(Section):
    """The float32 masters of a round: where it took them up, what it left, and what its file holds of them."""

    start: MastersState
    """What the round began from: `none`, the start has no masters beside it, and its files are all that there is; `taken`,
    those that lie beside it; `missing`, it had some when it was written, and they are not there; `converted`, `model.dtype`
    asks for another data type than its files have, so that these count."""
    seal: FileSeal | None
    """Size and hash of the round's own masters.safetensors; null where the checkpoint stores in float32 all that trained."""
    num_tensors: int
    """Parameters in it: what trained in this round or an earlier one, and is stored in fewer bits."""
    update_norm: float
    """Euclidean norm of the round's update: of the masters of all that trained, less what the start's files hold."""
    dropped_norm: float
    """Euclidean norm of what rounding dropped of it: of the masters, less what the checkpoint's files hold."""
    dropped: dict[str, float] = Field(default_factory=dict)
    """The share of its update's norm that rounding dropped, in [0, 1], by parameter; where nothing was, it is left out."""

    @property
    def dropped_fraction(self) -> float:
        """The share of the whole update's norm that rounding dropped, in [0, 1]."""
        return self.dropped_norm / self.update_norm if self.update_norm else 0.0
