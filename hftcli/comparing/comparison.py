"""Learning against forgetting: what runs of several settings and seeds show of the methods behind them.

A setting is what a run's recipe says besides its seeds; a method is what a setting says besides its learning rate. A run with
less forgetting may just have learned less, so methods are compared at equal learning, along their frontiers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from hftcli.comparing.points import FULL, RATE_KEY, SEED_KEYS, UNITS, By, Point, read_point
from hftcli.comparing.statistics import (
    EqualLearning,
    Estimate,
    Unit,
    compare_at_equal_learning,
    estimate_mean,
    find_frontier,
)
from hftcli.errors import InputError


@dataclass(frozen=True)
class Setting:
    """The runs that differ in their seeds only."""

    learning_rate: float
    points: tuple[Point, ...]

    @property
    def learning(self) -> Estimate:
        """Mean over the seeds of the gain on what was trained."""
        return estimate_mean([point.learning for point in self.points])

    @property
    def forgetting(self) -> Estimate:
        """Mean over the seeds of the loss of what was known."""
        return estimate_mean([point.forgetting for point in self.points])


@dataclass(frozen=True)
class Method:
    """The settings that differ in their learning rates only, in the order of these.

    Attributes:
        frontier: indices of the settings whose means no other one beats, in the order of learning.
    """

    name: str
    settings: tuple[Setting, ...]
    frontier: tuple[int, ...]

    @property
    def curves(self) -> dict[tuple[int, ...], list[tuple[float, float]]]:
        """By seed, learning and forgetting of its runs along the frontier."""
        curves: dict[tuple[int, ...], list[tuple[float, float]]] = {}
        for index in self.frontier:
            for point in self.settings[index].points:
                curves.setdefault(point.seed, []).append((point.learning, point.forgetting))
        return curves


@dataclass(frozen=True)
class Difference:
    """Two methods at equal learning; `found` is None where they have none in common."""

    first: str
    second: str
    found: EqualLearning | None
    by: By

    @property
    def sentence(self) -> str:
        """What the comparison shows in words, with its interval; a difference that is not shown is called none."""
        if self.found is None:
            return f"{self.first} and {self.second} never learned equally much: give more values of {RATE_KEY}"
        estimate, found, unit = self.found.difference, self.found, UNITS[self.by]
        between = f"between {unit.show(found.low)} and {unit.show(found.high)} {unit.name} of learning"
        if estimate.interval is None:
            return (
                f"at equal learning, {self._compare(estimate)}, {between}: one seed, so no interval and no difference is shown"
            )
        if not estimate.excludes_zero:
            interval = " to ".join(unit.show(value, signed=True) for value in estimate.interval)
            return (
                f"at equal learning, no difference was shown between {self.first} and {self.second}: {self.first} forgets "
                f"{unit.show(estimate.mean, signed=True)} {unit.name} (95 % interval {interval}), {between}"
            )
        interval = " to ".join(unit.show(value) for value in sorted(map(abs, estimate.interval)))
        return f"at equal learning, {self._compare(estimate)} (95 % interval {interval}), {between}"

    def _compare(self, estimate: Estimate) -> str:
        more = "less" if estimate.mean < 0 else "more"
        unit = UNITS[self.by]
        return f"{self.first} forgets {unit.show(abs(estimate.mean))} {unit.name} {more} than {self.second}"


@dataclass(frozen=True)
class Comparison:
    """Everything that `hft compare` shows.

    Attributes:
        learned: names of what was trained.
        known: names of what was known before.
        by: what gains and losses are of.
    """

    learned: tuple[str, ...]
    known: tuple[str, ...]
    methods: tuple[Method, ...]
    differences: tuple[Difference, ...]
    by: By

    @property
    def unit(self) -> Unit:
        """What gains and losses are shown in."""
        return UNITS[self.by]


def compare_runs(folders: Sequence[Path], learned: Sequence[str] = (), by: By = "score") -> Comparison:
    """Read finished runs and compare their methods.

    Args:
        learned: tasks that measure what was learned; empty takes the tasks whose rows were trained on, and held-out rows.
        by: `score`, each task's own; or `nll`, the likelihood of the right answers, which held-out rows have too.

    Raises:
        InputError: no such run, one that is not finished, or runs that cannot be compared.
    """
    if len(folders) < 2:
        raise InputError("one run is no comparison", "name two or more, or give --recipe with --vary and --seeds")
    points = [read_point(folder, learned, by) for folder in folders]
    _check_comparable(points)
    return Comparison(
        learned=tuple(points[0].learned),
        known=tuple(points[0].lost),
        methods=(methods := _group_points(points)),
        differences=tuple(
            Difference(second.name, first.name, compare_at_equal_learning(second.curves, first.curves), by)
            for first, second in combinations(methods, 2)
        ),
        by=by,
    )


def _check_comparable(points: Sequence[Point]) -> None:
    """Raises: InputError: a run has another start, data or tasks than the first; every difference is named."""
    first, faults = points[0], []
    for point in points[1:]:
        faults += [
            f"{point.name} has other {name} than {first.name}: {_show(point.alike[name])}; not {_show(first.alike[name])}"
            for name in first.alike
            if point.alike[name] != first.alike[name]
        ]
    seen: dict[str, str] = {}
    for point in points:
        key = repr(sorted(point.values.items()))
        if key in seen:
            faults.append(f"{point.name} and {seen[key]} have the same recipe and the same seeds: they are no two draws")
        seen[key] = point.name
    if faults:
        raise InputError("these runs cannot be compared\n" + "\n".join(faults), "compare runs that differ in how they trained")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({item})" for key, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _group_points(points: Sequence[Point]) -> tuple[Method, ...]:
    """Methods in the order in which they are met."""
    told = [key for key in dict.fromkeys(key for point in points for key in point.values) if key not in (*SEED_KEYS, RATE_KEY)]
    varying = [key for key in told if len({repr(point.values.get(key)) for point in points}) > 1]
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(repr(point.values.get(key)) for key in varying), []).append(point)
    # Full fine-tuning first: it is what the others are measured against.
    members = sorted(groups.values(), key=lambda group: group[0].title != FULL)
    names = _tell_apart([group[0] for group in members], varying)
    methods = []
    for name, group in zip(names, members, strict=True):
        rates = sorted({point.learning_rate for point in group})
        settings = tuple(Setting(rate, tuple(point for point in group if point.learning_rate == rate)) for rate in rates)
        means = [(setting.learning.mean, setting.forgetting.mean) for setting in settings]
        methods.append(Method(name, settings, tuple(find_frontier(means))))
    return tuple(methods)


def _tell_apart(points: Sequence[Point], varying: Sequence[str]) -> list[str]:
    """The titles; where two methods have the same, the settings in which they differ as well."""
    names = []
    for point in points:
        twins = [other for other in points if other.title == point.title]
        keys = [key for key in varying if len({repr(twin.values.get(key)) for twin in twins}) > 1]
        settings = ", ".join(f"{key}={point.values[key]}" for key in keys if key in point.values)
        names.append(f"{point.title} ({settings})" if settings else point.title)
    return names
