"""A run as a point: what it learned and what it lost, by task, out of its files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hftcli.comparing.curves import find_gain
from hftcli.comparing.statistics import NATS, POINTS, Unit
from hftcli.errors import InputError
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import FileSection
from hftcli.recipe.trainer_keys import TELLING_KEYS
from hftcli.runs.files import read_model
from hftcli.runs.made import MERGE_NAME, MergeManifest
from hftcli.runs.records import RoundResult
from hftcli.runs.run import Round, Run
from hftcli.runs.scores import HELD_OUT, By, Score

UNITS: dict[By, Unit] = {"score": POINTS, "nll": NATS}
SEED_KEYS = ("train.seed", "freeze.seed")
RATE_KEY = "train.learning_rate"
FULL = "full"
MADE_TITLES = {"interpolation": "averaged {:g}", "sparsification": "sparsified {:g}", "reset": "reset"}
EVALUATION_NAME = "evaluation.json"  # beside the merge.json of a model that was made
# The form of the file, where a run was written, and what is held to be equal by its outcome: the data by their hashes, the
# tasks by their names; when the runs were measured and who was told of them changes nothing of them.
UNTOLD_KEYS = ("version", "output", "data.path", "data.root", "eval.every_steps", "eval.num_points", *TELLING_KEYS)

Trail = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        values: its recipe by dotted keys.
        title: its method in a word or two.
        learned: by task that was trained, the gain in score, a share, or the fall of its negative log-likelihood.
        lost: by task that was known, the loss in score, or the rise of its negative log-likelihood.
        alike: what has to be the same in every run that is compared with this one, by what it is called in a message.
        trail: learning and forgetting at the places that were measured within the run; none where nothing was.
        measuring: when the recipe has it measured.
        questions: a hash of what was asked, by task, where that was kept.
    """

    name: str
    values: Mapping[str, Any]
    title: str
    learned: Mapping[str, float]
    lost: Mapping[str, float]
    alike: Mapping[str, Any]
    trail: Trail = ()
    measuring: str = ""
    questions: Mapping[str, str] = field(default_factory=dict)

    @property
    def learning(self) -> float:
        """Mean gain over the tasks that were trained, in the unit of `by`."""
        return fmean(self.learned.values())

    @property
    def forgetting(self) -> float:
        """Mean loss over the tasks that were known, in the unit of `by`."""
        return fmean(self.lost.values())

    @property
    def seed(self) -> tuple[int, ...]:
        """The seeds of the run's order and of its half: runs that share them share their draw."""
        return tuple(self.values[key] for key in SEED_KEYS)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, along which a method's curve runs."""
        return float(self.values[RATE_KEY])


def read_point(folder: Path, learned: Sequence[str] = (), by: By = "score") -> Point:
    """What a finished run learned and lost, or a model that `hft reset` or `hft merge` made of one.

    Such a model stands for the run's own where `hft eval --output FOLDER/evaluation.json` has scored it.

    Raises:
        InputError: neither, not finished, not verified, or nothing in it measures learning or forgetting.
    """
    made = _read_made(folder) if (folder / MERGE_NAME).exists() else None
    run = made.run if made else Run(folder)
    if not run.recipe_path.exists():
        raise InputError(
            f"{run.folder} is no run: it has no {run.recipe_path.name}", "give folders that hft made with --output"
        )
    recipe = load_recipe(run.recipe_path, is_written=True)
    _check_finished(run)
    results = {round_: round_.read_result() for round_ in run.rounds}
    trail: Trail = ()
    if len(results) == 1:
        gains, losses, asked = _read_single(folder, recipe, results, learned, made, by)
        trail = () if made else _read_trail(next(iter(results)), tuple(gains), tuple(losses), by)
    elif made:
        raise InputError(f"{folder} is made of a run of {len(results)} rounds", "compare models that are made of runs of one")
    else:
        gains, losses, asked = _read_sequence(folder, results, learned, by)
        trail = _read_trail_of_rounds(list(results), tuple(gains), tuple(losses), by)
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
        values={**values, **(made.values if made else {})},
        title=f"{title}, {made.title}" if made else title,
        learned=gains,
        lost=losses,
        alike={
            "objective": recipe.objective,
            "model": run.rounds[0].find_start() if run.rounds[0].start_path.exists() else recipe.model.place,
            "data": [_describe_data(result) for result in results.values()],
            "tasks": asked,
            "way of writing answers": _describe_writing(run.rounds[0]),
        },
        trail=trail,
        # With more points, a run would meet a level of learning earlier.
        measuring=f"eval.every_steps {recipe.eval.every_steps}, eval.num_points {recipe.eval.num_points}",
        questions={name: digest for name in asked if (digest := _hash_questions(run.rounds[0], name)) is not None},
    )


def _check_finished(run: Run) -> None:
    """Raises: InputError: a round has not run to its end, or was not verified."""
    unfinished = [round_.name for round_ in run.rounds if not round_.is_done]
    if unfinished or not run.rounds:
        raise InputError(
            f"{run.folder} is not finished: {', '.join(unfinished) or 'no round'} has not run to its end",
            "run its recipe again: it goes on where it stopped",
        )
    if unverified := run.unverified:
        raise InputError(
            f"{run.folder} is not verified: what had to stay in {', '.join(round_.name for round_ in unverified)} moved, or "
            "what had to move stayed",
            f"see hft verify {run.folder}, then train it again with another --output, or leave it out",
        )


class ScoredTasks(FileSection, extra="ignore"):
    """What is compared of the file that `hft eval` leaves of a model that was made."""

    tasks: dict[str, Score]
    """Scores by task."""


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
        after = ScoredTasks.model_validate_json(path.read_text(encoding="utf-8"), context=path).tasks
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not scored: it has no {path.name}", f"hft eval --model {folder} --tasks ... --output {path}"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not what hft eval writes: {error}") from None
    amount = manifest.weight if manifest.kind == "interpolation" else manifest.density
    title = MADE_TITLES[manifest.kind].format(amount)
    rule = _flatten(manifest.plan.rule.model_dump(mode="json"), "reset") if manifest.plan else {}
    values = {"made": title} | {key: value for key, value in rule.items() if key != "reset.seed"}
    return Made(Run(Path(tuned.path).parents[2]), title, values, after)  # RUN/rounds/00-sft/checkpoint


Measures = tuple[dict[str, float], dict[str, float], dict[str, str]]  # gains, losses, what was asked and how


def _read_single(
    folder: Path, recipe: Recipe, results: Mapping[Round, RoundResult], learned: Sequence[str], made: Made | None, by: By
) -> Measures:
    """Of a run with one round: the task whose rows were trained on, or the held-out rows, against the other tasks."""
    ((round_, result),) = results.items()
    scores = round_.read_scores()
    before, after = scores.before, made.after if made else scores.after
    before = {name: score for name, score in before.items() if getattr(score, by) is not None}
    if made and by == "score":
        before.pop(HELD_OUT, None)  # of multiple choice (data.pattern)
    if made and HELD_OUT in before:
        raise InputError(f"{folder} is made of a run's model, which hft eval asks no held-out rows", "compare it by score")
    for name, score in before.items():
        if name not in after or _describe_asking(after[name]) != _describe_asking(score):
            now = "not at all" if name not in after else f"on {_describe_asking(after[name])}"
            raise InputError(
                f"{folder}: {name} was not scored as before the run, on {_describe_asking(score)}, but {now}",
                f"hft eval --model {folder} --tasks {','.join(before)} --output {folder / EVALUATION_NAME}, with the options "
                "that are the run's keys under eval: --max-examples, --shots, --chat, --generate",
            )
    changes = {name: -_lose(folder, name, score, after[name], by) for name, score in before.items()}
    if unknown := [name for name in learned if name not in changes]:
        raise InputError(f"{folder}: --learned {unknown[0]} is none of its tasks: {', '.join(changes) or 'none'}")
    sources = [source.path for source in recipe.data.sources]
    spec = round_.read_spec()
    trained: set[str | None] = set(learned) or {spec.task or recipe.data.path, *sources, HELD_OUT, *spec.scoring.learned}
    gains = {name: change for name, change in changes.items() if name in trained}
    losses = {name: -change for name, change in changes.items() if name not in trained}
    asked = {name: _describe_asking(score) for name, score in before.items()}
    if result.pairs is not None and not learned and not made and by == "score":
        gains["reward accuracy"] = result.pairs.after.reward_accuracy - result.pairs.before.reward_accuracy
        asked["reward accuracy"] = f"{result.pairs.after.num_pairs} pairs"
    return gains, losses, asked


def _read_trail(round_: Round, learned: Sequence[str], lost: Sequence[str], by: By) -> Trail:
    """Learning and forgetting at the steps that were measured within a round, by the tasks of its end."""
    scores, found = round_.read_scores(), []
    for point in scores.points:
        gains = {name: find_gain(scores.before[name], score, by) for name, score in point.scores.items()}
        if point.pairs is not None and (pairs := round_.read_result().pairs) is not None:
            gains["reward accuracy"] = point.pairs.reward_accuracy - pairs.before.reward_accuracy
        known = {name: gain for name, gain in gains.items() if gain is not None}
        if not known.keys() >= {*learned, *lost}:
            return ()
        found.append((fmean(known[name] for name in learned), -fmean(known[name] for name in lost)))
    return tuple(found)


def _read_sequence(folder: Path, results: Mapping[Round, RoundResult], learned: Sequence[str], by: By) -> Measures:
    """Of a continual run: what each task gained in its own round, against what was lost since of it and of the other tasks."""
    if learned:
        raise InputError(f"{folder}: --learned has no effect on a run of several tasks, which trains on each", "drop it")
    rows = {task: round_.read_scores() for round_ in results if (task := round_.read_spec().task) is not None}
    *earlier, newest = rows
    before, last = next(iter(rows.values())).before, rows[newest].after
    gains = {task: -_lose(folder, task, before[task], row.after[task], by) for task, row in rows.items()}
    losses = {name: _lose(folder, name, score, last[name], by) for name, score in before.items() if name not in rows}
    losses |= {task: _lose(folder, task, rows[task].after[task], last[task], by) for task in earlier}
    return gains, losses, {name: _describe_asking(score) for name, score in last.items()}


def _read_trail_of_rounds(rounds: Sequence[Round], learned: Sequence[str], lost: Sequence[str], by: By) -> Trail:
    """Learning and forgetting by the first, second, ... point of every round of a continual run; the last is the run's end.

    What a task has gained by a point is against the run's start. What is lost by a point is the sum over the rounds of what
    each had lost by then since it began; of a task of the sequence, over the rounds after its own.
    """
    scores = [round_.read_scores() for round_ in rounds]
    tasks = [round_.read_spec().task for round_ in rounds]
    num_points = {len(found.points) for found in scores}
    if len(num_points) != 1:
        return ()  # not measured alike, as by `eval.every_steps` in rounds of unlike length
    trail = []
    for place in range(num_points.pop()):
        gains, losses = dict.fromkeys(learned, 0.0), dict.fromkeys(lost, 0.0)
        start = scores[0].before
        for index, (task, found) in enumerate(zip(tasks, scores, strict=True)):
            to_come = tasks[index + 1 :]
            now = {name: score for name, score in found.points[place].scores.items() if name not in to_come}
            for name, score in now.items():
                change = find_gain(scores[0].before[name] if name == task else start[name], score, by)
                if change is None:
                    return ()
                if name == task:
                    gains[name] += change
                else:
                    losses[name] -= change
            start = found.after
        trail.append((fmean(gains.values()), fmean(losses.values())))
    return tuple(trail)


def _lose(folder: Path, task: str, before: Score, after: Score, by: By) -> float:
    """Raises: InputError: the task was not measured so."""
    first, last = (before.score, after.score) if by == "score" else (after.nll, before.nll)
    if first is None or last is None:
        raise InputError(f"{folder}: {task} has no {by}", "compare by the other of score and nll, or without this task")
    return first - last


def _describe_asking(score: Score) -> str:
    """How many questions were asked, and how; of files of an earlier hft, and of another program's tasks, only how many."""
    return ", ".join(filter(None, (f"{score.num_examples} questions", score.way)))


def _hash_questions(round_: Round, task: str) -> str | None:
    """Of what a task asked and its right answers, or of rows that are no task's the lengths; None of an earlier hft's file."""
    try:
        predictions = round_.read_predictions("before", task)
    except FileNotFoundError:
        return None
    if task != HELD_OUT and any(prediction.question is None for prediction in predictions):
        return None
    asked = [(one.question, one.answers) if one.question is not None else one.num_tokens for one in predictions]
    return hashlib.sha256(repr(asked).encode()).hexdigest()


def _describe_writing(round_: Round) -> str:
    scoring = round_.read_spec().scoring
    cut = scoring.asking.max_new_tokens
    return f"temperature {scoring.temperature:g}, cut {'by each task' if cut is None else f'at {cut} tokens'}"


def _describe_data(result: RoundResult) -> str:
    hashes = " ".join(f"{Path(source.path).name} {source.fingerprint[:12]}" for source in result.data.sources)
    return f"{result.data.num_rows} rows of {hashes}"


def _name_method(recipe: Recipe) -> str:
    """`full`, `half`, `half + replay`, `half of columns (ssu)`, `half by fisher`; `lora` where adapters are on everything."""
    rule, method = recipe.freeze, recipe.method
    share = rule.trainable_fraction
    names = tuple(method.peft.type.lower() if name == "peft" and method.peft else name for name in method.names)
    if share == 1 and method.adapter is not None:
        return " + ".join(names)
    is_full = share == 1 and rule.grain != "biases"
    name = {1.0: FULL if is_full else "all", 0.5: "half"}.get(share, f"share {share:g}")
    additions = (key.removeprefix("freeze.") for key in rule.additions)
    return " + ".join((name + rule.variant * (not is_full), *additions, *names))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:  # an empty section says something: it is there
        return {prefix: value}
    return {key: leaf for name, item in value.items() for key, leaf in _flatten(item, f"{prefix}.{name}".lstrip(".")).items()}
