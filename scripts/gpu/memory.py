"""Step d: what a plan says that a device holds, beside the most that the GPU's allocator held: within 5 %.

A case is two micro-batches of a step, of which the second finds the gradients of the first, and then AdamW's step, as hft's
trainer takes it; in the third step the peaks of its parts are read. Where there is no GPU, autograd's own count of what it
keeps stands in for the allocator.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from gpu.plans import Case, Setting, list_cases
from gpu.questions import write_checkpoint
from gpu.record import Recorder
from gpu.shapes import (
    DEVICE,
    autocast,
    clear_memory,
    make_model,
    prepared,
    write_config,
)
from hftcli.freezing.budget import Memory
from hftcli.training.loss import DPO_OUTPUTS, set_loss_kernel
from hftcli.training.probe import SavedTensors, make_inputs
from hftcli.training.reports import measure_optimizer_bytes

TOLERANCE = 0.05
REHEARSAL_TOLERANCE = 0.1
FAULT_FACTOR = 3.0


def run(recorder: Recorder) -> None:
    for shape in ("tiny",) if recorder.rehearse else ("135M", "1B"):
        folder = write_config(shape, recorder.room / shape)
        with recorder.measuring(f"{shape}: the model"):
            model = make_model(folder, torch.bfloat16)
            for case in list_cases(shape):
                with recorder.measuring(case.name):
                    setting = case.make_setting(DEVICE.type == "cuda")
                    show(recorder, case, setting, measure(model, setting, case.reference, 1 if recorder.rehearse else 3))
            del model
        clear_memory()
    with recorder.measuring("hft sft: the command"):
        run_command(recorder, "tiny" if recorder.rehearse else "135M")


def run_command(recorder: Recorder, shape: str) -> None:
    """A real run beside what `hft plan` says of it: the trainer itself, on packed rows."""
    folder = write_checkpoint(shape, recorder.room / f"{shape}-model")
    run_folder = recorder.room / "run"
    length = 64 if recorder.rehearse else 1024
    values = {
        "model.path": folder, "data.max_length": length, "train.packing": "true", "train.max_steps": 3, "train.bf16": "true",
        "train.global_batch_size": 8, "train.per_device_train_batch_size": 4, "eval.tasks": "[]", "launch.num_processes": 1,
    }  # fmt: skip
    options = ["--recipe", "tinyworld", *(part for key, value in values.items() for part in ("--set", f"{key}={value}"))]
    hft = [sys.executable, "-m", "hftcli"]
    shown = subprocess.run([*hft, "plan", "--json", *options], capture_output=True, text=True, check=True)
    planned = json.loads(shown.stdout)["memory"]["half"]
    done = subprocess.run(
        [*hft, "sft", "--output", str(run_folder), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        recorder.add("hft sft: the command", False, code=done.returncode, said=done.stderr[-600:])
        return
    result = json.loads((run_folder / "rounds" / "00-sft" / "result.json").read_text(encoding="utf-8"))
    ratio = result["peak_memory_bytes"] / planned["total_bytes"]
    states = result["optimizer_bytes"] == planned["optimizer_bytes"] and result["gradient_bytes"] == planned["gradients_bytes"]
    is_near = DEVICE.type != "cuda" or abs(ratio - 1) <= TOLERANCE
    recorder.add(
        "hft sft: the command", states and is_near, planned_gb=planned["total_bytes"] / 1e9,
        measured_gb=result["peak_memory_bytes"] / 1e9, ratio=ratio, states_as_planned=states, loss_kernel=result["loss_kernel"],
        precision=result["precision"], seconds=result["seconds"], tokens=result["num_tokens"],
    )  # fmt: skip


@dataclass
class Measured:
    """Bytes: what is held before a step, after a forward pass, and the peaks of the parts of a step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    kept: int = 0
    after_forward: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    step_peak: int = 0
    first_peak: int = 0
    reserved: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak, self.step_peak, self.first_peak)


def measure(model: PreTrainedModel, setting: Setting, reference: str | None, num_steps: int) -> Measured:
    """Steps of two micro-batches, the last of which is read."""
    with prepared(model, setting) as trained:
        if reference:
            add_outputs(model)
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        inputs = make_inputs(model.config.vocab_size, setting.work, DEVICE)
        found = Measured(weights=sum(value.nbytes for value in model.parameters()))
        second, copies = None, []
        if reference == "full":
            second = make_second(model, setting)
            found.reference = sum(value.nbytes for value in second.parameters())
        if reference == "shared":
            copies = [(value, value.detach().clone()) for value in trained]
            found.reference = sum(copy.nbytes for _, copy in copies)
        for _ in range(num_steps):
            for part in range(2):
                reset_peak()
                expected = ask_reference(second or model, copies, inputs, setting) if reference else None
                saved = SavedTensors(model)
                with saved.watch(), autocast(setting.work):
                    loss = compute_loss(model, inputs, expected)
                found.kept = saved.num_bytes
                del saved
                if part == 1:
                    found.forward_peak, found.after_forward = read_peak(), read_now()
                reset_peak(keep=part == 0)
                loss.backward()
                del loss
                if part == 1:
                    found.backward_peak = read_peak()
                else:
                    found.first_peak = read_peak()
            reset_peak()
            found.gradients = sum(value.grad.nbytes for value in trained if value.grad is not None)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.step_peak = read_peak()
        found.optimizer = measure_optimizer_bytes(optimizer)
        found.reserved = torch.cuda.max_memory_reserved() if DEVICE.type == "cuda" else 0
        del optimizer, second, copies
    if reference:
        set_loss_kernel(model, "chunked")
    return found


def add_outputs(model: PreTrainedModel) -> None:
    """What DPO asks of the loss kernel."""
    model.forward = type(model).forward.__get__(model)
    add_fused_lm_head(model, outputs=DPO_OUTPUTS[:-1])


def make_second(model: PreTrainedModel, setting: Setting) -> PreTrainedModel:
    """The reference as a second model, as hft loads it: like the first, but that nothing trains."""
    with DEVICE:
        second = type(model)._from_config(model.config, dtype=torch.bfloat16)
    add_fused_lm_head(second, outputs=DPO_OUTPUTS[:-1])
    for parameter, other in zip(model.parameters(), second.parameters(), strict=True):
        other.data = other.data.to(parameter.dtype)
    return second.requires_grad_(False).train()


def ask_reference(
    model: PreTrainedModel, copies: list[tuple[torch.nn.Parameter, torch.Tensor]], inputs: dict[str, torch.Tensor],
    setting: Setting,
) -> torch.Tensor:  # fmt: skip
    """Log-probabilities of the sequences (B,); precomputed ones are read from a table."""
    if setting.budget.reference == "precompute":
        return torch.zeros(len(inputs["input_ids"]), device=DEVICE)
    trained = [parameter.data for parameter, _ in copies]
    for parameter, copy in copies:
        parameter.data = copy
    with torch.no_grad(), autocast(setting.work):
        found = model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum(-1)
    for (parameter, _), values in zip(copies, trained, strict=True):
        parameter.data = values
    return found


def compute_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor], expected_B: torch.Tensor | None) -> torch.Tensor:
    """Of supervised fine-tuning, or of DPO, where the first half of the sequences are the better answers."""
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    if expected_B is None:
        return -outputs.log_probs.sum() / outputs.label_mask.sum()
    better, worse = (outputs.log_probs.sum(-1) - expected_B).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (better - worse)).mean()


def reset_peak(keep: bool = False) -> None:
    if DEVICE.type == "cuda" and not keep:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def read_peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def read_now() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def show(recorder: Recorder, case: Case, setting: Setting, found: Measured) -> None:
    """The row; without a GPU, what is held in any case against autograd's count of it."""
    planned: Memory = setting.planned
    if recorder.fault:
        planned = replace(planned, weights_bytes=round(FAULT_FACTOR * planned.weights_bytes))
    activations, _ = setting.budget.half_step
    if DEVICE.type == "cuda":
        expected, measured = planned.total_bytes, found.peak
    else:
        # The hooks see no layer that is computed again.
        kept = activations.saved_bytes + activations.cast_bytes
        expected = planned.weights_bytes + planned.gradients_bytes + planned.optimizer_bytes + kept
        measured = found.weights + found.gradients + found.optimizer + found.kept
    ratio = measured / expected
    is_near = abs(ratio - 1) <= (TOLERANCE if DEVICE.type == "cuda" else REHEARSAL_TOLERANCE)
    held = {"weights": planned.weights_bytes, "gradients": planned.gradients_bytes, "optimizer": planned.optimizer_bytes}
    unlike = " ".join(name for name, value in held.items() if value != getattr(found, name))
    recorder.add(
        case.name, is_near, planned_gb=expected / 1e9, measured_gb=measured / 1e9, ratio=ratio,
        unlike=unlike or "none", planned_activations_gb=(activations.saved_bytes + activations.cast_bytes) / 1e9,
        kept_gb=found.kept / 1e9, planned_buffers_gb=planned.buffers_bytes / 1e9, high_gb=planned.high_bytes / 1e9,
        **{f"{name}_gb": value / 1e9 for name, value in asdict(found).items() if name != "kept"},
    )  # fmt: skip
