"""Learning against forgetting: what runs of several settings and seeds show of the methods behind them.

A setting is what a run's recipe says besides its seeds; a method is what a setting says besides its learning rate. A run with
less forgetting may just have learned less, so methods are compared at equal learning, along their frontiers.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from hftcli.errors import InputError, RecipeError
from hftcli.recipe import ADAPTERS, Recipe, load_recipe
from hftcli.run import HELD_OUT, MERGE_NAME, MergeManifest, Round, RoundResult, Run, Score, read_model
from hftcli.statistics import (
    NATS,
    POINTS,
    EqualLearning,
    Estimate,
    Unit,
    compare_at_equal_learning,
    estimate_mean,
    find_frontier,
)

By = Literal["score", "nll"]
UNITS: dict[By, Unit] = {"score": POINTS, "nll": NATS}
SEED_KEYS = ("train.seed", "freeze.seed")
RATE_KEY = "train.learning_rate"
FULL = "full"
EVALUATION_NAME = "evaluation.json"  # beside the merge.json of a model that was made
# Where a run was written, and what is held to be equal by its outcome: the data by their hashes, the tasks by their names.
UNTOLD_KEYS = ("output", "data.path", "data.root")


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        values: its recipe by dotted keys.
        title: its method in a word or two.
        learned: by task that was trained, the gain in score, a share, or the fall of its negative log-likelihood.
        lost: by task that was known, the loss in score, or the rise of its negative log-likelihood.
        alike: what has to be the same in every run that is compared with this one, by what it is called in a message.
    """

    name: str
    values: Mapping[str, Any]
    title: str
    learned: Mapping[str, float]
    lost: Mapping[str, float]
    alike: Mapping[str, Any]

    @property
    def learning(self) -> float:
        return fmean(self.learned.values())

    @property
    def forgetting(self) -> float:
        return fmean(self.lost.values())

    @property
    def seed(self) -> tuple[int, ...]:
        return tuple(self.values[key] for key in SEED_KEYS)

    @property
    def learning_rate(self) -> float:
        return self.values[RATE_KEY]


@dataclass(frozen=True)
class Setting:
    """The runs that differ in their seeds only."""

    learning_rate: float
    points: tuple[Point, ...]

    @property
    def learning(self) -> Estimate:
        return estimate_mean([point.learning for point in self.points])

    @property
    def forgetting(self) -> Estimate:
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
        if self.found is None:
            return f"{self.first} and {self.second} never learned equally much: give more values of {RATE_KEY}"
        estimate, found, unit = self.found.difference, self.found, UNITS[self.by]
        between = f"between {unit.show(found.low)} and {unit.show(found.high)} {unit.name} of learning"
        if estimate.low is None:
            return (
                f"at equal learning, {self._compare(estimate)}, {between}: one seed, so no interval and no difference is shown"
            )
        if not estimate.excludes_zero:
            interval = f"{unit.show(estimate.low, signed=True)} to {unit.show(estimate.high, signed=True)}"
            return (
                f"at equal learning, no difference was shown between {self.first} and {self.second}: {self.first} forgets "
                f"{unit.show(estimate.mean, signed=True)} {unit.name} (95 % interval {interval}), {between}"
            )
        interval = " to ".join(unit.show(value) for value in sorted(map(abs, (estimate.low, estimate.high))))
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


def read_point(folder: Path, learned: Sequence[str] = (), by: By = "score") -> Point:
    """What a finished run learned and lost, or a model that `hft reset` or `hft merge` made of one.

    Such a model stands for the run's own where `hft eval --output FOLDER/evaluation.json` has scored it.

    Raises:
        InputError: neither, not finished, or nothing in it measures learning or forgetting.
    """
    made = _read_made(folder) if (folder / MERGE_NAME).exists() else None
    run = made.run if made else Run(folder)
    if not run.recipe_path.exists():
        raise InputError(
            f"{run.folder} is no run: it has no {run.recipe_path.name}", "give folders that hft made with --output"
        )
    recipe = load_recipe(run.recipe_path)
    results = {round_: round_.read_result() for round_ in run.rounds}
    unfinished = [round_.name for round_, result in results.items() if result is None]
    if unfinished or not results:
        raise InputError(
            f"{run.folder} is not finished: {', '.join(unfinished) or 'no round'} has not run to its end",
            "run its recipe again: it goes on where it stopped",
        )
    if len(results) == 1:
        gains, losses, num_examples = _read_single(folder, recipe, results, learned, made, by)
    elif made:
        raise InputError(f"{folder} is made of a run of {len(results)} rounds", "compare models that are made of runs of one")
    else:
        gains, losses, num_examples = _read_sequence(folder, results, learned, by)
    if not gains:
        raise InputError(
            f"{folder}: none of its tasks ({', '.join(losses) or 'none'}) asks for what was trained on",
            "say which of them measures learning: --learned TASK; or, with eval.held_out, compare --by nll",
        )
    if not losses:
        raise InputError(f"{folder}: nothing that was known before was scored", "name such tasks under eval.tasks")
    values = {key: value for key, value in _flatten(recipe.model_dump(mode="json")).items() if key not in UNTOLD_KEYS}
    title = _name_method(recipe)
    return Point(
        name=str(folder),
        values=values | (made.values if made else {}),
        title=f"{title}, {made.title}" if made else title,
        learned=gains,
        lost=losses,
        alike={
            "objective": recipe.objective,
            "model": recipe.model.path,
            "data": [_describe_data(result) for result in results.values()],
            "tasks": {name: f"{count} questions" for name, count in num_examples.items()},
        },
    )


@dataclass(frozen=True)
class Made:
    """A model that was made of a run's.

    Attributes:
        run: whose model it was made of.
        title: how, in a word or two.
        values: how, by keys like those of a recipe.
        after: its scores by task.
    """

    run: Run
    title: str
    values: Mapping[str, Any]
    after: Mapping[str, Score]


def _read_made(folder: Path) -> Made:
    """Raises: InputError: it was not made of a run's model, or it is not scored."""
    manifest = read_model(folder / MERGE_NAME, MergeManifest)
    tuned = manifest.inputs.get("tuned")
    if tuned is None:
        raise InputError(f"{folder} is a delta laid over its base, which the run itself stands for", "give the run")
    path = folder / EVALUATION_NAME
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        after = {name: Score.model_validate(score) for name, score in tasks.items()}
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not scored: it has no {path.name}", f"hft eval --model {folder} --tasks ... --output {path}"
        ) from None
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is not what hft eval writes: {error}") from None
    title = "reset" if manifest.weight is None else f"averaged {manifest.weight:g}"
    rule = _flatten(manifest.plan.rule.model_dump(mode="json"), "reset") if manifest.plan else {}
    values = {"made": title} | {key: value for key, value in rule.items() if key != "reset.seed"}
    return Made(Run(Path(tuned.path).parents[2]), title, values, after)  # RUN/rounds/00-sft/checkpoint


Measures = tuple[dict[str, float], dict[str, float], dict[str, int]]  # gains, losses, questions


def _read_single(
    folder: Path, recipe: Recipe, results: Mapping[Round, RoundResult], learned: Sequence[str], made: Made | None, by: By
) -> Measures:
    """Of a run with one round: the task whose rows were trained on, or the held-out rows, against the other tasks."""
    ((round_, result),) = results.items()
    scores = round_.read_scores()
    before, after = scores.before, made.after if made else scores.after
    before = {name: score for name, score in before.items() if getattr(score, by) is not None}
    if made and HELD_OUT in before:
        raise InputError(f"{folder} is made of a run's model, which hft eval asks no held-out rows", "compare it by score")
    for name, score in before.items():
        if name not in after or after[name].num_examples != score.num_examples:
            raise InputError(
                f"{folder}: {name} was not scored as before the run, on {score.num_examples} questions",
                f"hft eval --tasks {','.join(before)}",
            )
    changes = {name: -_lose(score, after[name], by) for name, score in before.items()}
    if unknown := [name for name in learned if name not in changes]:
        raise InputError(f"{folder}: --learned {unknown[0]} is none of its tasks: {', '.join(changes) or 'none'}")
    trained = tuple(learned) or (round_.read_spec().task or recipe.data.path, HELD_OUT)
    gains = {name: change for name, change in changes.items() if name in trained}
    losses = {name: -change for name, change in changes.items() if name not in trained}
    num_examples = {name: score.num_examples for name, score in before.items()}
    if result.pairs is not None and not learned and not made and by == "score":
        gains["reward accuracy"] = result.pairs.after.reward_accuracy - result.pairs.before.reward_accuracy
        num_examples["reward accuracy"] = result.pairs.after.num_pairs
    return gains, losses, num_examples


def _read_sequence(folder: Path, results: Mapping[Round, RoundResult], learned: Sequence[str], by: By) -> Measures:
    """Of a continual run: what each task gained in its own round, against what was lost since of it and of the other tasks."""
    if learned:
        raise InputError(f"{folder}: --learned has no effect on a run of several tasks, which trains on each", "drop it")
    tasks = [round_.read_spec().task for round_ in results]
    rows = [round_.read_scores() for round_ in results]
    before, last = rows[0].before, rows[-1].after
    gains = {task: -_lose(before[task], row.after[task], by) for task, row in zip(tasks, rows, strict=True)}
    losses = {name: _lose(score, last[name], by) for name, score in before.items() if name not in tasks}
    losses |= {task: _lose(row.after[task], last[task], by) for task, row in zip(tasks[:-1], rows[:-1], strict=True)}
    return gains, losses, {name: score.num_examples for name, score in last.items()}


def _lose(before: Score, after: Score, by: By) -> float:
    return before.score - after.score if by == "score" else after.nll - before.nll


def _describe_data(result: RoundResult) -> str:
    hashes = " ".join(f"{Path(source.path).name} {source.fingerprint[:12]}" for source in result.data.sources)
    return f"{result.data.num_rows} rows of {hashes}"


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
    groups: dict[tuple, list[Point]] = {}
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


def _name_method(recipe: Recipe) -> str:
    """`full`, `half`, `half + replay`; `lora` where adapters are on everything."""
    share, names = recipe.freeze.trainable_fraction, recipe.method.names
    if share == 1 and set(ADAPTERS) & set(names):
        return " + ".join(names)
    return " + ".join(({1.0: FULL, 0.5: "half"}.get(share, f"share {share:g}"), *names))


def _tell_apart(points: Sequence[Point], varying: Sequence[str]) -> list[str]:
    """The titles; where two methods have the same, the settings in which they differ as well."""
    names = []
    for point in points:
        twins = [other for other in points if other.title == point.title]
        keys = [key for key in varying if len({repr(twin.values.get(key)) for twin in twins}) > 1]
        settings = ", ".join(f"{key}={point.values[key]}" for key in keys if key in point.values)
        names.append(f"{point.title} ({settings})" if settings else point.title)
    return names


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:  # an empty section says something: it is there
        return {prefix: value}
    return {key: leaf for name, item in value.items() for key, leaf in _flatten(item, f"{prefix}.{name}".lstrip(".")).items()}


def make_grid(
    recipe: Path | str | None, overrides: Sequence[str], vary: Iterable[str], num_seeds: int, output: Path
) -> list[Recipe]:
    """The recipes of all settings with all seeds, each with a folder of its own under `output`.

    Args:
        overrides: `key=value` of every run.
        vary: `key=value,value,...`; the product of several is taken.
        num_seeds: seeds 1 to so many, for the halves and the order of the data alike.

    Raises:
        RecipeError: a fault in one of them; nothing has run yet.
    """
    axes = [_read_axis(text) for text in vary]
    keys = [key for key, _ in axes]
    if taken := [key for key in keys if key in (*SEED_KEYS, "output")]:
        raise RecipeError(f"--vary {taken[0]}: hft compare sets it itself", "give --seeds and --output")
    recipes = []
    for values in product(*(values for _, values in axes)):
        settings = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for seed in range(1, num_seeds + 1):
            folder = output / _name_folder(settings, seed)
            given = [*overrides, *settings, *(f"{key}={seed}" for key in SEED_KEYS), f"output={yaml.safe_dump(str(folder))}"]
            recipes.append(_load(recipe, given))
    return recipes


def _load(recipe: Path | str | None, overrides: Sequence[str]) -> Recipe:
    """With its objective filled in: what the recipe's sections say it is."""
    return load_recipe(recipe, overrides, load_recipe(recipe, overrides).objective)


def _read_axis(text: str) -> tuple[str, list[str]]:
    """Raises: RecipeError: not key=value,value."""
    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = []
    if not equals or not key or not found:
        raise RecipeError(f"--vary {text}: expected key=value,value, such as train.learning_rate=3e-4,7e-4")
    return key, [yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip() for value in found]


def _name_folder(settings: Sequence[str], seed: int) -> str:
    """`trainable_fraction=0.5,learning_rate=3e-4-1`."""
    told = []
    for setting in settings:
        key, _, value = setting.partition("=")
        plain = re.sub(r"[^\w.+-]+", "-", value).strip("-")
        told.append(f"{key.rpartition('.')[2]}={plain}")
    return f"{','.join(told) or 'run'}-{seed}"
