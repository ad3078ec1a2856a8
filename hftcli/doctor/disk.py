"""Free disk against what a run leaves there: checkpoints, float32 masters, and step checkpoints until it is done."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from hftcli.doctor.doctor import MAX_FILLED_FRACTION, Finding, find_existing
from hftcli.freezing.budget import Budget
from hftcli.freezing.redrawing import plan_draws, try_draws
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe.recipe import Recipe
from hftcli.runs.files import read_model
from hftcli.runs.made import DELTA_NAME, DeltaRecord
from hftcli.runs.run import Round


def foresee_disk(
    recipe: Recipe, start: Path, budget: Budget, num_ranks: int, num_rounds: int, draws: Sequence[frozenset[str]] = ()
) -> Finding:
    """`check_disk` of a round that has a budget.

    Args:
        budget: of what a device holds at once.
        draws: of `freeze.redraw`, those of the round; where its steps are not known, some stand for them.
    """
    plan, rule, units = budget.plan, recipe.freeze, budget.network.units
    num_at_once = None
    if rule.redraw is not None:
        num_at_once = plan.num_trainable
        plan = plan_draws(units, rule, plan.round_index, draws or try_draws(units, rule, plan.round_index))
    return check_disk(recipe, start, plan, num_ranks, num_rounds, budget.num_adapter_weights, num_at_once)


def check_disk(
    recipe: Recipe,
    start: Path,
    plan: FreezePlan,
    num_ranks: int,
    num_rounds: int,
    num_adapter_weights: int = 0,
    num_at_once: int | None = None,
) -> Finding:
    """Free disk where the run goes, against what it leaves and what it needs besides until it is done.

    Args:
        start: the start's folder; a hub id is none.
        plan: the next round's, which stands for all: other rounds train about as much. With `freeze.redraw`, of all its draws.
        num_rounds: rounds of the run, each of which leaves a checkpoint.
        num_adapter_weights: those that train in place of the plan's; 0 where there are no adapters.
        num_at_once: weights of the largest draw; None where all of the plan train at once.
    """
    folder = find_existing(recipe.folder)
    if not os.access(folder, os.W_OK):
        return Finding("disk", "fault", f"{folder} cannot be written", "give another --output")
    fisher = num_rounds * 4 * plan.num_parameters if recipe.method.ewc is not None else 0
    kept = num_rounds * (count_checkpoint_bytes(recipe, start, plan) + count_earlier_bytes(plan)) + fisher
    masters, earlier_masters = count_masters_bytes(recipe, start, plan, num_rounds)
    passing = count_step_bytes(recipe, plan, num_ranks, num_adapter_weights, num_at_once) + earlier_masters
    parts = {"float32 masters": masters, "method.ewc's Fisher information": fisher}
    return judge_disk(folder, shutil.disk_usage(folder).free, kept + masters, passing, parts, name_uncounted(recipe))


def count_checkpoint_bytes(recipe: Recipe, start: Path, plan: FreezePlan) -> int:
    """Bytes of what a round leaves: as many as the start has, or by the recipe's data type; of an unseen start, at most."""
    dtype, num_bytes = find_dtype(recipe, start), count_file_bytes(start)
    if dtype is not None or not num_bytes:
        num_bytes = plan.num_parameters * (2 if dtype in ("bfloat16", "float16") else 4)
    return math.ceil(num_bytes * plan.num_moving / plan.num_parameters) if recipe.checkpoint.format == "delta" else num_bytes


def count_earlier_bytes(plan: FreezePlan) -> int:
    """Bytes of the open parts of matrices that a round leaves, and of the moments of what its matrices read, in float32.

    The moments of what other matrices alone read come on top: of the heads' output and the mlp's inner activations, in layers
    where the matrix that reads them is not drawn.
    """
    spaces = {part.input: part for part in (plan.directions or {}).values()}.values()
    inputs = {part.input: part for part in (plan.columns or {}).values()}.values()
    choices = {part.choice: part for part in (plan.columns or {}).values()}.values()
    return (
        4 * sum(part.num_blocks * part.width * (part.width + part.num_open) for part in spaces)
        + 4 * sum(part.num_inputs for part in inputs)
        + 8 * sum(part.num_columns for part in choices)
        + sum(part.index_bytes for part in (plan.entries or {}).values())
    )


def count_masters_bytes(recipe: Recipe, start: Path, plan: FreezePlan, num_rounds: int) -> tuple[int, int]:
    """Most bytes of the float32 masters beside the last round's checkpoint, and beside the one before while it is written.

    Checkpoints in float32 have none. Of an unseen start, they may be in 16 bits.
    """
    dtype, num_bytes, whole = find_dtype(recipe, start), count_file_bytes(start), 4 * plan.num_parameters
    if dtype == "float32" or (dtype is None and num_bytes >= whole):
        return 0, 0
    beside = Round(start.parent).masters_path
    carried = beside.stat().st_size if beside.exists() else 0
    last, before = (min(carried + number * 4 * plan.num_moving, whole) for number in (num_rounds, num_rounds - 1))
    return last, before if num_rounds > 1 else 0


def find_dtype(recipe: Recipe, start: Path) -> str | None:
    """The data type that a round's checkpoint has throughout; None where it is that of the start's files."""
    if recipe.model.dtype is None and (start / DELTA_NAME).exists():
        return read_model(start / DELTA_NAME, DeltaRecord).dtype
    return recipe.model.dtype


def count_file_bytes(start: Path) -> int:
    """Bytes of a start's weights; 0 of one that is not seen."""
    return sum(file.stat().st_size for file in start.glob("*.safetensors"))


def count_step_bytes(
    recipe: Recipe, plan: FreezePlan, num_ranks: int, num_adapter_weights: int = 0, num_at_once: int | None = None
) -> int:
    """Most bytes of a round's step checkpoints at a time: those kept, and the one being written.

    Each holds for every trained weight a float32 master and two moments; under DeepSpeed, what the ranks compute with too; and
    what else has to be remembered of it. Of what is drawn anew within the round, it has all masters, and the moments of what
    trains at once, or with `freeze.redraw.states: keep` of all.

    Args:
        num_adapter_weights, num_at_once: see `check_disk`.
    """
    if not recipe.checkpoint.is_on:
        return 0
    redraw, num_trained = recipe.freeze.redraw, num_adapter_weights or plan.num_trainable
    num_moments = num_trained if num_at_once is None or (redraw is not None and redraw.states == "keep") else num_at_once
    weight_bytes = (4 if num_ranks == 1 else 8) + count_remembered_bytes(recipe, num_ranks)
    num_bytes = num_trained * weight_bytes + 8 * num_moments
    if recipe.freeze.choice == "spiel":  # each entry's place and age, and a candidate's place and three numbers
        num_bytes += num_ranks * sum(3 * part.index_bytes for part in (plan.entries or {}).values())
    return (recipe.checkpoint.keep + 1) * num_bytes


def count_remembered_bytes(recipe: Recipe, num_ranks: int) -> int:
    """Most bytes, for every trained weight, that a step checkpoint has besides, in float32.

    The best step so far, the start that `freeze.pull` pulls to, the mean of `freeze.average`, with `dynamic` a gradient, and
    Proximal SFT's copy, which each rank writes whole.
    """
    rule, tokens = recipe.freeze, recipe.method.token_weights
    goes_back = recipe.checkpoint.best is not None or recipe.stop.max_forgetting is not None
    num_averaged = 0 if rule.average is None else 2 if rule.average == "dynamic" else 1
    renews = tokens is not None and tokens.kind == "psft" and tokens.snapshot_steps is not None
    return 4 * (goes_back + (rule.pull is not None) + num_averaged + renews * num_ranks)


def name_uncounted(recipe: Recipe) -> str:
    """What else step checkpoints have, in words, which grows with the rows; empty where that is little."""
    anchor = recipe.method.anchor
    if anchor is None or anchor.top_k is None or not recipe.checkpoint.is_on:
        return ""
    return f"method.anchor.top_k's {8 * anchor.top_k} bytes for each trained token, once for each rank"


def judge_disk(
    folder: Path,
    free_bytes: int,
    kept_bytes: int,
    passing_bytes: int,
    parts: Mapping[str, int] = MappingProxyType({}),
    uncounted: str = "",
) -> Finding:
    """Compare what is free with what a run needs.

    Args:
        kept_bytes: what the run leaves.
        passing_bytes: what it needs besides until it is done.
        parts: of what it leaves, the bytes of what is no checkpoint, by what it is.
        uncounted: what of its step checkpoints is not counted, in words.
    """
    message = f"{free_bytes / 1e9:,.1f} GB free at {folder}, and the run leaves {kept_bytes / 1e9:,.3f} GB of checkpoints"
    for name, num_bytes in parts.items():
        if num_bytes:
            message += f", {num_bytes / 1e9:,.3f} GB of it {name}"
    if passing_bytes:
        message += f", with {passing_bytes / 1e9:,.3f} GB of step checkpoints and earlier masters at a time until it is done"
    if uncounted:
        message += f"; each step checkpoint has {uncounted}, on top"
    needed_bytes = kept_bytes + passing_bytes
    if needed_bytes > free_bytes:
        fix = "free some, give an --output on a larger disk, or set checkpoint.format: delta, which leaves about half"
        return Finding("disk", "fault", message, fix)
    if needed_bytes > MAX_FILLED_FRACTION * free_bytes:
        return Finding("disk", "warning", message, "tokens and logs come on top: free some, or give another --output")
    return Finding("disk", "ok", message)
