"""Measures on the terminal: the forgetting matrix, comparisons of methods, evaluations of a model."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hftcli.comparing.comparison import Comparison
from hftcli.comparing.forgetting import ForgettingMatrix, ForgettingMetrics, Row, TaskMetrics, compute_metrics
from hftcli.comparing.items import ItemChange
from hftcli.comparing.statistics import NATS, POINTS, Estimate, Unit
from hftcli.measuring.evaluation import Evaluation
from hftcli.reporting.lines import open_console, say
from hftcli.reporting.places import show_place
from hftcli.reporting.terminal import make_number_table, print_measures, print_whole
from hftcli.runs.scores import Score

ADJUSTED_HEADINGS = ("lost, less guessing", "won, less guessing")
ADJUSTED_NOTE = (
    "less guessing: the questions lost and won, points of all, less what guessing at the choices would show;\n"
    "that takes off about half of what guessing produces, not all of it"
)


def make_score_table(
    befores: Mapping[str, Score], afters: Mapping[str, Score], changes: Mapping[str, ItemChange], title: str
) -> Table:
    """Score in points and negative log-likelihood in nats per token, before and after; what became of the questions."""
    title += ": scores in points (0 to 100), nll in nats per token"
    has_choices = any(items.adjusted for items in changes.values())
    has_faults = any(score.num_impossible for score in befores.values())
    if changes:
        title += ";\nchange with its 95 % interval; lost of those known before, won of the others; p of McNemar's exact test"
    if has_choices:
        title += f";\n{ADJUSTED_NOTE}"
    title += describe_ways(befores) + describe_cuts(befores, ", before") + describe_cuts(afters, ", after")
    if has_faults:
        title += ";\nno model's: questions with a right answer that would not count if a model gave it"
    table = Table(title=title, title_justify="left")
    headings = ("task", "before", "after", "change", "nll before", "nll after", *(("lost", "won", "p") if changes else ()))
    for heading in (*headings, *(ADJUSTED_HEADINGS if has_choices else ()), *(("no model's",) if has_faults else ())):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=heading == "task")
    for name, before in befores.items():
        after, items = afters[name], changes.get(name)
        change = POINTS.show(_subtract(after.score, before.score), signed=True)
        if items and items.change.interval is not None:
            change += f" ({' to '.join(POINTS.show(value, signed=True) for value in items.change.interval)})"
        table.add_row(
            name, POINTS.show(before.score), POINTS.show(after.score), change, NATS.show(before.nll), NATS.show(after.nll),
            *(describe_transitions(items) if changes else ()), *(describe_adjusted(items) if has_choices else ()),
            *((str(before.num_impossible),) if has_faults else ()),
        )  # fmt: skip
    return table


def describe_ways(scores: Mapping[str, Score]) -> str:
    """How the questions of tasks were asked, and what was left out, a line each; nothing where they are plain text, and all."""
    asked: dict[str, list[str]] = {}
    for task, score in scores.items():
        if score.way not in (None, "plain"):
            asked.setdefault(score.way, []).append(Path(task).name)
    lines = [f"asked as {way}: {', '.join(names)}" for way, names in asked.items()]
    lines += [
        f"{Path(task).name}: {number} rows left out: {reason}"
        for task, score in scores.items()
        for reason, number in score.left_out.items()
    ]
    return "".join(f";\n{line}" for line in lines)


def describe_cuts(scores: Mapping[str, Score], moment: str = "") -> str:
    """Of which tasks answers had not ended where they were cut, a line each; nothing where all had."""
    return "".join(
        f";\n{Path(task).name}{moment}: {score.num_cut} of {score.num_examples} answers cut before they ended"
        for task, score in scores.items()
        if score.num_cut
    )


def describe_transitions(items: ItemChange | None) -> tuple[str, ...]:
    """Questions lost of those known, won of the others, and McNemar's p; empty where scores have degrees."""
    if items is None or items.transitions is None or items.p_value is None:
        return "", "", ""
    moved = items.transitions
    p_value = "< 0.001" if items.p_value < 0.001 else f"{items.p_value:.3f}"
    return f"{moved.num_lost} of {moved.num_known}", f"{moved.num_won} of {moved.num_items - moved.num_known}", p_value


def describe_adjusted(items: ItemChange | None) -> tuple[str, str]:
    """Questions lost and won in points of all, less what guessing would show; empty where there are no choices."""
    if items is None or items.adjusted is None:
        return "", ""
    return POINTS.show(items.adjusted.lost), POINTS.show(items.adjusted.won)


def print_matrix(matrix: ForgettingMatrix, as_json: bool, verified: bool | None = None) -> None:
    """The scores after every round, what each task gained and lost, and the metrics with their definitions.

    Args:
        verified: whether the run's rounds were; None of a matrix that is no run's, or of which more is said beside it.
    """
    kinds = _list_kinds(matrix)
    metrics = {name: compute_metrics(matrix.tasks, rows, unit is NATS) for name, rows, unit in kinds}
    if as_json:
        others = {name: metrics[name].model_dump() if name in metrics else None for name in ("lenient", "nll")}
        general = {
            name: {task: _describe_change(column) for task, column in columns.items()}
            for name, columns in (("general", matrix.general), ("general_nll", matrix.general_nll))
        }
        rounds = {"num_rounds": matrix.num_rounds, "is_finished": matrix.is_finished, "verified": verified}
        print_measures({**rounds, **metrics["strict"].model_dump(), **others, **general})
        return
    console = open_console()
    for name, rows, unit in kinds:
        if name == "lenient" and rows == matrix.scores:
            say("lenient scores: the same")
            continue
        say(f"{name} scores, {unit.note}; bold after its own round, dim before it:")
        print_whole(_make_matrix_table(matrix, rows, unit))
        print_whole(_make_task_table(metrics[name].per_task, unit))
    for name, columns, unit in (("general", matrix.general, POINTS), ("general nll", matrix.general_nll, NATS)):
        if columns:
            say(f"{name}, tasks that are never trained, {unit.note}:")
            print_whole(_make_general_table(columns, unit))
    console.print(_make_metric_table({name: (metrics[name], unit) for name, _, unit in kinds}))
    say(
        "R[t][i] is the score on task i after round t of T; row 0 is the base model's. "
        "bwt and fwt are gains, forgetting is a loss, for nll too."
    )
    if not matrix.is_finished:
        say(
            f"{matrix.num_rounds} of {len(matrix.tasks)} rounds are there: what needs the last row is left blank. "
            "Row 0 is the base model's; where it was not scored, it is a row of nulls."
        )


def describe_choice(comparison: Comparison, num_seeds: int) -> str:
    """How the settings were chosen that another comparison reports."""
    chosen = [
        f"{method.name} {' or '.join(method.settings[place].label for place in sorted(method.frontier))}"
        for method in comparison.methods
    ]
    seeds = f"{num_seeds} other seed{'s' if num_seeds > 1 else ''}"
    return f"settings chosen on {seeds}, by learning {', '.join(comparison.learned)}: {'; '.join(chosen)}"


def print_comparison(comparison: Comparison, as_json: bool, tuning: str = "") -> None:
    """A row per setting with its means and 95 % intervals over the seeds, and every two methods at equal learning.

    Args:
        tuning: how the settings were chosen; empty where all that ran are reported.
    """
    if as_json:
        print_measures({**describe_comparison(comparison), "tuning": tuning or None})
        return
    if tuning:
        say(tuning)
    say(f"learning   mean gain on {', '.join(comparison.learned)}")
    say(f"forgetting mean loss on {', '.join(comparison.known)}")
    table = make_number_table("method", "setting", "seeds", "learning", "forgetting", "")
    unit = comparison.unit
    table.title = f"{unit.name}, means over seeds with 95 % intervals; * on the frontier"
    table.title_justify = "left"
    for method in comparison.methods:
        for index, setting in enumerate(method.settings):
            table.add_row(
                Text(method.name), Text(setting.label), f"{len(setting.points)}",
                *(show_estimate(estimate, unit) for estimate in (setting.learning, setting.forgetting)),
                "*" if index in method.frontier else "",
            )  # fmt: skip
    print_whole(table)
    for difference in comparison.differences:
        say(difference.sentence)


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON has it; gains, losses and differences are shares, or nats per token."""
    return {
        "by": comparison.by,
        "learned": comparison.learned,
        "known": comparison.known,
        "methods": {
            method.name: [
                {
                    "setting": setting.label,
                    "learning_rate": setting.points[0].learning_rate,
                    "is_on_frontier": index in method.frontier,
                    "learning": asdict(setting.learning),
                    "forgetting": asdict(setting.forgetting),
                    "runs": [
                        {
                            "run": point.name,
                            "seeds": point.seed,
                            "learning": point.learning,
                            "forgetting": point.forgetting,
                            "learned": point.learned,
                            "lost": point.lost,
                            "trail": point.trail,
                        }
                        for point in setting.points
                    ],
                }
                for index, setting in enumerate(method.settings)
            ]
            for method in comparison.methods
        },
        "differences": [{**asdict(difference), "sentence": difference.sentence} for difference in comparison.differences],
    }


def show_estimate(estimate: Estimate, unit: Unit) -> str:
    """A mean over seeds, with half its interval."""
    if estimate.interval is None:
        return unit.show(estimate.mean)
    return f"{unit.show(estimate.mean)} ± {unit.show(estimate.interval[1] - estimate.mean)}"


def _list_kinds(matrix: ForgettingMatrix) -> list[tuple[str, tuple[Row, ...], Unit]]:
    kinds = (("strict", matrix.scores, POINTS), ("lenient", matrix.lenient, POINTS), ("nll", matrix.nll, NATS))
    return [(name, rows, unit) for name, rows, unit in kinds if rows is not None]


def _describe_change(column: Row) -> dict[str, float | None]:
    return {"base": column[0], "last": column[-1], "change": _subtract(column[-1], column[0])}


def _subtract(last: float | None, first: float | None) -> float | None:
    return None if last is None or first is None else last - first


def _make_matrix_table(matrix: ForgettingMatrix, rows: tuple[Row, ...], unit: Unit) -> Table:
    """Columns are numbered, since the names of eight tasks do not fit side by side; the rows tell the numbers."""
    table = make_number_table("after", *range(1, len(matrix.tasks) + 1))
    for t, (name, row) in enumerate(zip(matrix.row_names, rows, strict=True)):
        styles = ("bold" if i + 1 == t else "dim" if i + 1 > t else "" for i in range(len(row)))
        cells = (Text(unit.show(score), style=style) for score, style in zip(row, styles, strict=True))
        table.add_row(Text(f"{t}  {name}"), *cells)
    return table


def _make_task_table(per_task: Mapping[str, TaskMetrics], unit: Unit) -> Table:
    table = make_number_table("task", "learned", "final", "bwt", "forgetting", "fwt")
    for index, (task, part) in enumerate(per_task.items(), start=1):
        changes = (unit.show(change, signed=True) for change in (part.bwt, part.forgetting, part.fwt))
        table.add_row(Text(f"{index}  {task}"), unit.show(part.learned), unit.show(part.final), *changes)
    return table


def _make_general_table(columns: Mapping[str, Row], unit: Unit) -> Table:
    num_rounds = len(next(iter(columns.values()))) - 1
    table = make_number_table("task", "base", *range(1, num_rounds + 1), "change")
    for task, column in columns.items():
        table.add_row(Text(task), *map(unit.show, column), unit.show(_describe_change(column)["change"], signed=True))
    return table


def _make_metric_table(metrics: Mapping[str, tuple[ForgettingMetrics, Unit]]) -> Table:
    """A row per metric, a column per kind of score, and the first sentence of the metric's own documentation."""
    table = make_number_table("metric", *metrics)
    table.add_column("definition")
    for name, field in ForgettingMetrics.model_fields.items():
        if name != "per_task":
            signed = name not in ("op", "plasticity")
            values = (unit.show(getattr(found, name), signed) for found, unit in metrics.values())
            definition = " ".join((field.description or "").split()).partition(". ")[0].rstrip(".")
            table.add_row(name, *values, Text(definition))
    return table


def print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    """Scores by task; beside a base, what became of the questions, and the drift from it."""
    if as_json:
        print_measures(evaluation.model_dump(mode="json"))
        return
    if evaluation.tasks:
        notes = describe_ways(evaluation.tasks) + describe_cuts(evaluation.tasks)
        say(f"scores in points (0 to 100), nll in nats per token{notes}:")
        names = list(dict.fromkeys(name for score in evaluation.tasks.values() for name in score.others))
        faults = ("no model's",) if any(score.num_impossible for score in evaluation.tasks.values()) else ()
        table = make_number_table("task", "score", "lenient", *names, "nll", "questions", *faults, "seconds")
        for task, score in evaluation.tasks.items():
            shown = (POINTS.show(value) for value in (score.score, score.lenient, *map(score.others.get, names)))
            time_s = f"{evaluation.seconds[task]:.1f}"
            impossible = (str(score.num_impossible),) if faults else ()
            table.add_row(Text(task), *shown, NATS.show(score.nll), str(score.num_examples), *impossible, time_s)
        print_whole(table)
    if evaluation.base_tasks:
        title = f"before, {show_place(evaluation.base or '')}, and after"
        print_whole(make_score_table(evaluation.base_tasks, evaluation.tasks, evaluation.items, title))
    drifts = {name: drift for name, drift in (("text", evaluation.base_text), ("prompts", evaluation.prompts)) if drift}
    if drifts:
        say(f"moved from {show_place(evaluation.base or '')}, nats per token, with standard errors:")
        table = make_number_table("on", "nll of the base", "of the model", "change", "KL(base || model)", "tokens", "texts")
        for name, drift in drifts.items():
            table.add_row(
                Text(f"{name}: {drift.source}"), NATS.show(drift.base_nll), NATS.show(drift.model_nll),
                _show_mean(drift.nll_change, drift.nll_change_error), _show_mean(drift.kl, drift.kl_error),
                f"{drift.num_tokens:,}", f"{drift.num_texts:,}",
            )  # fmt: skip
        print_whole(table)


def _show_mean(mean: float, error: float | None) -> str:
    return f"{mean:+z.4f}" if error is None else f"{mean:+z.4f} ± {error:.4f}"
