"""What was logged over the steps of rounds, as plots of the page: the loss and the learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hftcli.reporting.trails import find_ticks
from hftcli.runs.run import Round

# By the trainer's key in metrics.jsonl: what the plot is called, and what stands beside its axis.
CURVES = {"loss": ("Training loss", "loss"), "learning_rate": ("Learning rate", "learning rate")}
MAX_POINTS = 400
MAX_SPOTS = 50  # places of a plot that say their value when a pointer rests on them
MIN_LOG_RATIO = 20.0  # highest to lowest value, from where on the scale of a loss is logarithmic

Ticks = tuple[tuple[float, str], ...]  # places in per cent of the plot, and labels


@dataclass(frozen=True)
class Curve:
    """What a round logged, in per cent of the plot from its upper left corner.

    Attributes:
        spots: where each begins, how wide it is, and what it says.
        across: ticks of the steps.
    """

    name: str
    path: str
    num_steps: int
    first: str
    last: str
    spots: tuple[tuple[float, float, str], ...]
    across: Ticks


@dataclass(frozen=True)
class Curves:
    """The curves of all rounds on one scale; `ticks` are heights in per cent with their labels."""

    title: str
    label: str
    curves: tuple[Curve, ...]
    ticks: Ticks
    is_log: bool


def draw_curves(rounds: Sequence[Round], key: str) -> Curves | None:
    """None where no step was logged."""
    title, label = CURVES[key]
    read = {
        round_.name: [(row["step"], row[key]) for row in round_.read_metrics() if key in row]
        for round_ in rounds
        if round_.metrics_path.exists()
    }
    found = {name: [point for point in rows if math.isfinite(point[1])] for name, rows in read.items()}
    found = {name: _thin(rows) for name, rows in found.items() if rows}
    values = [value for rows in found.values() for _, value in rows]
    if not values:
        return None
    is_log = key == "loss" and min(values) > 0 and max(values) / min(values) > MIN_LOG_RATIO
    ticks = _find_decades(min(values), max(values)) if is_log else find_ticks(min(values), max(values))
    low, high = _scale(ticks[0], is_log), _scale(ticks[-1], is_log)

    def place(value: float) -> float:
        return 100 * (_scale(value, is_log) - low) / (high - low)

    curves = []
    for name, rows in found.items():
        width = max(rows[-1][0], 1)
        points = " ".join(f"{100 * step / width:.2f},{100 - place(value):.2f}" for step, value in rows)
        across = [tick for tick in find_ticks(0, width) if tick <= width]
        curves.append(
            Curve(
                name, f"M{points}", rows[-1][0], _show(rows[0][1]), _show(rows[-1][1]), _place_spots(rows, width),
                tuple((100 * tick / width, f"{tick:,g}") for tick in across),
            )
        )  # fmt: skip
    return Curves(title, label, tuple(curves), tuple((place(tick), f"{tick:g}") for tick in ticks), is_log)


def _show(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _place_spots(rows: Sequence[tuple[int, float]], width: int) -> tuple[tuple[float, float, str], ...]:
    every = math.ceil(len(rows) / MAX_SPOTS)
    shown = rows[::every]
    size = 100 / len(shown)
    return tuple((100 * step / width - size / 2, size, f"step {step:,}: {_show(value)}") for step, value in shown)


def _thin(rows: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means of neighbours where there are more points than pixels."""
    size = math.ceil(len(rows) / MAX_POINTS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def _scale(value: float, is_log: bool) -> float:
    return math.log10(value) if is_log else value


def _find_decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
