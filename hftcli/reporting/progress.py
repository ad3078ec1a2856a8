"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hftcli.reporting.lines import fold, open_console
from hftcli.reporting.outlook import describe_outlook
from hftcli.runs.run import Round, Run
from hftcli.runs.spec import Progress as Place

BEFORE = ("starting", "tokenizing")  # it is known what the round is going to do
PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


@contextmanager
def show_progress() -> Iterator[Callable[[Round, Place], None]]:
    """The progress of rounds."""
    told: set[str] = set()
    clock = RunClock()
    with _show_bar() as show:

        def show_round(round_: Round, place: Place) -> None:
            outlook = round_.read_outlook() if place.phase not in BEFORE and round_.name not in told else None
            if outlook is not None:
                told.add(round_.name)
                for line in describe_outlook(outlook, round_.read_spec()):
                    print(fold(line, sys.stderr), file=sys.stderr, flush=True)
            clock.see(round_.name, place, time.monotonic())
            name = clock.name_round(round_)
            show(place.phase, _describe_place(name, place), place.done, place.total, clock.describe_left(time.monotonic()))

        yield show_round


@contextmanager
def show_counts() -> Iterator[Callable[[str, int, int], None]]:
    """The progress of what has a name and a count."""
    with _show_bar() as show:
        yield lambda name, done, total: show(name, name, done, total)


@contextmanager
def _show_bar() -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a plain line now and then elsewhere; always on stderr.

    What it gives is called with the phase, its description, what is done, all that there is, and in words how long it takes.
    """
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress()
        return
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("starting", total=None, left="")

        def show(phase: str, description: str, done: int, total: int, left: str = "") -> None:
            bar.update(task, description=description, completed=done, total=total or None, left=left)

        yield show


class _PlainProgress:
    def __init__(self) -> None:
        self.phase, self.shown = "", 0.0

    def __call__(self, phase: str, description: str, done: int, total: int, left: str = "") -> None:
        is_last = total > 0 and done == total
        if phase == self.phase and not is_last and time.monotonic() - self.shown < PLAIN_SECONDS:
            return
        self.phase, self.shown = phase, time.monotonic()
        count = f" {done}/{total}" if total else ""
        print(f"{description}{count}{', ' if left else ''}{left}", file=sys.stderr, flush=True)


def _describe_place(name: str, place: Place) -> str:
    loss = f", loss {place.loss:.3f}" if place.loss is not None else ""
    return f"{name}: {place.phase}{loss}"


class RunClock:
    """How long a run still takes, by what its rounds have taken so far.

    A round is taken to need for its scoring afterwards what it needed before, and another round what the last one did.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.names: list[str] = []  # of the run's rounds
        self.round = ""
        self.started = self.training_started = 0.0
        self.first_done: int | None = None  # steps of the round at work that were done when its training was first seen
        self.step_s: float | None = None  # of one of its steps, by those that were done since
        self.total = 0  # of its steps
        self.taken_s: list[float] = []  # by the rounds that were seen from start to end

    def name_round(self, round_: Round) -> str:
        """The round's name, and which of how many it is where there are several."""
        if self.folder != round_.folder.parent:
            self.folder = round_.folder.parent
            self.names = [other.name for other in Run(self.folder.parent).rounds]
        place = self.names.index(round_.name) + 1 if round_.name in self.names else 1
        return f"task {place} of {len(self.names)}, {round_.name}" if len(self.names) > 1 else round_.name

    def see(self, name: str, place: Place, now: float) -> None:
        """Take note of where a round is."""
        if name != self.round:
            if self.round:
                self.taken_s.append(now - self.started)
            self.round, self.started, self.first_done, self.step_s = name, now, None, None
        if place.phase != "training":
            return
        if self.first_done is None:  # not 0 where it goes on from a step checkpoint
            self.training_started, self.first_done = now, place.done
        if place.done > self.first_done and place.total:
            self.step_s, self.total = (now - self.training_started) / (place.done - self.first_done), place.total

    def describe_left(self, now: float) -> str:
        """In words; empty while nothing is known."""
        later = len(self.names) - 1 - self.names.index(self.round) if self.round in self.names else 0
        if self.step_s is not None and self.first_done is not None:
            around = 2 * (self.training_started - self.started)
            own = around + self.step_s * (self.total - self.first_done)
            left = max(own - (now - self.started), 0.0) + later * (around + self.step_s * self.total)
        elif self.taken_s:
            left = max(self.taken_s[-1] - (now - self.started), 0.0) + later * self.taken_s[-1]
        else:
            return ""
        return f"about {format_duration(left)} left"


def format_duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(round(seconds / 5) * 5, 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
