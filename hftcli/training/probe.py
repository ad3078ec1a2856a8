"""Two steps on this machine: what a plan really holds, beside what its budget says.

The weights are random, since only their sizes count, so that a config alone can be measured. The forward pass and the loss are
those of TRL's trainer.
"""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hftcli.freezing.activations import Workload
from hftcli.freezing.budget import Budget, MeasuredStep
from hftcli.freezing.selection import FreezePlan
from hftcli.launching.planning import find_arithmetic
from hftcli.models.checkpoint import freeze_model, halve_frozen
from hftcli.models.device import takes_bfloat16
from hftcli.models.division import divide_model, draw_choices
from hftcli.recipe.recipe import Recipe
from hftcli.training.loss import set_loss_kernel
from hftcli.training.reports import measure_optimizer_bytes


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor in a graph; it goes with its node."""

    tensor: torch.Tensor


class SavedTensors:
    """The tensors that a graph keeps for its backward pass; those of a model's parameters are not counted."""

    def __init__(self, model: torch.nn.Module):
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.kept: WeakSet[Kept] = WeakSet()

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept now, every storage once."""
        storages = [kept.tensor.untyped_storage() for kept in self.kept]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for address, size in sizes.items() if address not in self.own)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what the graph keeps that is built inside."""

        def pack(tensor: torch.Tensor) -> Kept:
            kept = Kept(tensor.detach())  # a node that held its own output would never go
            self.kept.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield


def check_budget(recipe: Recipe, path: str, budget: Budget) -> tuple[Budget, tuple[Budget, MeasuredStep]]:
    """Measure a budget's micro-batch in one process here, as this machine computes.

    Returns:
        The budget, corrected, and the measurement with the budget that it belongs to: one process on this machine.
    """
    mixed = takes_bfloat16(recipe.train.bf16)
    work = replace(budget.work, arithmetic=find_arithmetic(mixed, 1))
    here = replace(
        budget, precision="mixed" if mixed else "float32", num_processes=1, reference=None, held_bytes=0, work=work
    )  # fmt: skip
    model = make_random_model(path, recipe.model.attn_implementation)
    measured = measure_steps(model, budget.plan, work, here.wide)
    if here.half_step is None:
        return budget, (here, measured)
    activations, _ = here.half_step
    # Under autocast, the hooks see the copies of weights as well.
    correction = measured.activations_bytes / (activations.saved_bytes + activations.cast_bytes)
    return replace(budget, correction=correction), (here, measured)


def make_random_model(path: str, attn_implementation: str | None) -> PreTrainedModel:
    """A model of the shape that a folder's or a hub id's config says, in float32."""
    config = AutoConfig.from_pretrained(path)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)


def measure_steps(model: PreTrainedModel, plan: FreezePlan, work: Workload, wide: Collection[str] = ()) -> MeasuredStep:
    """Train two steps on random tokens and count in the second.

    Args:
        model: in float32; it is frozen by the plan, changed and left on the GPU where there is one.
        work: with `arithmetic` `float32` or `autocast`.
        wide: names of what does not train and stays in float32 under autocast.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    freeze_model(model, plan)
    dtype = torch.bfloat16 if work.arithmetic == "autocast" else torch.float32
    layers = divide_model(model, plan.parts, draw_choices(plan.parts, dtype), True)
    if work.arithmetic == "autocast":
        halve_frozen(model, wide)
    model.to(device).train()
    if work.checkpoint_every is not None:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=work.checkpoint_every)
        model.disable_input_require_grads()
    set_loss_kernel(model, work.loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    inputs = make_inputs(model.config.get_text_config().vocab_size, work, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.zero_grad()
        for layer in layers.values():
            layer.refresh()
        saved = SavedTensors(model)
        started = time.perf_counter()
        with saved.watch(), torch.autocast(device.type, torch.bfloat16, enabled=work.arithmetic == "autocast"):
            loss = compute_loss(model, inputs)
        activations_bytes = saved.num_bytes
        del saved
        loss.backward()
        gradients_bytes = sum(parameter.grad.nbytes for parameter in trained)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        step_s = time.perf_counter() - started
    return MeasuredStep(
        weights_bytes=sum(parameter.nbytes for parameter in model.parameters())
        + sum(layer.num_added_bytes for layer in layers.values()),
        gradients_bytes=gradients_bytes,
        optimizer_bytes=measure_optimizer_bytes(optimizer),
        activations_bytes=activations_bytes,
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        step_s=step_s,
    )


def compute_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean negative log-likelihood, as TRL's trainer computes it; the model has a loss kernel."""
    outputs = model(**inputs, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def make_inputs(vocabulary: int, work: Workload, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens: rows, of which one is padded where there are several, or one packed row."""
    rows_BT = torch.randint(vocabulary, (work.num_sequences, work.length), device=device)
    if work.packed:
        positions_BT = torch.arange(work.length, device=device).expand(work.num_sequences, -1)
        packed_1T = rows_BT.reshape(1, -1)
        return {"input_ids": packed_1T, "labels": packed_1T, "position_ids": positions_BT.reshape(1, -1)}
    mask_BT = torch.ones_like(rows_BT)
    if work.num_sequences > 1:
        mask_BT[-1, -1] = 0
    return {"input_ids": rows_BT, "labels": rows_BT, "attention_mask": mask_BT}
