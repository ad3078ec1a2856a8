"""What `hft verify` finds of a round's checkpoint."""

from typing import Literal

from pydantic import Field

from hftcli.recipe.section import Section


class Verification(Section):
    """What a comparison of a round's checkpoint with its start found, tensor by tensor, byte by byte."""

    num_frozen: int
    """Frozen parameters compared."""
    num_trained: int
    """Trained parameters compared."""
    num_extras: int = 0
    """Tensors of the start's files that are no parameter's, such as stored masks: compared as well."""
    violations: tuple[str, ...]
    """Frozen parameters whose bytes or data types differ: must be none."""
    changed_extras: tuple[str, ...] = ()
    """Of the tensors that are no parameter's, those whose bytes or data types differ: must be none."""
    retyped: tuple[str, ...] = ()
    """Tensors whose stored data type is another than the start's, or than `converted_to`, and which: must be none."""
    lost: tuple[str, ...] = ()
    """Tensors of the start's files that the checkpoint's lack: must be none."""
    moved_in_memory: tuple[str, ...] = ()
    """Frozen parameters that the model did not hold any more as the start has them when training ended: must be none."""
    unmoved: tuple[str, ...]
    """Trained parameters whose bytes are the same: must be none."""
    rankless: tuple[str, ...] = ()
    """Of those that did not move, the ones whose adapter was left no rank, as AdaLoRA may leave it."""
    below_resolution: tuple[str, ...] = ()
    """Trained parameters that moved in float32 by less than the checkpoint's data type can hold."""
    damaged: tuple[str, ...] = ()
    """Files of the checkpoint that are not what the round wrote, and how: must be none."""
    damaged_parts: tuple[str, ...] = ()
    """The same of the round's files of the directions, columns or entries that trained: must be none."""
    closed_change: dict[str, float] = Field(default_factory=dict)
    """By matrix that trained in directions: what of its change lies in the closed ones, as a share of the change's length. The
    files' rounding alone makes it more than 0, and most of a change that is no larger than that."""
    closed_reading: dict[str, float] = Field(default_factory=dict)
    """By the A of a quiet adapter's file: what it reads of the closed directions, as a share of its length."""
    leaked: tuple[str, ...] = ()
    """Of all these, those where it is more than rounding makes of it, and by how much: must be none."""
    num_frozen_columns: int = 0
    """Frozen columns of matrices that trained in their other columns, compared."""
    moved_columns: tuple[str, ...] = ()
    """Of these matrices, those of which frozen columns have other bits, and how many: must be none."""
    num_frozen_entries: int = 0
    """Frozen entries of matrices that trained in their other entries, compared."""
    moved_entries: tuple[str, ...] = ()
    """Of these matrices, those of which frozen entries have other bits, and how many: must be none."""
    num_masters: int = 0
    """Float32 masters that were rounded anew, to be compared with the checkpoint; 0 where there are none, or no more."""
    unlike_masters: tuple[str, ...] = ()
    """Parameters that are not the rounding of their masters, and what is wrong with the file of these: must be none."""
    converted_to: Literal["float32", "bfloat16", "float16"] | None = None
    """`model.dtype`, where the start stores other data types: the comparison is with the start after that conversion, computed
    anew. Null where it is with the start's own bytes."""

    @property
    def start(self) -> str:
        """What frozen parameters are compared with, in words."""
        if self.converted_to is None:
            return "the start"
        return f"the start once it is converted to {self.converted_to} (model.dtype)"

    @property
    def faults(self) -> tuple[str, ...]:
        """All that must not be."""
        moved = (*self.violations, *self.changed_extras, *self.moved_in_memory, *self.leaked, *self.moved_columns)
        return (*moved, *self.moved_entries, *self.unmoved, *self.retyped, *self.lost, *self.damage, *self.unlike_masters)

    @property
    def damage(self) -> tuple[str, ...]:
        """All files that are not what the round wrote; where they do not read, nothing was compared."""
        return (*self.damaged, *self.damaged_parts)

    @property
    def passed(self) -> bool:
        """Whether nothing that must be empty holds a name."""
        return not self.faults
