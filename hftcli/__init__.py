"""Half Fine-Tuning: fine-tune half of a language model, freeze the other half, and see what it forgot."""

from pathlib import Path

TYPE_CHECKING = False  # type checkers take it for typing's, which a file of the user's may be called as, too
if TYPE_CHECKING:
    from hftcli.library import Half, HalfCallback, QuietLora, freeze_half, quiet_lora

__all__ = ("PACKAGE", "Half", "HalfCallback", "QuietLora", "__version__", "freeze_half", "quiet_lora")
__version__ = "0.1.0"
PACKAGE = Path(__file__).parent


def __getattr__(name: str) -> object:
    """What a script of one's own needs, which opens PyTorch only when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from hftcli import library

    return vars(library)[name]
