"""What a model knew after every round: the forgetting matrix, its file, and what is computed from it.

    {"tasks": ["C-STANCE", "FOMC"],
     "scores": [[0.31, 0.20],      row 0: the base model
                [0.50, 0.24],      row 1: after the round on C-STANCE
                [0.45, 0.73]]}     row 2: after the round on FOMC

R[t][i] is the score on task i after round t, for T tasks, one round each; row 0 is the model before any training. A run writes
the matrix whole after every round, so that one in progress has fewer rows.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hftcli.errors import InputError
from hftcli.recipe.section import FileSection, Section
from hftcli.runs.run import Run

SHOWN_FAULTS = 5

# Strict: a string or a boolean is no score.
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Nats = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
ShareRow = tuple[Share | None, ...]
NatsRow = tuple[Nats | None, ...]
Row = Sequence[float | None]


class ForgettingMatrix(FileSection):
    """Scores of every model of a run on every task: a row per model, a column per task."""

    tasks: tuple[str, ...]
    """Names of the tasks, in the order in which they are trained."""
    scores: tuple[ShareRow, ...]
    """Score in [0, 1] as the benchmark defines it: a row for the base model, then one after each round; null where it was not
    measured."""
    lenient: tuple[ShareRow, ...] | None = None
    """The same under a metric that forgives the answer's format; null where there is none."""
    nll: tuple[NatsRow, ...] | None = None
    """Negative log-likelihood of the answers in nats per token, lower is better; null where there is none."""
    general: dict[str, ShareRow] = Field(default_factory=dict)
    """Score in [0, 1] by row of each task that is measured and never trained."""
    general_nll: dict[str, NatsRow] = Field(default_factory=dict)
    """Negative log-likelihood by row of such a task, nats per token."""

    @property
    def num_rounds(self) -> int:
        """Rounds done."""
        return len(self.scores) - 1

    @property
    def is_finished(self) -> bool:
        """Whether every task had its round."""
        return self.num_rounds == len(self.tasks)

    @property
    def row_names(self) -> tuple[str, ...]:
        """What each row is of: `base`, then the task of each finished round."""
        return ("base", *self.tasks[: self.num_rounds])

    @model_validator(mode="after")
    def _check_shape(self) -> "ForgettingMatrix":
        if faults := list(self._find_faults()):
            raise ValueError("\n".join(faults))
        return self

    def _find_faults(self) -> Iterator[str]:
        num_tasks, num_rows = len(self.tasks), len(self.scores)
        if not self.tasks:
            yield "tasks is empty"
        if not self.scores:
            yield "scores is empty: its first row is the base model's"
        for task in dict.fromkeys(self.tasks):
            if self.tasks.count(task) > 1:
                yield f"tasks: '{task}' is named {self.tasks.count(task)} times"
        if num_rows > num_tasks + 1:
            yield f"scores has {num_rows} rows; {num_tasks} tasks have at most {num_tasks + 1}, the first of the base model"
        for name, rows in (("scores", self.scores), ("lenient", self.lenient), ("nll", self.nll)):
            if rows is None:
                continue
            if len(rows) != num_rows:
                yield f"{name} has {len(rows)} rows, scores has {num_rows}"
            if num_rows == num_tasks and all(len(row) == num_tasks + 1 for row in rows):
                yield f"{name} has {num_tasks + 1} columns for {num_tasks} tasks: transpose it, rows are models"
                continue
            for index, row in enumerate(rows):
                if len(row) != num_tasks:
                    yield f"{name}[{index}] has {len(row)} values for {num_tasks} tasks (row 0 is the base model)"
        for name, columns in (("general", self.general), ("general_nll", self.general_nll)):
            for task, column in columns.items():
                if len(column) != num_rows:
                    yield f"{name}.{task} has {len(column)} values, scores has {num_rows} rows"
                if task in self.tasks:
                    yield f"{name}.{task} is one of tasks: only what is never trained belongs here"


class TaskMetrics(Section):
    """One task's part. Null where the matrix lacks a value it needs."""

    learned: float | None
    """Score right after its own round: R[i][i]."""
    final: float | None
    """Score after the last round: R[T][i]."""
    bwt: float | None
    """Gain since its own round; null for the last task, which nothing followed."""
    forgetting: float | None
    """Loss since its best from its own round on; null for the last task."""
    loss_from_peak: float | None
    """Loss since the best that was ever measured of it; null for the last task."""
    fwt: float | None
    """Gain over the base model just before its own round; null for the first task, which nothing preceded."""


class ForgettingMetrics(Section):
    """What a finished matrix says in a few numbers. Null where the matrix lacks a value it needs: a mean is over all or none.

    Levels are in the unit of the scores. Differences are gains, and forgetting is a loss, whichever way the scores run: for
    likelihoods a - b is taken as b - a, and the best is the lowest.
    """

    op: float | None
    """Overall performance: mean over i of R[T][i]. Chaudhry et al. 2018 (arXiv 1801.10112)."""
    bwt: float | None
    """Backward transfer: mean over i < T of R[T][i] - R[i][i]. Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), as in the tables
    of TRACE (arXiv 2310.06762), which divide by T - 1."""
    bwt_over_t: float | None
    """The sum of BWT divided by T. As SEEKR and SAPT report it; nearer to 0 by (T - 1) / T."""
    bwt_clipped: float | None
    """Losses alone, sum over i < T of min(R[T][i] - R[i][i], 0), divided by T. As TreeLoRA reports it; never above 0."""
    forgetting: float | None
    """Loss since the best: mean over i < T of max over i <= t < T of R[t][i], less R[T][i]. Chaudhry et al. 2018, equation 3,
    from a task's own round on, so that cells measured before it change nothing. The base model never counts."""
    loss_from_peak: float | None
    """Mean over i < T of the best score ever measured of task i, less R[T][i]. The base model and the rounds before a task's
    own count where they were measured, so that what pretraining gave can be lost too."""
    fwt: float | None
    """Forward transfer: mean over i > 1 of R[i-1][i] - R[0][i]. Lopez-Paz and Ranzato 2017."""
    plasticity: float | None
    """What was learned: mean over i of R[i][i]."""
    per_task: dict[str, TaskMetrics]
    """Every task's part."""


def compute_metrics(tasks: Sequence[str], rows: Sequence[Row], lower_is_better: bool = False) -> ForgettingMetrics:
    """The metrics of one kind of score, all null but the tasks' parts while rows are missing.

    Args:
        tasks: names in the order of training.
        rows: of the shape that ForgettingMatrix checks.
        lower_is_better: for likelihoods in nats.
    """
    per_task = {task: _measure_task(index, len(tasks), rows, lower_is_better) for index, task in enumerate(tasks)}
    parts = tuple(per_task.values())
    bwt = _mean(part.bwt for part in parts[:-1])
    changes = [part.bwt for part in parts[:-1] if part.bwt is not None]
    return ForgettingMetrics(
        op=_mean(part.final for part in parts),
        bwt=bwt,
        bwt_over_t=None if bwt is None else math.fsum(changes) / len(parts),
        bwt_clipped=None if bwt is None else math.fsum(min(change, 0.0) for change in changes) / len(parts),
        forgetting=_mean(part.forgetting for part in parts[:-1]),
        loss_from_peak=_mean(part.loss_from_peak for part in parts[:-1]),
        fwt=_mean(part.fwt for part in parts[1:]),
        plasticity=_mean(part.learned for part in parts),
        per_task=per_task,
    )


def _measure_task(index: int, num_tasks: int, rows: Sequence[Row], lower_is_better: bool) -> TaskMetrics:
    column = [row[index] for row in rows] + [None] * (num_tasks + 1 - len(rows))  # rounds not done yet
    own_round, final = index + 1, column[-1]

    def gain(before: float | None, after: float | None) -> float | None:
        if before is None or after is None:
            return None
        return before - after if lower_is_better else after - before

    since = [score for score in column[own_round:-1] if score is not None]
    best = peak = None
    if since and None not in column[own_round:-1]:
        choose = min if lower_is_better else max
        best, peak = choose(since), choose(score for score in column[:-1] if score is not None)
    return TaskMetrics(
        learned=column[own_round],
        final=final,
        bwt=gain(column[own_round], final) if own_round < num_tasks else None,
        forgetting=gain(final, best),
        loss_from_peak=gain(final, peak),
        fwt=gain(column[0], column[own_round - 1]) if own_round > 1 else None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def read_matrix(path: Path) -> ForgettingMatrix:
    """The matrix of a run's folder, or a file.

    Raises:
        InputError: there is none, or it is no forgetting matrix; every fault with its place.
        NewerFile: a newer hft wrote it.
    """
    file = path
    if path.is_dir():
        file = Run(path).matrix_path
        if not file.exists():
            raise InputError(f"{path} holds no {file.name}", "give the folder of a continual run, or a matrix file")
    try:
        return ForgettingMatrix.model_validate_json(file.read_text(encoding="utf-8"), context=file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file", "give the folder of a continual run, or a matrix file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    except ValidationError as error:
        faults = error.errors()
        lines = [f"{file}: {line}" for fault in faults for line in _describe_fault(fault)]
        if len(lines) > SHOWN_FAULTS:
            lines = [*lines[:SHOWN_FAULTS], f"... and {len(lines) - SHOWN_FAULTS} more"]
        raise InputError("\n".join(lines), _suggest_fix({fault["type"] for fault in faults})) from None


def _describe_fault(fault: ErrorDetails) -> list[str]:
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"]).lstrip(".")
    match fault["type"]:
        case "json_invalid":
            return [f"not JSON: {fault['ctx']['error']}"]
        case "value_error":
            return str(fault["ctx"]["error"]).split("\n")
        case "model_type":
            return ["not a JSON object with tasks and scores"]
        case "missing":
            return [f"{place} is missing"]
        case "extra_forbidden":
            known = list(ForgettingMatrix.model_fields)
            guess = difflib.get_close_matches(place, known, n=1)
            return [f"unknown key '{place}' " + (f"(did you mean '{guess[0]}'?)" if guess else f"(known: {', '.join(known)})")]
    return [f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"]


def _suggest_fix(kinds: set[str]) -> str:
    if "less_than_equal" in kinds:
        return "scores are shares in [0, 1]; if these are points from 0 to 100, divide them by 100"
    return 'a matrix file is {"tasks": [...], "scores": [[...], ...]}: a row of the base model, then one after each task'


def assemble_matrix(run: Run) -> ForgettingMatrix:
    """What the finished rounds of a continual run scored: row 0 before any training, then a row for each."""
    specs = [round_.read_spec() for round_ in run.rounds]
    tasks = [spec.task for spec in specs if spec.task is not None]
    scores = [round_.read_scores() for round_ in run.rounds if round_.is_done]
    rows = [scores[0].before, *(found.after for found in scores)]
    general = [name for name in specs[0].scoring.before if name not in tasks]

    def read(names: Sequence[str], field: str) -> tuple[tuple[float | None, ...], ...]:
        return tuple(tuple(getattr(row[name], field) for name in names) for row in rows)

    has_lenient = any(value is not None for row in read(tasks, "lenient") for value in row)
    names = [shorten_task(task) for task in tasks]
    return ForgettingMatrix(
        tasks=tuple(names if len(set(names)) == len(names) else tasks),
        scores=read(tasks, "score"),
        lenient=read(tasks, "lenient") if has_lenient else None,
        nll=read(tasks, "nll"),
        general=dict(zip(general, zip(*read(general, "score"), strict=True), strict=False)),
        general_nll=dict(zip(general, zip(*read(general, "nll"), strict=True), strict=False)),
    )


def shorten_task(name: str) -> str:
    """A task's name without its benchmark's."""
    return name.rpartition("/")[2]
