"""The way of a round from what it knew to what it learned: its own curve of learning against forgetting, for the page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hftcli.comparing.points import UNITS
from hftcli.runs.records import RoundResult
from hftcli.runs.run import Round
from hftcli.runs.scores import By, CurvePoint

Ticks = tuple[tuple[float, str], ...]  # places in per cent of the plot, and labels


@dataclass(frozen=True)
class Trail:
    """A curve in per cent of the plot, from its lower left corner; learning runs to the right, forgetting upwards.

    Attributes:
        rows: step, learning, forgetting, its interval, and whether the step was kept.
    """

    name: str
    unit: str
    path: str
    places: tuple[tuple[float, float], ...]
    across: Ticks
    upwards: Ticks
    rows: tuple[tuple[str, ...], ...]
    ending: str


def draw_trails(round_: Round, result: RoundResult) -> Iterator[Trail]:
    """A curve by score and one by likelihood, where both learning and forgetting were measured within the round so."""
    points = round_.read_scores().points
    kinds: tuple[By, ...] = ("score", "nll")
    for by in kinds:
        if points and all(by in point.learning and by in point.forgetting for point in points):
            yield _draw_trail(round_, result, points, by)


def _draw_trail(round_: Round, result: RoundResult, points: Sequence[CurvePoint], by: By) -> Trail:
    unit = UNITS[by]
    learned = [0.0, *(unit.factor * point.learning[by] for point in points)]
    lost = [0.0, *(unit.factor * point.forgetting[by].mean for point in points)]
    scales = [find_ticks(min(values), max(values)) for values in (learned, lost)]

    def place(value: float, ticks: Sequence[float]) -> float:
        return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])

    places = [(place(x, scales[0]), place(y, scales[1])) for x, y in zip(learned, lost, strict=True)]
    kept = result.kept_step or points[-1].step
    rows = []
    for point in points:
        loss = point.forgetting[by]
        interval = "" if loss.low is None else f"{unit.show(loss.low, signed=True)} to {unit.show(loss.high, signed=True)}"
        shown = unit.show(point.learning[by], signed=True), unit.show(loss.mean, signed=True)
        rows.append((f"{point.step:,}", *shown, interval, "kept" if point.step == kept else ""))
    across, upwards = (tuple((place(tick, ticks), f"{tick:g}") for tick in ticks) for ticks in scales)
    return Trail(
        name=round_.name,
        unit=unit.name,
        path="M" + " ".join(f"{x:.2f},{100 - y:.2f}" for x, y in places),
        places=tuple((x, y) for x, y in places),
        across=across,
        upwards=upwards,
        rows=tuple(rows),
        ending=f"ended after {result.num_steps:,} steps by stop.{result.stopped_by}" if result.stopped_by else "",
    )


def find_ticks(low: float, high: float) -> list[float]:
    """Round numbers around the values, 0 among them unless they are far from it."""
    low = min(low, 0.0) if low < high / 2 else low
    span = (high - low) or abs(high) or 1.0
    step = min(
        (base * 10.0**power for base in (1, 2, 5) for power in range(-12, 13)), key=lambda step: abs(span / step - 4)
    )  # fmt: skip
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]
