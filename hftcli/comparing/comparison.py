"""Learning against forgetting: what runs of several settings and seeds show of the methods behind them.

A setting is what a run's recipe says besides its seeds; a method is what a setting says besides its learning rate. A run with
less forgetting may just have learned less, so methods are compared at equal learning, along their curves (frontiers.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from hftcli.comparing.frontiers import EqualLearning, Trail, compare_at_equal_learning, correct_by_holm
from hftcli.comparing.points import FULL, RATE_KEY, SEED_KEYS, UNITS, Point, read_point
from hftcli.comparing.statistics import CONFIDENCE, Estimate, Seed, Unit, estimate_mean, find_frontier
from hftcli.errors import InputError
from hftcli.runs.scores import By


@dataclass(frozen=True)
class Setting:
    """The runs that differ in their seeds only.

    Attributes:
        label: what it is called beside the method's other settings.
    """

    label: str
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
    """The settings that differ in their learning rates only, in the order of these; or all that are tried to find the best.

    Attributes:
        frontier: indices of the settings whose means no other one beats, in the order of learning.
    """

    name: str
    settings: tuple[Setting, ...]
    frontier: tuple[int, ...]

    @property
    def is_measured(self) -> bool:
        """Whether all of its runs were measured within."""
        return all(point.trail for setting in self.settings for point in setting.points)

    def list_trails(self, is_within: bool) -> dict[Seed, list[Trail]]:
        """By seed, what was measured of each setting's run: within it, or at its end alone."""
        by_seed = [{point.seed: point for point in setting.points} for setting in self.settings]
        return {
            seed: [runs[seed].trail if is_within else ((runs[seed].learning, runs[seed].forgetting),) for runs in by_seed]
            for seed in by_seed[0]
        }


@dataclass(frozen=True)
class Difference:
    """Two methods at equal learning.

    Attributes:
        found: None where they have no learning in common.
        p_value: by Holm's correction over all pairs; None with one seed.
        num_pairs: how many pairs were compared.
    """

    first: str
    second: str
    found: EqualLearning | None
    p_value: float | None
    num_pairs: int
    by: By

    @property
    def is_shown(self) -> bool:
        """Whether the bands of the two are apart, and were so by more than chance makes likely among so many pairs."""
        return self.p_value is not None and self.p_value < 1 - CONFIDENCE

    @property
    def sentence(self) -> str:
        """What the comparison shows in words, with its interval; a difference that is not shown is called none."""
        if self.found is None:
            return f"{self.first} and {self.second} never learned equally much: give more values of {RATE_KEY}"
        found, unit = self.found, UNITS[self.by]
        between = f"between {unit.show(found.low)} and {unit.show(found.high)} {unit.name} of learning"
        if self.p_value is None or found.interval is None:
            return (
                f"at equal learning, {self._compare(found.difference.mean)}, {between}: one seed, so no interval and no "
                "difference is shown"
            )
        chance = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        chance += f", Holm's of {self.num_pairs} pairs" if self.num_pairs > 1 else ""
        if not self.is_shown:
            interval = " to ".join(unit.show(value, signed=True) for value in found.interval)
            return (
                f"at equal learning, no difference was shown between {self.first} and {self.second}: {self.first} forgets "
                f"{unit.show(found.difference.mean, signed=True)} {unit.name} (95 % interval {interval}; {chance}), {between}"
            )
        interval = " to ".join(unit.show(value) for value in sorted(map(abs, found.interval)))
        return f"at equal learning, {self._compare(found.difference.mean)} (95 % interval {interval}; {chance}), {between}"

    def _compare(self, mean: float) -> str:
        more = "less" if mean < 0 else "more"
        unit = UNITS[self.by]
        return f"{self.first} forgets {unit.show(abs(mean))} {unit.name} {more} than {self.second}"


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


def compare_runs(
    folders: Sequence[Path], learned: Sequence[str] = (), by: By = "score", merges_settings: bool = False
) -> Comparison:
    """Read finished runs and compare their methods.

    Args:
        learned: tasks that measure what was learned; empty takes the tasks whose rows were trained on, and held-out rows.
        by: `score`, each task's own; or `nll`, the likelihood of the right answers, which held-out rows have too.
        merges_settings: whether all that is set under `train` and `method` is a setting of one method, and not the learning
            rate alone.

    Raises:
        InputError: no such run, one that is not finished, or runs that cannot be compared.
    """
    if len(folders) < 2:
        raise InputError("one run is no comparison", "name two or more, or give --recipe with --vary and --seeds")
    points = [read_point(folder, learned, by) for folder in folders]
    _check_comparable(points)
    methods = _group_points(points, merges_settings)
    _check_seeds(methods)
    pairs = [(second, first) for first, second in combinations(methods, 2)]
    found = [_compare_methods(one, other) for one, other in pairs]
    p_values = correct_by_holm([one.p_value if one else None for one in found])
    num_pairs = sum(p_value is not None for p_value in p_values)
    return Comparison(
        learned=tuple(points[0].learned),
        known=tuple(points[0].lost),
        methods=methods,
        differences=tuple(
            Difference(one.name, other.name, difference, p_value, num_pairs, by)
            for (one, other), difference, p_value in zip(pairs, found, p_values, strict=True)
        ),
        by=by,
    )


def _compare_methods(one: Method, other: Method) -> EqualLearning | None:
    """Along what was measured within the runs, where that is there of both."""
    is_within = one.is_measured and other.is_measured
    return compare_at_equal_learning(one.list_trails(is_within), other.list_trails(is_within), is_within)


def _check_comparable(points: Sequence[Point]) -> None:
    """Raises: InputError: a run has another start, data or tasks than the first; every difference is named."""
    first, faults = points[0], []
    for point in points[1:]:
        faults += [
            f"{point.name} has other {name} than {first.name}: {_show(point.alike[name])}; not {_show(first.alike[name])}"
            for name in first.alike
            if point.alike[name] != first.alike[name]
        ]
        faults += [
            f"{point.name} asked {name} other questions than {first.name}, as many of them"
            for name in first.questions.keys() & point.questions.keys()
            if point.questions[name] != first.questions[name] and point.alike["tasks"] == first.alike["tasks"]
        ]
    if len(ways := {point.measuring for point in points if point.trail}) > 1:
        faults.append(f"they were not measured alike within the runs: {'; '.join(sorted(ways))}")
    seen: dict[str, str] = {}
    for point in points:
        key = repr(sorted(point.values.items()))
        if key in seen:
            faults.append(f"{point.name} and {seen[key]} have the same recipe and the same seeds: they are no two draws")
        seen[key] = point.name
    if faults:
        raise InputError("these runs cannot be compared\n" + "\n".join(faults), "compare runs that differ in how they trained")


def _check_seeds(methods: Sequence[Method]) -> None:
    """Raises: InputError: a setting of a method lacks a seed that another has, along whose curve nothing is known there."""
    faults = []
    for method in methods:
        by_setting = [{point.seed: point.name for point in setting.points} for setting in method.settings]
        shared = set(by_setting[0]).intersection(*by_setting)
        faults += [
            f"{method.name}, {setting.label}: {', '.join(odd)}"
            for setting, runs in zip(method.settings, by_setting, strict=True)
            if (odd := [name for seed, name in runs.items() if seed not in shared])
        ]
    if faults:
        raise InputError(
            "these runs cannot be compared: a method's settings need the same seeds, train.seed and freeze.seed, and these "
            "runs have one that another setting lacks\n" + "\n".join(faults),
            "run the others with these seeds, too, or leave these runs out",
        )


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({item})" for key, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _group_points(points: Sequence[Point], merges_settings: bool) -> tuple[Method, ...]:
    """Methods in the order in which they are met."""
    told = [key for key in dict.fromkeys(key for point in points for key in point.values) if key not in SEED_KEYS]
    varying = [key for key in told if len({repr(point.values.get(key)) for point in points}) > 1]
    inner = [key for key in varying if key == RATE_KEY or (merges_settings and key.startswith(("train.", "method.")))]
    outer = [key for key in varying if key not in inner]
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        groups.setdefault((point.title, *(repr(point.values.get(key)) for key in outer)), []).append(point)
    # Full fine-tuning first: it is what the others are measured against.
    members = sorted(groups.values(), key=lambda group: group[0].title != FULL)
    names = _tell_apart([group[0] for group in members], outer)
    return tuple(_make_method(name, group, inner) for name, group in zip(names, members, strict=True))


def _make_method(name: str, points: Sequence[Point], inner: Sequence[str]) -> Method:
    """A method of its runs, which differ in these keys and in their seeds."""
    keys = [key for key in inner if key != RATE_KEY and len({repr(point.values.get(key)) for point in points}) > 1]
    groups: dict[tuple[float, str], list[Point]] = {}
    for point in points:
        others = ", ".join(f"{key}={point.values.get(key)}" for key in keys)
        groups.setdefault((point.learning_rate, others), []).append(point)
    settings = tuple(
        Setting(", ".join(filter(None, (f"{rate:g}", others))), tuple(group))
        for (rate, others), group in sorted(groups.items(), key=lambda item: item[0])
    )
    means = [(setting.learning.mean, setting.forgetting.mean) for setting in settings]
    return Method(name, settings, tuple(find_frontier(means)))


def _tell_apart(points: Sequence[Point], varying: Sequence[str]) -> list[str]:
    """The titles; where two methods have the same, the settings in which they differ as well."""
    names = []
    for point in points:
        twins = [other for other in points if other.title == point.title]
        keys = [key for key in varying if len({repr(twin.values.get(key)) for twin in twins}) > 1]
        settings = ", ".join(f"{key}={point.values[key]}" for key in keys if key in point.values)
        names.append(f"{point.title} ({settings})" if settings else point.title)
    return names
