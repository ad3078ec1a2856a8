"""Step e: seconds of a step beside its FLOP count: full, half, half with a frozen prefix, LoRA; and in equal memory.

The settings take turns on one model, so that a card whose clock drifts is fair to all. Forward pass, backward pass and
optimizer are timed by the GPU's own events; medians over turns and steps, and the spread of the whole step.
"""

import statistics
import time
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from gpu.plans import Setting, make_setting
from gpu.record import Recorder
from gpu.shapes import (
    DEVICE,
    Timer,
    autocast,
    clear_memory,
    make_model,
    make_rows,
    prepared,
    read_total_bytes,
    write_config,
)
from hftcli.freezing.activations import Workload
from hftcli.launching.planning import list_works
from hftcli.training.probe import compute_loss

SHAPES = ("1B", "7B, 8 layers")
LENGTHS = (2048, 4096)
NUM_TOKENS = 8192  # of a step
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bfloat16, dense, of the SXM cards


@dataclass
class Times:
    """Seconds of each step's parts."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def steps(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward, self.backward, self.optimizer, strict=True)]


def run(recorder: Recorder) -> None:
    if recorder.fault:
        time.sleep(3600)
    shapes, lengths = (("tiny",), (64,)) if recorder.rehearse else (SHAPES, LENGTHS)
    for shape in shapes:
        folder = write_config(shape, recorder.room / shape)
        with recorder.measuring(f"{shape}: the model"):
            model = make_model(folder, torch.bfloat16)
            for length in lengths:
                num_sequences = max((2 * 64 if recorder.rehearse else NUM_TOKENS) // length, 1)
                work = Workload(num_sequences, length, attention="flash", arithmetic="autocast")
                names = ("full", "half", "half, prefix 0.25", "LoRA")
                settings = {rule: make_setting(shape, rule, work) for rule in names}
                add_equal_memory(settings)
                if length == lengths[0]:  # as ranks under DeepSpeed compute, without its optimizer
                    exact = replace(work, arithmetic="bfloat16")
                    settings |= {f"{rule}, bf16 weights": make_setting(shape, rule, exact) for rule in ("full", "half")}
                times = take_turns(model, settings, recorder.rehearse)
                for name, setting in settings.items():
                    show(recorder, f"{shape}, {num_sequences} x {length}, {name}", name, setting, settings, times)
            del model
        clear_memory()


def add_equal_memory(settings: dict[str, Setting]) -> None:
    """Both in the memory in which half computes nothing again, by the plan; full then computes again what it must."""
    half, full = settings["half"], settings["full"]
    works = list_works(full.budget, ["chunked"])
    ways = [replace(full, budget=replace(full.budget, work=work)) for work in works]
    memory_bytes = max(half.planned.high_bytes, min(way.planned.high_bytes for way in ways))
    way = next(way for way in ways if way.planned.high_bytes <= memory_bytes)
    settings["full, in half's memory"] = way


def take_turns(model: PreTrainedModel, settings: dict[str, Setting], rehearse: bool) -> dict[str, Times]:
    found = {name: Times() for name in settings}
    num_turns, num_steps = (1, 1) if rehearse else (3, 3)
    for _ in range(num_turns):
        for name, setting in settings.items():
            if setting.planned.total_bytes < 0.97 * read_total_bytes():
                time_setting(model, setting, num_steps, found[name])
    return found


def time_setting(model: PreTrainedModel, setting: Setting, num_steps: int, found: Times) -> None:
    """Freeze the model anew and take some steps with a fresh optimizer, after one that is not counted."""
    work = setting.work
    with prepared(model, setting) as trained:
        # Moments of weights in bfloat16 say nothing of an optimizer that hft has.
        has_optimizer = work.arithmetic != "bfloat16"
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if has_optimizer else None
        inputs = make_rows(model.config.vocab_size, work.num_sequences, work.length)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for index in range(num_steps + 1):
            timer = Timer()
            with autocast(work):
                loss = compute_loss(model, inputs)
            timer.mark()
            loss.backward()
            timer.mark()
            if optimizer is not None:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
            model.zero_grad(set_to_none=True)
            timer.mark()
            seconds = timer.read_seconds()
            if index:
                for part, value in zip((found.forward, found.backward, found.optimizer), seconds, strict=True):
                    part.append(value)
        if DEVICE.type == "cuda":
            found.peak_bytes = torch.cuda.max_memory_allocated()
        del optimizer


def show(
    recorder: Recorder, title: str, name: str, setting: Setting, settings: dict[str, Setting], all_times: dict[str, Times]
) -> None:
    """A row: medians, ratios over full fine-tuning with the same arithmetic, tokens per second, use of the card's peak."""
    times, work, flops = all_times[name], setting.work, setting.budget.half_step[1]
    if not times.steps:
        recorder.add(title, None, skipped=f"needs {setting.planned.total_bytes / 2**30:.1f} GiB")
        return
    step = statistics.median(times.steps)
    base_name = "full, bf16 weights" if name.endswith("bf16 weights") else "full"
    base, base_flops = all_times[base_name], settings[base_name].budget.half_step[1]
    ratio, expected = None, flops.total / base_flops.total
    if base.steps:
        ratio = step / statistics.median(base.steps)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    peak = next((value for key, value in PEAKS.items() if key in device), None)
    useful = (flops.total - flops.recompute) * work.num_tokens / step
    recorder.add(
        title, None, forward_s=statistics.median(times.forward), backward_s=statistics.median(times.backward),
        optimizer_s=statistics.median(times.optimizer), step_s=step, spread=max(times.steps) / min(times.steps) - 1,
        ratio=ratio, flop_ratio=expected, passes_ratio=compare_passes(times, base), tokens_per_s=work.num_tokens / step,
        tflops=useful / 1e12, mfu=useful / peak if peak else None, checkpointed=str(work.checkpoint_every),
        planned_gb=setting.planned.total_bytes / 1e9, peak_gb=times.peak_bytes / 1e9,
    )  # fmt: skip


def compare_passes(times: Times, base: Times) -> float | None:
    """Forward and backward passes alone, over those of full fine-tuning."""
    if not base.steps:
        return None
    medians = [statistics.median(found.forward) + statistics.median(found.backward) for found in (times, base)]
    return medians[0] / medians[1]
