"""The plan on the terminal: what trains, and the memory and compute that it takes, beside full fine-tuning."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from hftcli.freezing.activations import Activations, Flops
from hftcli.freezing.budget import Budget, HostWork, MeasuredStep, Memory
from hftcli.freezing.counts import measure_layer_share
from hftcli.freezing.proposal import propose_roles, write_proposal
from hftcli.freezing.roles import Parameter
from hftcli.freezing.selection import FreezePlan, count_frozen_layers, make_plan
from hftcli.launching.cards import judge_cards
from hftcli.reporting.lines import say
from hftcli.reporting.terminal import format_bytes, print_json, print_whole

MOST_IMBALANCE = 0.02  # of the share that trains in the layers: more is warned of


def print_proposal(model_type: str, parameters: Sequence[Parameter], as_json: bool) -> None:
    """Roles for the parameters of a family that has none, as a recipe takes them."""
    if as_json:
        print_json({"freeze": {"roles": propose_roles(parameters)[0]}})
    else:
        print(write_proposal(model_type, parameters))


def print_plan(budget: Budget, checked: tuple[Budget, MeasuredStep] | None, is_left_to_device: bool, as_json: bool) -> None:
    """Units and parameters per role, and memory per device and FLOPs per token beside full fine-tuning.

    Args:
        checked: a measurement and the budget that it belongs to, where one was made.
        is_left_to_device: whether the device decides what is computed in.
    """
    if as_json:
        print_json(_describe_plan(budget, checked))
        return
    plan, work = budget.plan, budget.work
    say(
        f"{plan.num_parameters:,} parameters; {_describe_share(budget)} "
        f"{plan.num_trainable_units} of {plan.num_units} units in layers; round {plan.round_index}, "
        f"plan {plan.short_fingerprint}"
    )
    if (redraw := plan.rule.redraw) is not None:
        every = "50 to 100 steps, by the rows" if redraw.every == "auto" else f"{redraw.every} steps"
        say(f"freeze.redraw: another draw every {every}, order {redraw.order}; what follows is the largest of them.")
        if not plan.frozen:
            say("Every draw trains all that there is: this is full fine-tuning.")
    if not plan.is_ranked:
        say(f"freeze.rank: {plan.rule.rank}: a round scores its start first; until then, a draw stands in for these units.")
    print_whole(_make_role_table(plan, "adapted" if budget.adapters is not None else "train"))
    if (warning := describe_imbalance(budget)) is not None:
        say(warning)
    say(
        f"{work.num_sequences} sequences of {work.length} tokens at once{', packed' if work.packed else ''}, "
        f"{work.attention} attention, {name_checkpointed(work.checkpoint_every)} checkpointed, {work.loss} loss"
    )
    print_whole(_make_memory_table(budget))
    if is_left_to_device:
        say("train.bf16 is null: in bfloat16, as on GPUs; a processor without matrix units for it (AMX) computes in float32.")
    if (host := budget.host) is not None:
        say(_describe_host(host))
    if budget.optimizer.is_paged:
        say("The optimizer's state is paged: where the device is full, the driver moves it to the host.")
    if budget.adapters is not None and not budget.adapters.is_counted:
        say(f"What {budget.adapters.name} itself computes and keeps of activations is not counted and comes on top.")
    if budget.uncounted:
        say(f"Not counted, and on top for a while: {'; '.join(budget.uncounted)}.")
    if budget.half_step is None:
        say(f"Activations of {budget.network.model_type} are not counted and come on top; --measure shows them.")
    else:
        print_whole(_make_flops_table(_flops_parts(budget.half_step), _flops_parts(budget.full_step)))
    for verdict in judge_cards(budget):
        say(verdict.words)
    if checked is not None:
        print_whole(_make_measurement_table(*checked))


def _describe_share(budget: Budget) -> str:
    """What trains: of the model's own weights, or of an adapter's in their place."""
    plan, adapters, number = budget.plan, budget.adapters, budget.num_adapter_weights
    if adapters is None:
        return f"{plan.num_trainable:,} train ({plan.trainable_fraction:.1%});"
    rank = f" of rank {adapters.rank}" if adapters.shapes is None else ""
    reading = ", reading in quiet directions alone" if plan.parts else ""
    share = f"{number / plan.num_parameters:.2%}"
    return f"none train, but {number:,} of {adapters.name}{rank}{reading} ({share}, {format_bytes(4 * number)} in float32) on"


def _describe_plan(budget: Budget, checked: tuple[Budget, MeasuredStep] | None) -> dict[str, Any]:
    """The plan as JSON has it: bytes per device, FLOPs per token."""
    plan, host = budget.plan, budget.host
    return {
        "num_parameters": plan.num_parameters,
        "num_trainable": plan.num_trainable,
        "trainable_fraction": plan.trainable_fraction,
        "num_units": plan.num_units,
        "num_trainable_units": plan.num_trainable_units,
        "layers_fraction": measure_layer_share(plan.roles),
        "warning": describe_imbalance(budget),
        "is_ranked": plan.is_ranked,
        "roles": {name: count.model_dump() for name, count in plan.roles.items()},
        "fingerprint": plan.fingerprint,
        "memory": {
            "precision": budget.precision,
            "num_processes": budget.num_processes,
            "zero_stage": budget.zero_stage,
            "work": asdict(budget.work),
            "half": _memory_parts(budget.half),
            "full": _memory_parts(budget.full),
        },
        "host": host and {**asdict(host), "bottleneck": host.bottleneck},
        "flops_per_token": {
            "half": _flops_parts(budget.half_step) or None,
            "full": _flops_parts(budget.full_step) or None,
        },
        "num_adapter_weights": budget.num_adapter_weights,
        "adapter_bytes": 4 * budget.num_adapter_weights,
        "counts_adapter": budget.adapters is None or budget.adapters.is_counted,
        "uncounted": list(budget.uncounted),
        "cards": [asdict(verdict) for verdict in judge_cards(budget)],
        "measured": checked and asdict(checked[1]),
    }


def describe_imbalance(budget: Budget) -> str | None:
    """What to say where much more or less of the layers' weights trains than was asked for; None where it is as asked."""
    plan, rule = budget.plan, budget.plan.rule
    if rule.redraw is not None and rule.redraw.order != "random":
        return None  # blocks in turns have no share to keep
    if rule.grain == "biases":
        return None  # they are a small part of the layers, whatever their share
    share = measure_layer_share(plan.roles)
    asked = rule.layer_fraction
    if budget.adapters is not None or abs(share - asked) <= MOST_IMBALANCE:
        return None
    said = f"warning: {share:.1%} of the weights in the layers train, and freeze.trainable_fraction asks for {asked:.1%}: "
    if (left := measure_above(budget)) < rule.trainable_fraction:
        return f"{said}freeze.frozen_prefix {rule.frozen_prefix:g} leaves {left:.1%} of them"
    said += "the units of a group are not of one size"
    balanced = make_plan(
        budget.network.units, rule.model_copy(update={"balance": "weights"}), plan.round_index, budget.network.num_heads
    )
    offered = measure_layer_share(balanced.roles)
    is_closer = "matrices" in rule.grain and abs(offered - asked) < abs(share - asked)
    return f"{said}; freeze.balance: weights would train {offered:.1%}" if is_closer else said


def measure_above(budget: Budget) -> float:
    """The share of the layers' weights that a frozen prefix leaves."""
    num_frozen = count_frozen_layers(budget.network.units, budget.plan.rule)
    sizes = [(unit.layer, unit.num_parameters) for unit in budget.network.units if unit.layer is not None]
    return sum(size for layer, size in sizes if layer >= num_frozen) / sum(size for _, size in sizes)


def _make_role_table(plan: FreezePlan, word: str) -> Table:
    roles = Table("role", "units", word, "parameters", word, "share")
    for name, count in plan.roles.items():
        roles.add_row(
            name, f"{count.num_units}", f"{count.num_trainable_units}", f"{count.num_parameters:,}",
            f"{count.num_trainable:,}", f"{count.num_trainable / count.num_parameters:.1%}",
        )  # fmt: skip
    return roles


def _make_memory_table(budget: Budget) -> Table:
    stage = f"ZeRO {budget.zero_stage} on {budget.num_processes} devices" if budget.num_processes > 1 else "one device"
    precision = "bfloat16 with float32 masters" if budget.precision == "mixed" else "float32"
    memory = Table("per device", "this plan", "full fine-tuning", "ratio", title=f"{precision}, {stage}", title_justify="left")
    full_parts = _memory_parts(budget.full)
    for name, half in _memory_parts(budget.half).items():
        full = full_parts[name]
        if full:  # there may be no reference
            memory.add_row(MEMORY_ROWS[name], format_bytes(half), format_bytes(full), f"{half / full:.3f}")
    return memory


def _describe_host(host: HostWork) -> str:
    down, up = format_bytes(host.down_bytes), format_bytes(host.up_bytes)
    return (
        f"On the host, for each process: {format_bytes(host.host_bytes)}. A micro-batch sends {down} of gradients there, and a "
        f"step brings {up} of weights back. By the rates of one host with 16 cores, a step takes {host.bus_s:.2f} s on the bus "
        f"and {host.update_s:.2f} s on the host besides the passes: {host.bottleneck} bounds it."
    )


def name_checkpointed(every: int | None) -> str:
    """Which layers compute their activations again, in words; None is none, 1 is all."""
    return {None: "no layer", 1: "every layer"}.get(every, f"one layer in {every}")


def _make_flops_table(half: dict[str, float], full: dict[str, float]) -> Table:
    table = Table("MFLOP per token", "this plan", "full fine-tuning", "ratio")
    for name, value in half.items():
        if name == "reading_ahead" and not value:
            continue
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
    "methods_bytes": "methods",
    "activations_bytes": "activations",
    "buffers_bytes": "buffers",
    "library_bytes": "matrix library",
    "low_bytes": "in all, low",
    "total_bytes": "in all, expected",
    "high_bytes": "in all, high",
}


def _memory_parts(memory: Memory) -> dict[str, int]:
    return {name: getattr(memory, name) for name in MEMORY_ROWS}


def _flops_parts(step: tuple[Activations, Flops] | None) -> dict[str, float]:
    """By kind; none where they are not counted."""
    return {**asdict(step[1]), "total": step[1].total} if step is not None else {}
