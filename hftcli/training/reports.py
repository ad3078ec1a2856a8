"""What a round says of itself: where it is, how long it took, what it held, what it ran on."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from hftcli.errors import TrainingError
from hftcli.models.device import find_device, name_device
from hftcli.runs.files import write_model, write_text
from hftcli.runs.records import Hardware
from hftcli.runs.run import Round
from hftcli.runs.spec import Progress
from hftcli.training.trainers import checkpoint_layers

PHASES = ("tokenizing", "choosing", "loading", "scoring", "referencing", "training", "saving", "verifying")


class Reporter:
    """Tells the front where the worker is; only rank 0 speaks."""

    def __init__(self, round_: Round):
        self.round = round_
        self.is_first = int(os.environ.get("RANK", "0")) == 0

    def report(self, phase: str, done: int = 0, total: int = 0, loss: float | None = None) -> None:
        """Tell the front where the worker is; other ranks than the first say nothing."""
        if self.is_first:
            write_model(self.round.progress_path, Progress(phase=phase, done=done, total=total, loss=loss))


class Clock:
    """Wall-clock seconds by phase; a phase within another one is not counted as the other."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.within = [0.0]  # seconds of the phases within each that is open

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the seconds of what runs inside to a phase."""
        started = time.perf_counter()
        self.within.append(0.0)
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self.seconds[phase] += passed - self.within.pop()
            self.within[-1] += passed


class RoundCallback(TrainerCallback):
    """Writes metrics.jsonl and progress, stops at a loss that is not a number, and measures gradients and states.

    Args:
        score_start: called with nothing once the model is ready and untouched.
    """

    def __init__(self, reporter: Reporter, score_start: Callable[[], None]):
        self.reporter = reporter
        self.score_start = score_start
        self.loss: float | None = None
        self.gradient_bytes = 0

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> None:
        """Score the untouched model, with the metrics cut back to the step that the round goes on from."""
        if self.reporter.is_first:
            rows = cut_metrics(self.reporter.round, state.global_step)
            self.loss = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
        self.score_start()
        checkpoint_layers(model, args)
        self.reporter.report("training", state.global_step, state.max_steps)

    def on_pre_optimizer_step(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Count the gradients' bytes, when all of them are there: the most of all steps, of which each may train others."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.gradient_bytes = max(self.gradient_bytes, sum(gradient.nbytes for gradient in gradients))

    def on_step_end(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the front of the step."""
        self.reporter.report("training", state.global_step, state.max_steps, self.loss)

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Append the row to metrics.jsonl."""
        if "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        if self.reporter.is_first:
            with self.reporter.round.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        check_finite(self.loss, f"the loss became {self.loss} at step {state.global_step}", self.reporter.round)


def check_finite(value: float, what: str, round_: Round) -> None:
    """Raises: TrainingError: a round has come to something that is not a number; `what` says to what."""
    if not math.isfinite(value):
        raise TrainingError(
            f"{what} and the round is stopped; {round_.describe_kept()}",
            "the same command would come to the same point: lower train.learning_rate and give another --output, or look "
            "at the data with `hft data`; metrics.jsonl has every step",
        )


def cut_metrics(round_: Round, step: int) -> list[dict[str, Any]]:
    """Drop the rows of metrics.jsonl after a step: they come again. Those that are left are returned."""
    rows = round_.read_metrics() if round_.metrics_path.exists() else []
    rows = [row for row in rows if row["step"] <= step]
    write_text(round_.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def measure_optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's moments on this process; DeepSpeed's own optimizers wrap the one that holds them."""
    while not isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    parts = [part for value in values for part in list_parts(value) if part.dim() > 0]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())  # tables of codes are held in common


def list_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor: its codes and scales where it is a quantised one of torchao's."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in list_parts(getattr(value, name))]


def measure_peak_memory() -> int:
    """Peak bytes of this process: of the GPU's allocator, or its resident set where there is no GPU.

    Of a Mac's GPU, what its driver holds for the process now: about the peak, since torch keeps what it got.
    """
    device = find_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_hardware(num_ranks: int) -> Hardware:
    """What this rank runs on."""
    return Hardware(
        device=name_device(find_device(num_ranks)),
        num_processes=num_ranks,
        num_cores=os.cpu_count(),
        num_threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
