"""The signals that stop a run with exit code 75, wherever it is."""

import signal
from types import FrameType

from hftcli.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stop_at_signals() -> None:
    """From here on, a signal raises from wherever the main thread is.

    So works the front by itself, before its first round, between two and after the last: its files are written whole or not
    at all, and the same command writes again what is missing.
    """
    for number in SIGNALS:
        signal.signal(number, _stop)


def ignore_signals() -> None:
    """Take no more signals: this process is ending, and has its last word to write."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by a signal; what was finished before is kept", "run the same command again")
