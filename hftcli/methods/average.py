"""The exponential moving average of a round: what it leaves is the mean of the weights on their way, newest first.

theta* <- decay theta* + (1 - decay) theta after every step of the optimizer, from the round's start, in float32; at the end
theta* takes the place of theta. It is no method of the recipe's section `method`, but what `freeze.average` means. TRL's own
callback averages all parameters of a model or none, and so fails where some are frozen.

The average is of what the optimizer steps on: whole tensors, or a rank's flat pieces under DeepSpeed. Step checkpoints hold it.
"""

from typing import Any

import torch
from transformers import Trainer

from hftcli.methods.method import Method
from hftcli.methods.pull import find_optimizer
from hftcli.models.checkpoint import lay_in, read_master
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec


class Average(Method):
    """All that trains ends as its moving average."""

    leaves_another_model = True

    def __init__(self, spec: RoundSpec, decay: float):
        super().__init__(spec, Section())
        self.decay = decay
        self.means: dict[torch.Tensor, torch.Tensor] = {}  # by what the optimizer steps on, in its order
        self.remembered: list[torch.Tensor] = []  # of a step checkpoint, in the same order

    def start(self, trainer: Trainer) -> None:
        """Have the optimizer call before and after its steps: under DeepSpeed it takes one for each piece."""
        optimizer = find_optimizer(trainer.optimizer)
        optimizer.register_step_pre_hook(lambda found, args, kwargs: self.begin(found))
        optimizer.register_step_post_hook(lambda found, args, kwargs: self.go_on(found))

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step the average is what there is; going on, what was remembered."""
        for values in (values for group in optimizer.param_groups for values in group["params"]):
            if values not in self.means:
                mean = self.remembered.pop(0).to(values.device) if self.remembered else values.detach().clone()
                self.means[values] = mean

    @torch.no_grad()
    def go_on(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: take its weights in."""
        for values in (values for group in optimizer.param_groups for values in group["params"]):
            self.means[values].lerp_(values, 1 - self.decay)

    def recall(self) -> list[torch.Tensor]:
        """The average so far."""
        return [mean.cpu() for mean in self.means.values()]

    def restore(self, recalled: Any) -> None:
        """Take it up again."""
        self.remembered = list(recalled)

    @torch.no_grad()
    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Put the average in the place of the weights; all ranks together."""
        if self.remembered:  # of a round that goes on after its last step
            self.begin(find_optimizer(trainer.optimizer))
        for values, mean in self.means.items():
            values.copy_(mean)
        if trainer.is_deepspeed_enabled:
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    lay_in(parameter, read_master(parameter, sharded=True))
