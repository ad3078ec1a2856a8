"""The errors that users meet, and the exit code that each one means.

    HftError                 1   the work failed
    ├── InputError           2   what the user gave is wrong
    │   ├── RecipeError          a recipe or an override
    │   ├── NewerFile            a file that a newer hft wrote
    │   ├── DataError            a dataset or one of its rows
    │   └── ModelError           a model, a tokenizer or an unknown family
    ├── TrainingError        1   training failed; the message says what is safe on disk
    │   └── OverBudget           no measured step lies within stop.max_forgetting
    ├── VerificationError    3   something frozen moved, or something trained did not
    └── Interrupted         75   stopped by a signal after a complete checkpoint: run me again

A message says where, what was got and what is allowed; `fix` says what to do.
"""

import errno

FULL_BYTES = 1 << 20  # a disk with less than this left is full: not even a worker's last word may fit
SAVE_MEMORY = (
    "lower train.per_device_train_batch_size (the global batch stays), set train.activation_checkpointing: true, lower "
    "data.max_length, or take more processes and a higher launch.zero_stage; `hft plan` shows what a device needs; a run so "
    "changed begins anew, with another --output"
)


class HftError(Exception):
    """Root of the tree.

    Args:
        message: where it happened, what was got, what is allowed. May have several lines.
        fix: what to do about it; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.message = message
        self.fix = fix


class InputError(HftError):
    """What the user gave is wrong, and nothing was begun."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe or an override of it is wrong; the message has every fault with its place."""


class NewerFile(InputError):
    """A newer hft wrote a file, in a form that this one does not know; the message names it."""


class DataError(InputError):
    """A dataset or one of its rows is wrong; the message names the file and the row."""


class ModelError(InputError):
    """A model, its tokenizer or its family does not serve."""


class TrainingError(HftError):
    """Training failed; the message says what is safe on disk."""


class OverBudget(TrainingError):
    """No measured step lies within `stop.max_forgetting`: there is nothing to keep."""


class VerificationError(HftError):
    """Something frozen moved, or something trained did not: the checkpoint is not what the plan says."""

    exit_code = 3


class Interrupted(HftError):
    """A signal stopped the work after a complete checkpoint: the same command goes on from there."""

    exit_code = 75


def explain_os_error(error: OSError) -> HftError | None:
    """What a full disk, or one that takes no writing, means to the user; None for any other error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return make_disk_full(error.filename)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return InputError(f"{error.filename}: {error.strerror}", "give another --output, or the right to write there")
    return None


def make_disk_full(place: object) -> HftError:
    """The error of a full disk; `place` is what could not be written."""
    return HftError(
        f"no space is left on the disk of {place}; finished rounds and complete step checkpoints are kept",
        "free some, then run the same command again",
    )
