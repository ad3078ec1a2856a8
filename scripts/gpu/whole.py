"""Step f: a whole 7B model, all layers, AdamW with float32 masters: half on one card, and with the optimizer on the host.

On one card as hft's one process trains: what trains in float32, autocast. With the optimizer on the host by a loop of this file
around hft's HostAdamW: weights in bfloat16 on the device, masters and moments in host memory. A limit of the allocator stands
for a smaller card; every layer is checkpointed.
"""

import os
import statistics
import time
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from gpu.plans import Setting, make_setting
from gpu.record import Recorder
from gpu.shapes import (
    DEVICE,
    autocast,
    clear_memory,
    make_model,
    make_rows,
    prepared,
    read_total_bytes,
    write_config,
)
from hftcli.freezing.activations import Workload
from hftcli.training.offload import HostAdamW
from hftcli.training.probe import compute_loss

CARD_GIB, SMALL_CARD_GIB = 78.0, 24.0
ACCUMULATIONS = (1, 8)  # micro-batches of a step


def run(recorder: Recorder) -> None:
    shape = "tiny, apart" if recorder.rehearse else "7B"
    work = Workload(1, 64 if recorder.rehearse else 2048, attention="flash", arithmetic="autocast", checkpoint_every=1)
    folder = write_config(shape, recorder.room)
    settings = {rule: make_setting(shape, rule, work) for rule in ("half", "full")}
    with recorder.measuring("planned"):
        for rule, setting in settings.items():
            planned = setting.planned
            recorder.add(f"planned on the device: {rule}", None, gib=planned.total_bytes / 2**30,
                         weights_gib=planned.weights_bytes / 2**30, gradients_gib=planned.gradients_bytes / 2**30,
                         optimizer_gib=planned.optimizer_bytes / 2**30, activations_gib=planned.activations_bytes / 2**30,
                         trains=setting.budget.plan.num_trainable)  # fmt: skip
    started = time.monotonic()
    model = make_model(folder, torch.bfloat16)
    recorder.add("the model was made", None, seconds=time.monotonic() - started)
    limit = 2**10 if recorder.fault else None
    with recorder.measuring(f"half on one card, within {CARD_GIB:.0f} GiB"):
        train_resident(recorder, model, settings["half"])
    clear_memory()
    with recorder.measuring(f"half with the optimizer on the host, within {SMALL_CARD_GIB:.0f} GiB"):
        train_offloaded(recorder, model, replace_arithmetic(settings["half"]), limit)


def replace_arithmetic(setting: Setting) -> Setting:
    return replace(setting, budget=replace(setting.budget, work=replace(setting.work, arithmetic="bfloat16")))


def limit_memory(gib: float) -> None:
    """Have the allocator refuse more than a smaller card has."""
    if DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / read_total_bytes(), 1.0))
        torch.cuda.reset_peak_memory_stats()


def read_peaks(limit_gib: float) -> dict[str, float]:
    if DEVICE.type != "cuda":
        return {"limit_gib": limit_gib, "peak_gib": 0.0, "reserved_gib": 0.0}
    return {
        "limit_gib": limit_gib,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def train_resident(recorder: Recorder, model: PreTrainedModel, setting: Setting) -> None:
    """All on the device."""
    work = setting.work
    limit_memory(CARD_GIB)
    with prepared(model, setting) as trained:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        inputs = make_rows(model.config.vocab_size, work.num_sequences, work.length)
        for accumulation in ACCUMULATIONS:
            seconds, losses = [], []
            for _ in range(3):
                started = read_clock()
                for _ in range(accumulation):
                    with autocast(work):
                        loss = compute_loss(model, inputs) / accumulation
                    loss.backward()
                    losses.append(loss.item() * accumulation)
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(read_clock() - started)
            step = statistics.median(seconds[1:])
            recorder.add(
                f"half on one card, {accumulation} micro-batches of {work.num_tokens}", losses[-1] < losses[0] + 0.1,
                step_s=step, tokens_per_s=accumulation * work.num_tokens / step, **read_peaks(CARD_GIB),
                planned_gib=setting.planned.total_bytes / 2**30, first_loss=losses[0], last_loss=losses[-1],
            )  # fmt: skip
        del optimizer


def read_clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_offloaded(recorder: Recorder, model: PreTrainedModel, setting: Setting, limit_bytes: int | None) -> None:
    """Weights in bfloat16 on the device, the rest on the host."""
    work = setting.work
    if limit_bytes is not None and DEVICE.type != "cuda":
        raise MemoryError("the planted fault: a card of a kibibyte")
    with prepared(model, setting) as trained:
        limit_memory(SMALL_CARD_GIB if limit_bytes is None else limit_bytes / 2**30)
        started = time.monotonic()
        optimizer = HostAdamW(trained, lr=1e-6)
        made_s = time.monotonic() - started
        inputs = make_rows(model.config.vocab_size, work.num_sequences, work.length)
        frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
        before = frozen.detach().flatten()[:1000].clone()
        for accumulation in ACCUMULATIONS:
            seconds, parts, losses = [], [], []
            for _ in range(3):
                started = read_clock()
                for _ in range(accumulation):
                    loss = compute_loss(model, inputs) / accumulation
                    loss.backward()
                    losses.append(loss.item() * accumulation)
                passed = read_clock()
                optimizer.clip(1.0)
                clipped = read_clock()
                optimizer.step()
                optimizer.zero_grad()
                ended = read_clock()
                seconds.append(ended - started)
                parts.append((passed - started, clipped - passed, ended - clipped))
            step = statistics.median(seconds[1:])
            passes, clip, update = (statistics.median(values) for values in zip(*parts[1:], strict=True))
            is_kept = torch.equal(before, frozen.detach().flatten()[:1000])
            recorder.add(
                f"half with the optimizer on the host, {accumulation} micro-batches of {work.num_tokens}",
                losses[-1] < losses[0] + 0.1 and is_kept, step_s=step, tokens_per_s=accumulation * work.num_tokens / step,
                passes_s=passes, clip_s=clip, update_s=update, **read_peaks(SMALL_CARD_GIB),
                host_gib=optimizer.host_bytes / 2**30, cores=len(os.sched_getaffinity(0)), made_s=made_s,
                first_loss=losses[0], last_loss=losses[-1],
            )  # fmt: skip
        optimizer.close()
        del optimizer
