"""Elastic weight consolidation (arXiv 1612.00796): weights that earlier tasks depend on are held where they are.

Equation 3 of the paper, with one quadratic for all earlier tasks instead of one for each: its centre is the latest weights,
and the Fisher information of the tasks is added up (arXiv 1712.03847; a centre for each task would count the first tasks
twice).

The Fisher information is that of the model itself: labels are drawn from its predictions, token by token with the row's own
tokens before them, and the gradients are squared example by example. The empirical one, with the labels of the data, goes to
zero where the model has learned its rows, and would defend least what was learned best; squared gradients of batches, as in
many programs, are something else again (arXiv 2502.11756). Every parameter is measured, because the frozen ones may train in a
later round.

Shapes: T tokens of a row, N trained tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer

from hftcli.data.tokens import IGNORED
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.method import Method, draw_rows
from hftcli.models.tensors import write_tensors
from hftcli.recipe.methods import EwcSection
from hftcli.runs.run import Round

Inputs = dict[str, torch.Tensor]


class Ewc(Method):
    """EWC: weights that earlier tasks need are drawn back to where the round starts."""

    section: EwcSection

    def prepare_rows(self, dataset: Dataset, rows: dict[str, Dataset]) -> Dataset:
        """Draw the rows of the round's own task on which its Fisher information is measured at the end."""
        task = self.spec.task
        assert task is not None  # a recipe with EWC is one of a sequence
        self.rows = draw_rows(rows[task], self.section.num_examples, task, self.spec.train.seed)
        return dataset

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Remember where the round starts: a step checkpoint has moved from there."""
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        self.anchors = {name: value.detach().clone() for name, value in trained} if self.last_round is not None else {}

    def start(self, trainer: Trainer) -> None:
        """Pair every weight that trains with its Fisher information, summed over the earlier rounds, and its start."""
        self.terms: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        if self.last_round is None:
            return
        with safe_open(self.last_round.fisher_path, framework="pt") as file:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    fisher = file.get_tensor(name).to(parameter.device)
                    self.terms.append((parameter, fisher, self.anchors.pop(name).to(parameter.device)))

    def compute_penalty(self) -> torch.Tensor | None:
        """Lambda / 2 times the sum of F (theta - theta*)^2; None in the first round."""
        if not self.terms:
            return None
        return self.section.strength / 2 * sum(QuadraticPenalty.apply(*term) for term in self.terms)

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Measure the Fisher information of the round's own task, the rows shared out over the ranks."""
        rank, num_ranks = trainer.args.process_index, trainer.args.world_size
        own = self.rows.select(range(rank, len(self.rows), num_ranks))
        batches = (trainer.move_batch(trainer.data_collator([row])) for row in own)
        generator = torch.Generator(trainer.args.device).manual_seed(self.spec.train.seed + rank)
        with trainer.compute_loss_context_manager():
            sums = sum_squared_gradients(trainer.model, batches, generator)
        for fisher in sums.values():
            if num_ranks > 1:
                torch.distributed.all_reduce(fisher)
            fisher /= len(self.rows)
        if trainer.args.process_index == 0:
            self._write_fisher(sums, round_)

    def _write_fisher(self, fisher: dict[str, torch.Tensor], round_: Round) -> None:
        """Add what the earlier rounds measured, which the last of them holds, and write the sum."""
        held = {name: values.cpu() for name, values in fisher.items()}
        if self.last_round is not None:
            with safe_open(self.last_round.fisher_path, framework="pt") as file:
                held = {name: values + file.get_tensor(name) for name, values in held.items()}
        path = round_.fisher_path
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        write_tensors(temporary, held)
        temporary.replace(path)


class QuadraticPenalty(torch.autograd.Function):
    """sum F (theta - theta*)^2. Autograd would keep two temporaries as large as the model; this keeps none."""

    @staticmethod
    def forward(ctx: Any, theta: torch.Tensor, fisher: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """The sum, in float32."""
        ctx.save_for_backward(theta, fisher, anchor)
        distance = theta.float() - anchor.float()
        return (distance.square_().mul_(fisher)).sum()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """2 F (theta - theta*), times the slope, in the type of theta."""
        theta, fisher, anchor = ctx.saved_tensors
        distance = theta.float() - anchor.float()
        return distance.mul_(fisher).mul_(2 * slope).to(theta.dtype), None, None


def sum_squared_gradients(
    model: torch.nn.Module, batches: Iterable[Inputs], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Sum over examples of the squared gradient of log p(labels), float32, by parameter; the labels are drawn from the model.

    Args:
        model: left as it came, with no gradient in it.
        batches: one example each: `input_ids`, `labels` that tell which tokens are trained, and what else the model takes.
    """
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in model.named_parameters()}
    for gradients in draw_gradients(model, batches, generator):
        for name, gradient in gradients.items():
            sums[name] += gradient.float().square_()
    return sums


def draw_gradients(
    model: torch.nn.Module, batches: Iterable[Inputs], generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    """Example by example, the gradient of -log p(labels) by parameter; see `sum_squared_gradients`."""
    with differentiating(model) as parameters:
        for batch in batches:
            inputs = {name: values for name, values in batch.items() if name != "labels"}
            is_trained_T = batch["labels"][0, 1:] != IGNORED
            logits_NV = model(**inputs).logits[0, :-1][is_trained_T].float()
            labels_N = torch.multinomial(logits_NV.detach().softmax(-1), 1, generator=generator)[:, 0]
            nats = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
            # Outside of `backward`, DeepSpeed's hooks do not take the gradients for those of a step.
            gradients = torch.autograd.grad(nats, list(parameters.values()), materialize_grads=True)
            yield dict(zip(parameters, gradients, strict=True))


@contextmanager
def differentiating(model: torch.nn.Module) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The model without dropout and with nothing frozen; left as it came."""
    parameters = dict(model.named_parameters())
    frozen = [value for value in parameters.values() if not value.requires_grad]
    was_training = model.training
    model.eval()
    for value in frozen:
        value.requires_grad_(True)
    try:
        yield parameters
    finally:
        for value in frozen:
            value.requires_grad_(False)
        model.train(was_training)
