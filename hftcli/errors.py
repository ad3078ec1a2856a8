"""The errors that users meet, and the exit code that each one means.

    HftError                 1   the work failed
    ├── InputError           2   what the user gave is wrong
    │   ├── RecipeError          a recipe or an override
    │   ├── DataError            a dataset or one of its rows
    │   └── ModelError           a model, a tokenizer or an unknown family
    ├── TrainingError        1   training failed; the message says what is safe on disk
    ├── VerificationError    3   something frozen moved, or something trained did not
    └── Interrupted         75   stopped by a signal after a complete checkpoint: run me again

A message says where, what was got and what is allowed; `fix` says what to do.
"""


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
    exit_code = 2


class RecipeError(InputError):
    pass


class DataError(InputError):
    pass


class ModelError(InputError):
    pass


class TrainingError(HftError):
    pass


class VerificationError(HftError):
    exit_code = 3


class Interrupted(HftError):
    exit_code = 75
