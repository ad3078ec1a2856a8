"""What a run tells trackers when its rounds are done: a row of scores per model, the metrics of the matrix, and its files."""

from dataclasses import dataclass, field
from pathlib import Path

from hftcli.comparing.forgetting import ForgettingMatrix, compute_metrics, read_matrix
from hftcli.runs.run import Run
from hftcli.runs.tracked import PROJECT, make_key

METRICS = ("op", "bwt", "forgetting", "fwt", "plasticity")


@dataclass(frozen=True)
class Logbook:
    """What trackers are told of a run as a whole.

    Attributes:
        name: the run's.
        key: of the run, the same whenever it is told of again.
        project: the tracker's own place for runs.
        rows: one for the model before training and one after each round: scores in [0, 1] and nats per token, by name.
        summary: the metrics of a forgetting matrix; nothing while it has fewer rows than tasks.
        table: the forgetting matrix, or the scores before and after: a heading, then a row per model.
        files: that are kept beside the numbers.
    """

    name: str
    key: str
    project: str
    rows: tuple[dict[str, float], ...]
    summary: dict[str, float] = field(default_factory=dict)
    table: tuple[tuple[str, ...], ...] = ()
    files: tuple[Path, ...] = ()


def make_logbook(run: Run, project: str | None) -> Logbook:
    """Of a run with at least one finished round.

    Args:
        project: null takes hft's own.
    """
    rounds = [round_ for round_ in run.rounds if round_.is_done]
    scores = [round_.read_scores() for round_ in rounds]
    measured = [scores[0].before, *(found.after for found in scores)]
    rows = tuple(
        {
            f"{kind}/{name}": value
            for name, score in row.items()
            for kind, value in (("score", score.score), ("nll", score.nll))
            if value is not None
        }
        for row in measured
    )
    names = ("before", *(round_.name for round_ in rounds))
    files = (run.page_path, run.recipe_path, run.matrix_path, *sorted(run.figures.glob("*.svg")))
    matrix = read_matrix(run.folder) if run.matrix_path.exists() else None
    return Logbook(
        name=run.folder.resolve().name,
        key=make_key(run),
        project=project or PROJECT,
        rows=rows,
        summary=_summarize(matrix) if matrix is not None else {},
        table=_tabulate_matrix(matrix) if matrix is not None else _tabulate(names, rows),
        files=tuple(path for path in files if path.exists()),
    )


def _summarize(matrix: ForgettingMatrix) -> dict[str, float]:
    found = compute_metrics(matrix.tasks, matrix.scores)
    return {name: value for name in METRICS if (value := getattr(found, name)) is not None}


def _tabulate_matrix(matrix: ForgettingMatrix) -> tuple[tuple[str, ...], ...]:
    columns = (*matrix.tasks, *matrix.general)
    rows = [(*row, *(column[place] for column in matrix.general.values())) for place, row in enumerate(matrix.scores)]
    shown = [tuple("" if value is None else f"{value:.4f}" for value in row) for row in rows]
    return (("model", *columns), *((name, *row) for name, row in zip(matrix.row_names, shown, strict=True)))


def _tabulate(names: tuple[str, ...], rows: tuple[dict[str, float], ...]) -> tuple[tuple[str, ...], ...]:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    lines = (tuple(f"{row[name]:.4f}" if name in row else "" for name in columns) for row in rows)
    return (("model", *columns), *((name, *line) for name, line in zip(names, lines, strict=True)))
