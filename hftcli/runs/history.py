"""What made a checkpoint: the rounds of hft behind it, in a small file beside its weights.

The file goes where the checkpoint goes, be it copied, laid over its base or averaged with it, so that the next round knows
which one it is and draws another half.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hftcli.recipe.recipe import Objective
from hftcli.recipe.section import FileSection, Section, Version
from hftcli.runs.files import read_model
from hftcli.runs.run import Round, Run
from hftcli.runs.seals import FileSeal
from hftcli.runs.spec import RoundSpec

HISTORY_NAME = "hft.json"


class PastRound(Section):
    """A round behind a checkpoint."""

    index: int
    """Its place in the history of the model, from 0."""
    objective: Objective
    """What was optimized."""
    task: str | None
    """The task of a sequence that it learned; null where it learned rows."""
    fingerprint: str
    """The freeze plan's: which half trained."""
    parent: str
    """Where it started from: a folder or a hub id."""
    moments: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """SHA-256 of the file with the second moments of all earlier inputs, its own rows' among them; null where it kept none."""


class History(FileSection):
    """The rounds behind a checkpoint."""

    version: Version = 2
    """Version of the file's form. The first has no `masters`."""
    rounds: tuple[PastRound, ...] = ()
    """From the first to the one that wrote it."""
    masters: FileSeal | None = None
    """Size and hash of the float32 masters that the weights are the rounding of, in masters.safetensors beside the folder; null
    where there are none."""

    @property
    def num_rounds(self) -> int:
        """The index of the next round."""
        return self.rounds[-1].index + 1 if self.rounds else 0


def read_history(folder: Path) -> History:
    """That of a checkpoint; of one that no round of hft made, an empty one.

    Where an earlier hft wrote the checkpoint, with no history in it, the round's folder around it tells of that round.

    Raises:
        InputError: the file is damaged.
    """
    path, round_ = folder / HISTORY_NAME, Round(folder.parent)
    if path.exists():
        return read_model(path, History)
    if folder != round_.checkpoint or not round_.spec_path.exists():
        return History()
    return History(rounds=(describe_round(round_.read_spec(), round_.read_plan().fingerprint),))


def find_earlier(run: Run) -> tuple[PastRound, ...]:
    """The rounds of hft behind what a run began from; none where that is of the hub, or is gone."""
    path = Path(run.rounds[0].find_start())
    return read_history(path).rounds if path.is_dir() else ()


def describe_round(spec: RoundSpec, fingerprint: str, moments: str | None = None) -> PastRound:
    """A round as the checkpoints after it remember it."""
    return PastRound(
        index=spec.index, objective=spec.objective, task=spec.task, fingerprint=fingerprint, parent=spec.model.path,
        moments=moments,
    )  # fmt: skip


def extend_history(
    start: Path, spec: RoundSpec, fingerprint: str, masters: FileSeal | None = None, moments: str | None = None
) -> History:
    """The history of what a round writes.

    Args:
        start: folder of the checkpoint that it began from.
        fingerprint: of its freeze plan.
        masters: what it leaves beside its checkpoint.
        moments: hash of the moments of earlier inputs that it leaves.
    """
    return History(rounds=(*read_history(start).rounds, describe_round(spec, fingerprint, moments)), masters=masters)
