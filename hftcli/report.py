"""What people see: progress on stderr, tables on stdout."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hftcli.comparison import Comparison
from hftcli.doctor import Finding
from hftcli.evaluation import Evaluation
from hftcli.forgetting import ForgettingMatrix, ForgettingMetrics, Row, TaskMetrics, compute_metrics
from hftcli.freezing.activations import Activations, Flops
from hftcli.freezing.budget import Budget, MeasuredStep, Memory
from hftcli.items import ItemChange, read_item_changes
from hftcli.recipe import ADAPTERS
from hftcli.run import (
    DELTA_NAME,
    DataReport,
    FitReport,
    MergeManifest,
    PairScores,
    Round,
    RoundResult,
    Run,
    Score,
    Verification,
)
from hftcli.run import Progress as Place
from hftcli.statistics import NATS, POINTS, Estimate, Unit

PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal
ADJUSTED_HEADINGS = ("lost, less guessing", "won, less guessing")


@contextmanager
def show_progress() -> Iterator[Callable[[Round, Place], None]]:
    """The progress of rounds."""
    with _show_bar() as show:
        yield lambda round_, place: show(place.phase, _describe_place(round_, place), place.done, place.total)


@contextmanager
def show_counts() -> Iterator[Callable[[str, int, int], None]]:
    """The progress of what has a name and a count."""
    with _show_bar() as show:
        yield lambda name, done, total: show(name, name, done, total)


@contextmanager
def _show_bar() -> Iterator[Callable[[str, str, int, int], None]]:
    """A bar on a terminal, a plain line now and then elsewhere; always on stderr.

    What it gives is called with the phase, its description, what is done, and all that there is.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(phase: str, description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total or None)

        yield show


class _PlainProgress:
    def __init__(self) -> None:
        self.phase, self.shown = "", 0.0

    def __call__(self, phase: str, description: str, done: int, total: int) -> None:
        is_last = total > 0 and done == total
        if phase == self.phase and not is_last and time.monotonic() - self.shown < PLAIN_SECONDS:
            return
        self.phase, self.shown = phase, time.monotonic()
        count = f" {done}/{total}" if total else ""
        print(f"{description}{count}", file=sys.stderr, flush=True)


def _describe_place(round_: Round, place: Place) -> str:
    loss = f", loss {place.loss:.3f}" if place.loss is not None else ""
    return f"{round_.name}: {place.phase}{loss}"


def print_run(run: Run) -> None:
    """What a finished run did: what trained, how fast, what the model knew before and after, and where it is."""
    console = Console()
    for round_ in run.rounds:
        result, scores = round_.read_result(), round_.read_scores()
        console.print(_describe_round(round_, result), highlight=False, soft_wrap=True)
        if scores is not None and scores.before:
            _print_whole(_make_score_table(scores.before, scores.after, read_item_changes(run), "what the model knew"))
        if result.pairs is not None:
            console.print(_make_pair_table(result.pairs))
    _print_end(run, console)


def print_run_json(run: Run) -> None:
    """What a run of one round did, as JSON: shares, nats per token, and the questions that were lost and won."""
    (round_,) = run.rounds
    result, scores, changes = round_.read_result(), round_.read_scores(), read_item_changes(run)
    tasks = {
        name: {
            "before": before.model_dump(),
            "after": scores.after[name].model_dump(),
            "items": asdict(changes[name]) if name in changes else None,
        }
        for name, before in scores.before.items()
    }
    print_json({"tasks": tasks, **result.model_dump(mode="json", include={"pairs", "num_steps", "train_loss", "seconds"})})


def print_continual(run: Run, matrix: ForgettingMatrix) -> None:
    """What every round trained, the forgetting matrix with its metrics, and where the last model is."""
    console = Console()
    for round_ in run.rounds:
        console.print(_describe_round(round_, round_.read_result()), highlight=False, soft_wrap=True)
    print_matrix(matrix, as_json=False)
    console.print(f"figure  {run.figures / 'forgetting.svg'}", highlight=False, soft_wrap=True)
    _print_end(run, console)


def _print_end(run: Run, console: Console) -> None:
    checkpoint = run.last_finished.checkpoint
    console.print(f"model   {checkpoint}", highlight=False, soft_wrap=True)
    if (checkpoint / DELTA_NAME).exists():
        console.print(f"whole   hft merge --delta {checkpoint} --output FOLDER", highlight=False, soft_wrap=True)
    if run.page_path.exists():
        console.print(f"page    {run.page_path}", highlight=False, soft_wrap=True)
    console.print(f"check   hft verify {run.folder}", highlight=False, soft_wrap=True)


def print_merge(manifest: MergeManifest, output: Path) -> None:
    """What a model was made of, and where it is."""
    console = Console()
    for role, identity in manifest.inputs.items():
        console.print(f"{role:<6} {identity.path}", highlight=False, soft_wrap=True)
    if manifest.plan is not None:
        plan = manifest.plan
        num_reset = plan.num_parameters - plan.num_trainable
        share = f"{num_reset / plan.num_parameters:.1%} of {plan.num_parameters:,} weights"
        console.print(f"reset  {share} are back at the base, plan {plan.short_fingerprint}", highlight=False, soft_wrap=True)
    console.print(f"model  {output}", highlight=False, soft_wrap=True)


def _describe_round(round_: Round, result: RoundResult) -> str:
    plan = round_.read_plan()
    through = "".join(f" through {name}" for name in round_.read_spec().method.names if name in ADAPTERS)
    speed = result.num_tokens / result.seconds["training"] if result.seconds["training"] else 0.0
    seconds = f"{result.seconds['training']:.1f} s ({speed:,.0f} tokens/s)"
    lines = [
        f"{round_.name}: {plan.trainable_fraction:.1%} of {plan.num_parameters:,} weights trained{through} "
        f"({plan.num_trainable_units} of {plan.num_units} units in layers), plan {plan.short_fingerprint}",
        f"{result.num_steps} steps in {result.precision}, mean loss {result.train_loss:.3f}, {seconds}, "
        f"peak memory {format_bytes(result.peak_memory_bytes)}",
        _describe_verification(result.verification),
    ]
    if result.fit is not None:
        lines.insert(1, _describe_fit(result.fit))
    return "\n".join(lines)


def _describe_fit(fit: FitReport) -> str:
    return (
        f"fit: micro-batch {fit.per_device_train_batch_size}, {_name_checkpointed(fit.checkpoint_every)} checkpointed, "
        f"{fit.loss_kernel} loss, {format_bytes(fit.needed_bytes)} of {format_bytes(fit.memory_bytes)}"
    )


def _make_score_table(
    befores: Mapping[str, Score], afters: Mapping[str, Score], changes: Mapping[str, ItemChange], title: str
) -> Table:
    """Score in points and negative log-likelihood in nats per token, before and after; what became of the questions."""
    title += ": scores in points (0 to 100), nll in nats per token"
    has_choices = any(items.adjusted for items in changes.values())
    if changes:
        title += ";\nchange with its 95 % interval; lost of those known before, won of the others; p of McNemar's exact test"
    if has_choices:
        title += ";\nless guessing: the questions lost and won, points of all, less what guessing at the choices would show"
    table = Table(title=title, title_justify="left")
    headings = ("task", "before", "after", "change", "nll before", "nll after", *(("lost", "won", "p") if changes else ()))
    for heading in (*headings, *(ADJUSTED_HEADINGS if has_choices else ())):
        table.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=heading == "task")
    for name, before in befores.items():
        after, items = afters[name], changes.get(name)
        change = "" if None in (before.score, after.score) else POINTS.show(after.score - before.score, signed=True)
        if items and items.change.low is not None:
            change += f" ({POINTS.show(items.change.low, True)} to {POINTS.show(items.change.high, True)})"
        table.add_row(
            name, POINTS.show(before.score), POINTS.show(after.score), change, NATS.show(before.nll), NATS.show(after.nll),
            *(describe_transitions(items) if changes else ()), *(describe_adjusted(items) if has_choices else ()),
        )  # fmt: skip
    return table


def describe_transitions(items: ItemChange | None) -> tuple[str, ...]:
    """Questions lost of those known, won of the others, and McNemar's p; empty where scores have degrees."""
    if items is None or items.transitions is None:
        return "", "", ""
    moved = items.transitions
    p_value = "< 0.001" if items.p_value < 0.001 else f"{items.p_value:.3f}"
    return f"{moved.num_lost} of {moved.num_known}", f"{moved.num_won} of {moved.num_items - moved.num_known}", p_value


def describe_adjusted(items: ItemChange | None) -> tuple[str, str]:
    """Questions lost and won in points of all, less what guessing would show; empty where there are no choices."""
    if items is None or items.adjusted is None:
        return "", ""
    return POINTS.show(items.adjusted.lost), POINTS.show(items.adjusted.won)


def _make_pair_table(scores: PairScores) -> Table:
    """What became of held-out preference pairs, shares in points."""
    table = Table("", "before", "after", title=f"{scores.before.num_pairs} held-out pairs", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in describe_pairs(scores):
        table.add_row(*row)
    return table


def describe_pairs(scores: PairScores) -> list[tuple[str, str, str]]:
    """Rows of a table: what was measured of held-out pairs, before and after."""
    rows = (
        (
            "reward accuracy, points",
            lambda score: f"{100 * score.reward_accuracy:.1f} ± {100 * score.reward_accuracy_error:.1f}",
        ),
        ("reward margin", lambda score: f"{score.reward_margin:.3f}"),
        ("chosen likelier, points", lambda score: f"{100 * score.likelihood_accuracy:.1f}"),
        ("KL to the reference, nats/token", lambda score: f"{score.kl:.4f}"),
    )
    return [(name, show(scores.before), show(scores.after)) for name, show in rows]


def print_plan(budget: Budget, checked: tuple[Budget, MeasuredStep] | None, as_json: bool) -> None:
    """Units and parameters per role, and memory per device and FLOPs per token beside full fine-tuning.

    Args:
        checked: a measurement and the budget that it belongs to, where one was made.
    """
    plan = budget.plan
    if as_json:
        print_json(
            {
                "num_parameters": plan.num_parameters,
                "num_trainable": plan.num_trainable,
                "trainable_fraction": plan.trainable_fraction,
                "num_units": plan.num_units,
                "num_trainable_units": plan.num_trainable_units,
                "roles": {name: count.model_dump() for name, count in plan.roles.items()},
                "fingerprint": plan.fingerprint,
                "memory": {
                    "precision": budget.precision,
                    "num_processes": budget.num_processes,
                    "zero_stage": budget.zero_stage,
                    "work": budget.work and asdict(budget.work),
                    "half": _memory_parts(budget.half),
                    "full": _memory_parts(budget.full),
                },
                "flops_per_token": {"half": _flops_parts(budget.half_step), "full": _flops_parts(budget.full_step)},
                "measured": checked and asdict(checked[1]),
            }
        )
        return
    console = Console()
    console.print(
        f"{plan.num_parameters:,} parameters; {plan.num_trainable:,} train ({plan.trainable_fraction:.1%}); "
        f"{plan.num_trainable_units} of {plan.num_units} units in layers; round {plan.round_index}, "
        f"plan {plan.short_fingerprint}",
        highlight=False,
        soft_wrap=True,
    )
    roles = Table("role", "units", "train", "parameters", "train", "share")
    for name, count in plan.roles.items():
        roles.add_row(
            name, f"{count.num_units}", f"{count.num_trainable_units}", f"{count.num_parameters:,}",
            f"{count.num_trainable:,}", f"{count.num_trainable / count.num_parameters:.1%}",
        )  # fmt: skip
    console.print(roles)
    stage = f"ZeRO {budget.zero_stage} on {budget.num_processes} devices" if budget.num_processes > 1 else "one device"
    precision = "bfloat16 with float32 masters" if budget.precision == "mixed" else "float32"
    work = budget.work
    console.print(
        f"{work.num_sequences} sequences of {work.length} tokens at once{', packed' if work.packed else ''}, "
        f"{work.attention} attention, {_name_checkpointed(work.checkpoint_every)} checkpointed, {work.loss} loss",
        highlight=False,
        soft_wrap=True,
    )
    memory = Table("per device", "this plan", "full fine-tuning", "ratio", title=f"{precision}, {stage}", title_justify="left")
    full_parts = _memory_parts(budget.full)
    for name, half in _memory_parts(budget.half).items():
        full = full_parts[name]
        if full:  # there may be no reference
            memory.add_row(MEMORY_ROWS[name], format_bytes(half), format_bytes(full), f"{half / full:.3f}")
    console.print(memory)
    if budget.half_step is None:
        console.print(
            f"Activations of {budget.network.model_type} are not counted and come on top; --measure shows them.",
            highlight=False,
        )
    else:
        console.print(_make_flops_table(_flops_parts(budget.half_step), _flops_parts(budget.full_step)))
    if checked is not None:
        console.print(_make_measurement_table(*checked))


def _name_checkpointed(every: int | None) -> str:
    return {None: "no layer", 1: "every layer"}.get(every, f"one layer in {every}")


def _make_flops_table(half: dict[str, float], full: dict[str, float]) -> Table:
    table = Table("MFLOP per token", "this plan", "full fine-tuning", "ratio")
    for name, value in half.items():
        ratio = f"{value / full[name]:.3f}" if full[name] else ""
        table.add_row(name.replace("_", " "), f"{value / 1e6:,.1f}", f"{full[name] / 1e6:,.1f}", ratio)
    return table


def _make_measurement_table(budget: Budget, measured: MeasuredStep) -> Table:
    """A measurement on this machine beside the budget of the same, before its correction."""
    title = f"one process on this machine, in {budget.work.arithmetic}, a step of {measured.step_s:.2f} s"
    table = Table("", "estimated", "measured", "ratio", title=title, title_justify="left")
    memory = budget.half
    rows = {
        "weights": (memory.weights_bytes, measured.weights_bytes),
        "gradients": (memory.gradients_bytes, measured.gradients_bytes),
        "optimizer": (memory.optimizer_bytes, measured.optimizer_bytes),
    }
    if budget.half_step is not None:
        activations, _ = budget.half_step
        rows["kept after the forward pass"] = (activations.saved_bytes + activations.cast_bytes, measured.activations_bytes)
        if measured.peak_bytes is not None:
            rows["in all"] = (memory.total_bytes, measured.peak_bytes)
    else:
        table.add_row("kept after the forward pass", "", format_bytes(measured.activations_bytes), "")
    for name, (estimated, found) in rows.items():
        table.add_row(name, format_bytes(estimated), format_bytes(found), f"{found / estimated:.3f}")
    return table


MEMORY_ROWS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "reference_bytes": "reference",
    "activations_bytes": "activations",
    "buffers_bytes": "buffers",
    "low_bytes": "in all, low",
    "total_bytes": "in all, expected",
    "high_bytes": "in all, high",
}


def _memory_parts(memory: Memory) -> dict[str, int]:
    return {name: getattr(memory, name) for name in MEMORY_ROWS}


def _flops_parts(step: tuple[Activations, Flops] | None) -> dict[str, float] | None:
    """By kind; None where they are not counted."""
    return step and {**asdict(step[1]), "total": step[1].total}


def print_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """What the doctor found, a line each, with its fix below."""
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    console = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        console.print(
            Text.assemble((f"{finding.status:8}", styles[finding.status]), f"{finding.check:{width}}  {finding.message}")
        )
        if finding.fix:
            console.print(Text(f"{'':8}{'':{width}}  fix: {finding.fix}"))


def print_data(summary: DataReport, samples: Mapping[str, list[tuple[str, bool]]], as_json: bool) -> None:
    """Counts, lengths, and one sequence, or one pair's two, with the trained tokens in colour."""
    if as_json:
        shown = {name: [{"text": t, "trained": b} for t, b in pieces] for name, pieces in samples.items()}
        print_json({**summary.model_dump(mode="json"), **shown})
        return
    console = Console()
    table = Table(show_header=False)
    lengths = ", ".join(f"{name} {value:,}" for name, value in summary.length_percentiles.items())
    for name, value in (
        ("format", summary.format),
        ("rows", f"{summary.num_rows:,}; used {summary.num_used:,}, dropped {summary.num_dropped:,}, "
                 f"cut {summary.num_truncated:,}" + (f", made the same by the cut {summary.num_identical:,}"
                                                     if summary.num_identical else "")),
        ("sequences", f"{summary.num_sequences:,}"),
        ("tokens", f"{summary.num_tokens:,}; trained {summary.num_trained_tokens:,} "
                   f"({summary.num_trained_tokens / summary.num_tokens:.1%})"),
        ("row lengths", lengths),
        ("cache key", summary.key[:12]),
    ):  # fmt: skip
        table.add_row(name, value)
    console.print(table)
    marks = "trained in green" if console.color_system else "trained between ⟦ ⟧"
    for name, pieces in samples.items():
        console.print(f"first {name}, {marks}:", highlight=False)
        text = Text()
        for part, trained in pieces:
            text.append(part, style="bold green" if trained else "dim")
        console.print(text if console.color_system else "".join(f"⟦{t}⟧" if b else t for t, b in pieces), markup=False)


def print_verification(found: Mapping[str, Verification], as_json: bool) -> None:
    if as_json:
        total = {
            "num_frozen": sum(item.num_frozen for item in found.values()),
            "num_trained": sum(item.num_trained for item in found.values()),
            "violations": [f"{name}: {item}" for name, one in found.items() for item in one.violations],
            "unmoved": [f"{name}: {item}" for name, one in found.items() for item in one.unmoved],
            "damaged": [f"{name}: {item}" for name, one in found.items() for item in one.damaged],
            "rounds": {name: item.model_dump(mode="json") for name, item in found.items()},
        }
        print_json(total)
        return
    console = Console()
    for name, verification in found.items():
        console.print(f"{name}: {_describe_verification(verification)}", highlight=False, soft_wrap=True)
        for parameter in verification.violations:
            console.print(f"  frozen, but moved: {parameter}", highlight=False, soft_wrap=True)
        for parameter in verification.unmoved:
            console.print(f"  trained, but did not move: {parameter}", highlight=False, soft_wrap=True)
        for damage in verification.damaged:
            console.print(f"  damaged: checkpoint/{damage}", highlight=False, soft_wrap=True)


def _describe_verification(verification: Verification) -> str:
    same = verification.num_frozen - len(verification.violations)
    moved = verification.num_trained - len(verification.unmoved) - len(verification.below_resolution)
    rounded = len(verification.below_resolution)
    note = f" ({rounded} more moved by less than the checkpoint's data type holds)" if rounded else ""
    return (
        f"{'verified' if verification.passed else 'NOT VERIFIED'}: {same} of {verification.num_frozen} frozen parameters "
        f"bit-identical to the start, {moved} of {verification.num_trained} trained ones moved{note}"
    )


def print_matrix(matrix: ForgettingMatrix, as_json: bool) -> None:
    """The scores after every round, what each task gained and lost, and the metrics with their definitions."""
    kinds = _list_kinds(matrix)
    metrics = {name: compute_metrics(matrix.tasks, rows, unit is NATS) for name, rows, unit in kinds}
    if as_json:
        others = {name: metrics[name].model_dump() if name in metrics else None for name in ("lenient", "nll")}
        general = {
            name: {task: _describe_change(column) for task, column in columns.items()}
            for name, columns in (("general", matrix.general), ("general_nll", matrix.general_nll))
        }
        rounds = {"num_rounds": matrix.num_rounds, "is_finished": matrix.is_finished}
        print_json({**rounds, **metrics["strict"].model_dump(), **others, **general})
        return
    console = Console()
    for name, rows, unit in kinds:
        if name == "lenient" and rows == matrix.scores:
            console.print("lenient scores: the same", highlight=False)
            continue
        console.print(f"{name} scores, {unit.note}; bold after its own round, dim before it:", highlight=False, soft_wrap=True)
        _print_whole(_make_matrix_table(matrix, rows, unit))
        _print_whole(_make_task_table(metrics[name].per_task, unit))
    for name, columns, unit in (("general", matrix.general, POINTS), ("general nll", matrix.general_nll, NATS)):
        if columns:
            console.print(f"{name}, tasks that are never trained, {unit.note}:", highlight=False, soft_wrap=True)
            _print_whole(_make_general_table(columns, unit))
    console.print(_make_metric_table({name: (metrics[name], unit) for name, _, unit in kinds}))
    console.print(
        "R[t][i] is the score on task i after round t of T; row 0 is the base model's. "
        "bwt and fwt are gains, forgetting is a loss, for nll too.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if not matrix.is_finished:
        console.print(
            f"{matrix.num_rounds} of {len(matrix.tasks)} rounds are there: what needs the last row is left blank. "
            "Row 0 is the base model's; where it was not scored, it is a row of nulls.",
            highlight=False,
            soft_wrap=True,
        )


def print_comparison(comparison: Comparison, as_json: bool) -> None:
    """A row per setting with its means and 95 % intervals over the seeds, and every two methods at equal learning."""
    if as_json:
        print_json(describe_comparison(comparison))
        return
    console = Console()
    console.print(f"learning   mean gain on {', '.join(comparison.learned)}", highlight=False, soft_wrap=True)
    console.print(f"forgetting mean loss on {', '.join(comparison.known)}", highlight=False, soft_wrap=True)
    table = _make_number_table("method", "learning rate", "seeds", "learning", "forgetting", "")
    unit = comparison.unit
    table.title = f"{unit.name}, means over seeds with 95 % intervals; * on the frontier"
    table.title_justify = "left"
    for method in comparison.methods:
        for index, setting in enumerate(method.settings):
            table.add_row(
                Text(method.name), f"{setting.learning_rate:g}", f"{len(setting.points)}",
                *(_show_estimate(estimate, unit) for estimate in (setting.learning, setting.forgetting)),
                "*" if index in method.frontier else "",
            )  # fmt: skip
    _print_whole(table)
    for difference in comparison.differences:
        console.print(difference.sentence, highlight=False, soft_wrap=True)


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON has it; gains, losses and differences are shares, or nats per token."""
    return {
        "by": comparison.by,
        "learned": comparison.learned,
        "known": comparison.known,
        "methods": {
            method.name: [
                {
                    "learning_rate": setting.learning_rate,
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


def _show_estimate(estimate: Estimate, unit: Unit) -> str:
    if estimate.low is None:
        return unit.show(estimate.mean)
    return f"{unit.show(estimate.mean)} ± {unit.show(estimate.high - estimate.mean)}"


def _list_kinds(matrix: ForgettingMatrix) -> list[tuple[str, tuple[Row, ...], Unit]]:
    kinds = (("strict", matrix.scores, POINTS), ("lenient", matrix.lenient, POINTS), ("nll", matrix.nll, NATS))
    return [(name, rows, unit) for name, rows, unit in kinds if rows is not None]


def _describe_change(column: Row) -> dict[str, float | None]:
    base, last = column[0], column[-1]
    return {"base": base, "last": last, "change": None if base is None or last is None else last - base}


def _make_matrix_table(matrix: ForgettingMatrix, rows: tuple[Row, ...], unit: Unit) -> Table:
    """Columns are numbered, since the names of eight tasks do not fit side by side; the rows tell the numbers."""
    table = _make_number_table("after", *range(1, len(matrix.tasks) + 1))
    for t, (name, row) in enumerate(zip(matrix.row_names, rows, strict=True)):
        styles = ("bold" if i + 1 == t else "dim" if i + 1 > t else "" for i in range(len(row)))
        cells = (Text(unit.show(score), style=style) for score, style in zip(row, styles, strict=True))
        table.add_row(Text(f"{t}  {name}"), *cells)
    return table


def _make_task_table(per_task: Mapping[str, TaskMetrics], unit: Unit) -> Table:
    table = _make_number_table("task", "learned", "final", "bwt", "forgetting", "fwt")
    for index, (task, part) in enumerate(per_task.items(), start=1):
        changes = (unit.show(change, signed=True) for change in (part.bwt, part.forgetting, part.fwt))
        table.add_row(Text(f"{index}  {task}"), unit.show(part.learned), unit.show(part.final), *changes)
    return table


def _make_general_table(columns: Mapping[str, Row], unit: Unit) -> Table:
    num_rounds = len(next(iter(columns.values()))) - 1
    table = _make_number_table("task", "base", *range(1, num_rounds + 1), "change")
    for task, column in columns.items():
        table.add_row(Text(task), *map(unit.show, column), unit.show(_describe_change(column)["change"], signed=True))
    return table


def _make_metric_table(metrics: Mapping[str, tuple[ForgettingMetrics, Unit]]) -> Table:
    """A row per metric, a column per kind of score, and the first sentence of the metric's own documentation."""
    table = _make_number_table("metric", *metrics)
    table.add_column("definition")
    for name, field in ForgettingMetrics.model_fields.items():
        if name != "per_task":
            signed = name not in ("op", "plasticity")
            values = (unit.show(getattr(found, name), signed) for found, unit in metrics.values())
            definition = " ".join(field.description.split()).partition(". ")[0].rstrip(".")
            table.add_row(name, *values, Text(definition))
    return table


def _make_number_table(first: str, *headings: object) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(str(heading), justify="right", no_wrap=True)
    return table


def _print_whole(table: Table) -> None:
    """Print a table as wide as it is: a number that is cut to the console's width would be another number."""
    console = Console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum)
    console.print(table)


def print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    """Scores by task; beside a base, what became of the questions, and the drift from it."""
    if as_json:
        print_json(evaluation.model_dump(mode="json"))
        return
    if evaluation.tasks:
        print("scores in points (0 to 100), nll in nats per token:")
        names = list(dict.fromkeys(name for score in evaluation.tasks.values() for name in score.others))
        table = _make_number_table("task", "score", "lenient", *names, "nll", "questions", "seconds")
        for task, score in evaluation.tasks.items():
            shown = (POINTS.show(value) for value in (score.score, score.lenient, *map(score.others.get, names)))
            time_s = f"{evaluation.seconds[task]:.1f}"
            table.add_row(Text(task), *shown, NATS.show(score.nll), str(score.num_examples), time_s)
        _print_whole(table)
    if evaluation.base_tasks:
        title = f"before, {evaluation.base}, and after"
        _print_whole(_make_score_table(evaluation.base_tasks, evaluation.tasks, evaluation.items, title))
    drifts = {name: drift for name, drift in (("text", evaluation.base_text), ("prompts", evaluation.prompts)) if drift}
    if drifts:
        print(f"moved from {evaluation.base}, nats per token, with standard errors:")
        table = _make_number_table("on", "nll of the base", "of the model", "change", "KL(base || model)", "tokens", "texts")
        for name, drift in drifts.items():
            table.add_row(
                Text(f"{name}: {drift.source}"), NATS.show(drift.base_nll), NATS.show(drift.model_nll),
                _show_mean(drift.nll_change, drift.nll_change_error), _show_mean(drift.kl, drift.kl_error),
                f"{drift.num_tokens:,}", f"{drift.num_texts:,}",
            )  # fmt: skip
        _print_whole(table)


def _show_mean(mean: float, error: float | None) -> str:
    return f"{mean:+z.4f}" if error is None else f"{mean:+z.4f} ± {error:.4f}"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
