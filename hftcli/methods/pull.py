"""Decay to the start, decoupled from the loss: theta <- theta - lr pull (theta - theta_0) in every step, before Adam's.

It is to a penalty on the distance (`method.l2sp`) what AdamW's decay is to a penalty on the size: Adam does not rescale it. It
is no method of the recipe's section `method`, but what `freeze.pull` means. With `selective`, some tensors alone are pulled, by
the condition of Selective Projection Decay (arXiv 2411.01713): those whose gradient descent, too, leads back to the start.

The start is copied out of what the optimizer steps on, in float32: whole tensors, masters on the host, or a rank's flat pieces
under DeepSpeed. Step checkpoints hold the copy, since a round that goes on finds no start in its weights.
"""

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer

from hftcli.freezing.rule import PullRule
from hftcli.methods.method import Method
from hftcli.recipe.section import Section
from hftcli.runs.spec import RoundSpec


class Pull(Method):
    """All that trains is pulled back to where the round starts."""

    def __init__(self, spec: RoundSpec, rule: PullRule):
        super().__init__(spec, Section())
        self.rule = rule
        self.starts: dict[torch.Tensor, torch.Tensor] = {}  # by what the optimizer steps on, in its order
        self.remembered: list[torch.Tensor] = []  # of a step checkpoint, in the same order

    def start(self, trainer: Trainer) -> None:
        """Under DeepSpeed, the step follows the last backward pass at once, and the optimizer itself has to call."""
        if trainer.is_deepspeed_enabled:
            find_optimizer(trainer.optimizer).register_step_pre_hook(lambda optimizer, args, kwargs: self.pull(optimizer))

    def change_gradient(self, trainer: Trainer) -> None:
        """Before the step: pull."""
        if not trainer.is_deepspeed_enabled:
            self.pull(find_optimizer(trainer.optimizer))

    @torch.no_grad()
    def pull(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull what this call of the optimizer steps on: with ZeRO, a piece of all."""
        for group in optimizer.param_groups:
            weight = float(group["lr"]) * self.rule.strength
            for values in group["params"]:
                if values not in self.starts:
                    self.starts[values] = self._take_start(values)
                if self.rule.selective and not leads_back(values, self.starts[values]):
                    continue
                values.lerp_(self.starts[values], weight)

    def _take_start(self, values: torch.Tensor) -> torch.Tensor:
        """Before the first step, what there is; going on, what was remembered."""
        if not self.remembered:
            return values.detach().clone()
        return self.remembered.pop(0).to(values.device)

    def recall(self) -> list[torch.Tensor]:
        """The start, which the weights of a step do not hold."""
        return [start.cpu() for start in self.starts.values()]

    def restore(self, recalled: Any) -> None:
        """Take it up again."""
        self.remembered = list(recalled)


def find_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, below what accelerate and DeepSpeed put around it."""
    while isinstance(optimizer, AcceleratedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def list_pieces(optimizer: Any) -> list[torch.Tensor]:
    """What an optimizer steps on, in its order; that of ZeRO 3 knows all pieces, and the one below it that of its step."""
    while isinstance(optimizer, AcceleratedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return list(optimizer.fp32_partitioned_groups_flat)
        optimizer = optimizer.optimizer
    return [values for group in optimizer.param_groups for values in group["params"]]


def leads_back(values: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether the step down the gradient leads a tensor back to its start: <-g, theta - theta_0> below 0."""
    if values.grad is None:
        return False
    return bool(torch.sum(values.grad * (values - start)) > 0)
