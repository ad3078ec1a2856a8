"""A finished run on the terminal: what each round trained, what the model knew before and after, what was verified."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import fmean

from rich.table import Table

from hftcli import PACKAGE
from hftcli.comparing.answers import read_answers
from hftcli.comparing.forgetting import ForgettingMatrix
from hftcli.comparing.items import read_item_changes
from hftcli.recipe.sections import QUICK_START
from hftcli.reporting.answers import describe_traits, print_behaviour
from hftcli.reporting.card import takes_turns
from hftcli.reporting.energy import describe_earlier
from hftcli.reporting.headline import show_accuracy
from hftcli.reporting.lines import say
from hftcli.reporting.measures import make_score_table, print_matrix
from hftcli.reporting.places import name_hft, show_place
from hftcli.reporting.plans import name_checkpointed
from hftcli.reporting.rounding import describe_masters
from hftcli.reporting.terminal import format_bytes, print_json, print_measures, print_whole
from hftcli.runs.made import DELTA_NAME
from hftcli.runs.records import AnswerEnds, FitReport, RoundResult
from hftcli.runs.run import Round, Run, find_rounds
from hftcli.runs.scores import PairScore, PairScores
from hftcli.runs.verification import Verification

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48  # bars of a loss curve, so that a line of a narrow terminal holds it
# What a verification names, and how that is said.
FAULTS = {
    "violations": "frozen, but moved: ",
    "changed_extras": "no parameter, but changed: ",
    "retyped": "stored in another data type: ",
    "lost": "in the start's files, and not in the checkpoint's: ",
    "moved_in_memory": "frozen, but moved in memory while training: ",
    "leaked": "trained in directions, but moved in others: ",
    "moved_columns": "trained in columns, but moved in frozen ones: ",
    "moved_entries": "trained in entries, but moved in frozen ones: ",
    "unmoved": "trained, but did not move: ",
    "damaged": "damaged: checkpoint/",
    "damaged_parts": "damaged: ",
    "unlike_masters": "not the rounding of the float32 masters: ",
}


def print_run(run: Run) -> None:
    """What a finished run did: what trained, how fast, what the model knew before and after, and where it is."""
    for round_ in run.rounds:
        result, scores = round_.read_result(), round_.read_scores()
        say(_describe_round(round_, result))
        if scores.before:
            print_whole(make_score_table(scores.before, scores.after, read_item_changes(run), "what the model knew"))
        if result.pairs is not None:
            print_whole(_make_pair_table(result.pairs))
    _print_end(run)


def print_run_json(run: Run) -> None:
    """What a run of one round did, as JSON: whether it was verified, shares, nats per token, and the questions lost and won."""
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
    told = {"pairs", "num_steps", "stopped_by", "kept_step", "train_loss", "seconds"}
    print_measures({"verified": not run.unverified, "tasks": tasks, **result.model_dump(mode="json", include=told)})


def print_continual(run: Run, matrix: ForgettingMatrix) -> None:
    """What every round trained, the forgetting matrix with its metrics, and where the last model is."""
    for round_ in run.rounds:
        say(_describe_round(round_, round_.read_result()))
    print_matrix(matrix, as_json=False)
    say(f"figure  {show_place(run.figures / 'forgetting.svg')}")
    _print_end(run)


def _print_end(run: Run) -> None:
    print_behaviour(describe_traits(read_answers(run)))
    checkpoint, folder = find_rounds(run.folder)[-1].checkpoint, show_place(run.folder)
    say(f"model   {show_place(checkpoint)}")
    if (checkpoint / DELTA_NAME).exists():
        say(f"whole   {name_hft()} merge --delta {show_place(checkpoint)} --output FOLDER")
    hft = name_hft()
    talk = f"{hft} chat {folder} --beside start" if takes_turns(checkpoint) else f"{hft} generate {folder} --prompts -"
    say(f"talk    {talk}")
    if run.page_path.exists():
        say(f"page    {show_place(run.page_path)}")
    say(f"check   {hft} verify {folder}")
    if run.rounds[0].read_spec().model.path == str(PACKAGE / QUICK_START / "model"):
        say(f"yours   {hft} init --model MODEL --data ROWS")


def _describe_round(round_: Round, result: RoundResult) -> str:
    plan = round_.read_plan()
    speed, seconds = find_speed(result), f"{result.seconds['training']:.1f} s"
    if result.resumed_from is not None:
        seconds += f" from step {result.resumed_from}"
    elif speed is not None:
        seconds += f" ({speed:,.0f} tokens/s)"
    share = f"{plan.trainable_fraction:.1%} of {plan.num_parameters:,} weights trained"
    if (adapter := result.adapter) is not None:
        share = (
            f"{adapter.num_weights:,} weights of {adapter.name} trained ({format_bytes(adapter.num_bytes)}, "
            f"{adapter.num_weights / plan.num_parameters:.2%} of the model's {plan.num_parameters:,})"
        )
    lines = [
        f"{round_.name}: {share} "
        f"({plan.num_trainable_units} of {plan.num_units} units in layers), plan {plan.short_fingerprint}",
        f"{result.num_steps} steps in {result.precision}, mean loss {result.train_loss:.3f}, {seconds}, "
        f"peak memory {format_bytes(result.peak_memory_bytes)}{result.ending}",
        *([curve] if (curve := draw_losses(round_)) else []),
        _describe_verification(result.verification),
    ]
    if result.masters is not None:
        lines.extend(describe_masters(result.masters))
    if result.earlier is not None:
        lines.append(describe_earlier(result.earlier))
    if result.ends is not None:
        lines.append(_describe_ends(result.ends))
    if result.fit is not None:
        lines.insert(1, _describe_fit(result.fit))
    return "\n".join(lines)


def find_speed(result: RoundResult) -> float | None:
    """Tokens per second of training; None after a resume, of which the seconds are those of the last start alone."""
    seconds = result.seconds["training"]
    return result.num_tokens / seconds if seconds and result.resumed_from is None else None


def draw_losses(round_: Round) -> str:
    """The loss over a round's steps as a line of bars, from its first to its last value; empty where no step was logged."""
    rows = round_.read_metrics() if round_.metrics_path.exists() else []
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float) and math.isfinite(row["loss"])]
    if len(losses) < 2:
        return ""
    size = math.ceil(len(losses) / CURVE_WIDTH)
    means = [fmean(losses[start : start + size]) for start in range(0, len(losses), size)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[0] for mean in means)
    return f"loss {losses[0]:.3f} {bars} {losses[-1]:.3f}"


def _describe_fit(fit: FitReport) -> str:
    return (
        f"fit: micro-batch {fit.per_device_train_batch_size}, {name_checkpointed(fit.checkpoint_every)} checkpointed, "
        f"{fit.loss_kernel} loss, {format_bytes(fit.needed_bytes)} of {format_bytes(fit.memory_bytes)}"
    )


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
    rows: tuple[tuple[str, Callable[[PairScore], str]], ...] = (
        ("reward accuracy, points (95 % interval)", show_accuracy),
        ("reward margin", lambda score: f"{score.reward_margin:.3f}"),
        ("chosen likelier, points", lambda score: f"{100 * score.likelihood_accuracy:.1f}"),
        ("KL to the reference on the data's answers, nats/token", lambda score: f"{score.kl:.4f}"),
    )
    return [(name, show(scores.before), show(scores.after)) for name, show in rows]


def print_verification(found: Mapping[str, Verification], as_json: bool) -> None:
    """By round, what the comparison with its start found, and the name of everything that failed."""
    if as_json:
        total = {
            "num_frozen": sum(item.num_frozen for item in found.values()),
            "num_trained": sum(item.num_trained for item in found.values()),
            **{kind: [f"{name}: {item}" for name, one in found.items() for item in getattr(one, kind)] for kind in FAULTS},
            "rounds": {name: item.model_dump(mode="json") for name, item in found.items()},
        }
        print_json(total)
        return
    for name, verification in found.items():
        say(f"{name}: {_describe_verification(verification)}")
        for kind, said in FAULTS.items():
            for item in getattr(verification, kind):
                say(f"  {said}{item}")


def _describe_verification(verification: Verification) -> str:
    if verification.damage and not verification.num_trained:
        return "NOT VERIFIED: damaged files, with which nothing can be compared"
    same = verification.num_frozen - len(verification.violations)
    still = (*verification.unmoved, *verification.below_resolution, *verification.rankless)
    moved = verification.num_trained - len(still)
    rounded = len(verification.below_resolution)
    note = f" ({rounded} more moved by less than the checkpoint's data type holds)" if rounded else ""
    if verification.rankless:
        note += f" ({len(verification.rankless)} were left no rank)"
    if verification.num_extras:
        carried = verification.num_extras - len(verification.changed_extras)
        note += f", {carried} of {verification.num_extras} stored tensors that are no parameters carried along"
    if verification.num_masters:
        note += f", the rounding of {verification.num_masters} float32 masters"
    if verification.closed_change:
        note += f"; {len(verification.closed_change)} moved in their open directions alone, " + describe_leak(verification)
    if verification.closed_reading:
        largest = max(verification.closed_reading.values())
        note += f"; {len(verification.closed_reading)} adapters read in these alone, but for at most {largest:.1e} of their A"
    if verification.num_frozen_columns:
        note += f"; {verification.num_frozen_columns:,} frozen columns compared bit for bit"
    if verification.num_frozen_entries:
        note += f"; {verification.num_frozen_entries:,} frozen entries compared bit for bit"
    return (
        f"{'verified' if verification.passed else 'NOT VERIFIED'}: {same} of {verification.num_frozen} frozen parameters "
        f"bit-identical to {verification.start}, {moved} of {verification.num_trained} trained ones moved{note}"
    )


def describe_leak(verification: Verification) -> str:
    """What of the change of matrices that trained in directions lies in the closed ones."""
    largest = max(verification.closed_change.values())
    cause = "where rounding explains it" if not verification.leaked else "which rounding does not explain"
    return f"but for at most {largest:.1e} of the change, {cause}"


def _describe_ends(ends: AnswerEnds) -> str:
    if not ends.trained:
        return "ends: no token that ends an answer was trained"
    trained = ", ".join(f"{token} ({number})" for token, number in zip(ends.trained, ends.trained_ids, strict=True))
    note = " as in the start"
    if ends.added_ids:
        note = f", with {', '.join(map(str, ends.added_ids))} added to the start's"
    return (
        f"ends: answers were trained to end with {trained}; generation stops at {', '.join(map(str, ends.eos_token_ids))}{note}"
    )
