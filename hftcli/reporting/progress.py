"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hftcli.reporting.outlook import describe_outlook
from hftcli.runs.run import Round
from hftcli.runs.spec import Progress as Place

BEFORE = ("starting", "tokenizing")  # it is known what the round is going to do
PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


@contextmanager
def show_progress() -> Iterator[Callable[[Round, Place], None]]:
    """The progress of rounds."""
    told: set[str] = set()
    with _show_bar() as show:

        def show_round(round_: Round, place: Place) -> None:
            outlook = round_.read_outlook() if place.phase not in BEFORE and round_.name not in told else None
            if outlook is not None:
                told.add(round_.name)
                for line in describe_outlook(outlook, round_.read_spec()):
                    print(line, file=sys.stderr, flush=True)
            show(place.phase, _describe_place(round_, place), place.done, place.total)

        yield show_round


@contextmanager
def show_counts() -> Iterator[Callable[[str, int, int], None]]:
    """The progress of what has a name and a count."""
    with _show_bar() as show:
        yield lambda name, done, total: show(name, name, done, total)


@contextmanager
def _show_bar() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar on a terminal, a plain line now and then elsewhere; always on stderr.

    What it gives is called with the phase, its description, what is done, and all that there is.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(phase: str, description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total or None)

        yield show


class _PlainProgress:
    def __init__(self) -> None:
        self.phase, self.shown = "", 0.0

    def __call__(self, phase: str, description: str, done: int, total: int) -> None:
        is_last = total > 0 and done == total
        if phase == self.phase and not is_last and time.monotonic() - self.shown < PLAIN_SECONDS:
            return
        self.phase, self.shown = phase, time.monotonic()
        count = f" {done}/{total}" if total else ""
        print(f"{description}{count}", file=sys.stderr, flush=True)


def _describe_place(round_: Round, place: Place) -> str:
    loss = f", loss {place.loss:.3f}" if place.loss is not None else ""
    return f"{round_.name}: {place.phase}{loss}"
