"""Whether a round fits into the memory of its devices and of this machine, and the smallest change with which it would."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hftcli.doctor.doctor import Finding, HostReport, Status, measure_device_bytes
from hftcli.errors import InputError
from hftcli.freezing.budget import Budget, ReferenceMode
from hftcli.launching.command import count_gpus
from hftcli.launching.planning import NO_GPU_TO_FIT
from hftcli.recipe.sections import LaunchSection, TrainSection

MAX_FILLED_FRACTION = 0.8  # of a device, where activations, or what methods hold for a while, are not counted


def check_memory(budget: Budget, rank_bytes: int | None) -> Finding:
    """What the recipe's next round holds on each device, against what the device has.

    Args:
        rank_bytes: memory that one rank has to itself, on the smallest device; None where the devices cannot be seen from
            here.
    """
    memory = budget.half
    message = f"a round takes {memory.total_bytes / 1e9:,.2f} GB on each of {budget.num_processes} devices"
    if budget.half_step is None:
        message += ", and activations, which are not counted for this model"
    if budget.uncounted:
        message += f", and besides, uncounted, {'; '.join(budget.uncounted)}"
    if rank_bytes is None:
        return Finding("memory", "ok", f"{message}; the devices cannot be seen from here")
    message += f"; there are {rank_bytes / 1e9:,.2f} GB"
    if has_room(budget, rank_bytes):
        return Finding("memory", "ok", message)
    status: Status = "fault" if memory.total_bytes > rank_bytes else "warning"
    return Finding("memory", status, message, suggest_launch(budget, rank_bytes))


def has_room(budget: Budget, rank_bytes: int) -> bool:
    """Whether a round surely fits; where something is not counted, whether it leaves that room."""
    if budget.half_step is None:
        return budget.half.total_bytes <= MAX_FILLED_FRACTION * rank_bytes
    return budget.half.high_bytes <= (MAX_FILLED_FRACTION if budget.uncounted else 1) * rank_bytes


def suggest_launch(budget: Budget, rank_bytes: int) -> str:
    """The smallest change with which a round surely fits, by the same count that refused it."""
    changes: list[tuple[str, Budget]] = []
    is_paired, most_stage = bool(budget.reference and not budget.asks_start), budget.limits.most_stage
    reference: ReferenceMode | None = "precompute" if is_paired else budget.reference
    if is_paired and budget.reference in ("shared", "full"):
        changes.append(("reference: precompute", replace(budget, reference="precompute")))
    if budget.half_step is not None:
        fitted = replace(budget, work=replace(budget.work, num_sequences=2 if is_paired else 1, checkpoint_every=1))
        words = "train.fit: auto, which takes a micro-batch and activation checkpointing that fit"
        if budget.work.checkpoint_every is not None:  # the recipe says what is checkpointed, and the two do not go together
            words = words.replace(",", " without train.activation_checkpointing,")
        if not budget.limits.can_fit:
            words = "train.per_device_train_batch_size: 1 and train.activation_checkpointing: true"
        changes.append((words, fitted))
        budget = fitted
    if budget.num_processes > 1:
        changes += [
            (f"launch.zero_stage: {stage}", replace(budget, zero_stage=stage))
            for stage in range(budget.zero_stage + 1, (min(most_stage, 2) if budget.reference == "shared" else most_stage) + 1)
        ]
    for factor in (2**power for power in range(1, 11 if most_stage else 1)):
        wider = replace(budget, num_processes=budget.num_processes * factor, zero_stage=most_stage, reference=reference)
        changes.append((f"{wider.num_processes} devices at launch.zero_stage: {most_stage}", wider))
    for words, changed in changes:
        if has_room(changed, rank_bytes):
            return f"{words} ({changed.half.total_bytes / 1e9:,.2f} GB on each)"
    return "a smaller model"


def check_host(budget: Budget, launch: LaunchSection, rank_bytes: int | None) -> Finding | None:
    """What an optimizer on the host takes, against this machine's memory; None where the host holds nothing, or is not seen.

    Args:
        launch: resolved.
        rank_bytes: memory that one rank has to itself, as `check_memory` has it.
    """
    host, (num_nodes, _) = budget.host, launch.shape
    if host is None or rank_bytes is None or launch.hostfile or num_nodes > 1:
        return None
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rank_needs = host.host_bytes + (0 if count_gpus() else budget.half.total_bytes)
    needed_bytes = budget.num_processes * rank_needs
    message = (
        f"with launch.offload: optimizer, {budget.num_processes} processes take {needed_bytes / 1e9:,.2f} GB of this machine's "
        f"memory; there are {machine_bytes / 1e9:,.2f} GB"
    )
    if needed_bytes <= machine_bytes:
        return Finding("host", "ok", message)
    return Finding("host", "fault", message, suggest_host(budget, rank_bytes, machine_bytes))


def suggest_host(budget: Budget, rank_bytes: int, machine_bytes: int) -> str:
    """The smallest change with which the host has room."""
    alone = replace(budget, offload=False)
    if has_room(alone, rank_bytes):
        return f"launch.offload: none ({alone.half.total_bytes / 1e9:,.2f} GB on each device)"
    host_bytes = budget.num_processes * (budget.host.host_bytes if budget.host else 0)
    num_machines = max(math.ceil(host_bytes / machine_bytes), 2)
    return f"{num_machines} machines like this one, or train less with freeze.trainable_fraction or freeze.frozen_prefix"


def give_memory(train: TrainSection, launch: LaunchSection, reports: Sequence[HostReport]) -> TrainSection:
    """The settings with the bytes that `train.fit` is to read of the devices, where these can be seen from here.

    Args:
        launch, reports: as `share_memory` takes them.

    Raises:
        InputError: it is to read a GPU's, and there is none.
    """
    rank_bytes = share_memory(launch, reports)
    if train.fit is None or train.memory_bytes is not None or rank_bytes is None:
        return train
    if not (all(report.num_gpus for report in reports) if launch.hostfile else count_gpus()):
        raise InputError(*NO_GPU_TO_FIT)
    return train.model_copy(update={"memory_bytes": rank_bytes})


def share_memory(launch: LaunchSection, reports: Iterable[HostReport]) -> int | None:
    """Bytes that a rank has to itself: a GPU's, or its part of a machine without one; None for machines not seen from here.

    Args:
        launch: resolved.
        reports: the hosts' words, where the launch has hosts.
    """
    num_nodes, num_processes = launch.shape
    if launch.hostfile:
        machines = [(report.num_gpus, report.device_bytes) for report in reports]
    elif launch.slurm or num_nodes > 1:
        machines = []
    else:
        machines = [(count_gpus(), measure_device_bytes())]
    parts = [num_bytes if num_gpus else math.floor(num_bytes / num_processes) for num_gpus, num_bytes in machines]
    return min(parts, default=None)
