"""The exponential moving average of a round: what it leaves is the mean of the weights on their way, newest first.

theta* <- (1 - a) theta* + a theta after every step of the optimizer, from the round's start, in float32; at the end theta*
takes the place of theta. It is no method of the recipe's section `method`, but what `freeze.average` means: with a number, a is
one less it. TRL's own callback averages all parameters of a model or none, and so fails where some are frozen.

With `dynamic`, each tensor has an a of its own in every step, after LCIA (arXiv 2410.10868): how far the loss's curvature lets
theta* go towards theta,

    a = |g| |theta - theta_before| / (|theta - theta*| |g - g_before|)    where that lies between 0 and 1, and else 0.01

with sums of sizes |.|, g the gradient of the step and g_before that of the one before. The paper has slope and curvature in the
same places, but takes 2 (1 + |g|) / (|theta - theta*| |g - g_before|), whose curvature is not divided by the step that it was
seen over: that falls with the number of a tensor's weights, and leaves (0, 1) where these are few.

The average is of what the optimizer steps on: whole tensors, or a rank's flat pieces under DeepSpeed. Step checkpoints hold it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import Trainer

from hftcli.methods.method import Method
from hftcli.methods.pull import find_optimizer, list_pieces
from hftcli.models.checkpoint import lay_in, read_master
from hftcli.models.keeping import keeping_trained
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

LEAST_SHARE = 0.01  # what a step counts where nothing says more


class Average(Method):
    """All that trains ends as its moving average."""

    leaves_another_model = True

    def __init__(self, spec: RoundSpec, decay: float | Literal["dynamic"]):
        super().__init__(spec, Section())
        self.decay = decay
        self.means: dict[torch.Tensor, torch.Tensor] = {}  # by what the optimizer steps on, in its order
        self.gradients: dict[torch.Tensor, torch.Tensor] = {}  # of the step before, where the share is dynamic
        self.before: dict[torch.Tensor, torch.Tensor] = {}  # what there was before the step that is on its way
        self.remembered: list[tuple[torch.Tensor, ...]] = []  # of a step checkpoint, in the same order: of both

    def start(self, trainer: Trainer) -> None:
        """Have the optimizer call before and after its steps: under DeepSpeed it takes one for each piece."""
        optimizer = find_optimizer(trainer.optimizer)
        optimizer.register_step_pre_hook(lambda found, args, kwargs: self.begin(list_pieces(found)))
        optimizer.register_step_post_hook(lambda found, args, kwargs: self.go_on(list_pieces(found)))

    def begin(self, pieces: list[torch.Tensor]) -> None:
        """Before a step: know where it begins."""
        self._take_up(pieces)
        if self.decay == "dynamic":
            self.before.update((values, values.detach().clone()) for values in pieces)

    def _take_up(self, pieces: list[torch.Tensor]) -> None:
        """Before the first step the average is what there is; going on, what was remembered."""
        for values in (values for values in pieces if values not in self.means):
            mean, *gradient = self.remembered.pop(0) if self.remembered else (values.detach().clone(),)
            self.means[values] = mean.to(values.device)
            self.gradients.update((values, earlier.to(values.device)) for earlier in gradient)

    @torch.no_grad()
    def go_on(self, pieces: list[torch.Tensor]) -> None:
        """After a step: take its weights in."""
        for values in pieces:
            share = self._find_share(values) if self.decay == "dynamic" else 1 - self.decay
            self.means[values].lerp_(values, share)

    def _find_share(self, values: torch.Tensor) -> float:
        """What the step of a tensor counts, by how the gradient changed over the step before."""
        before, earlier = self.before.pop(values), self.gradients.get(values)
        if values.grad is None:
            return LEAST_SHARE
        gradient = self.gradients[values] = values.grad.detach().float().clone()
        if earlier is None:
            return LEAST_SHARE
        slope, change = gradient.abs().sum(), (gradient - earlier).abs().sum()
        moved, distance = (values - before).abs().sum(), (values - self.means[values]).abs().sum()
        share = float(slope * moved / (distance * change))
        return share if 0 < share < 1 else LEAST_SHARE  # and where it is no number

    def recall(self) -> list[torch.Tensor] | list[tuple[torch.Tensor, ...]]:
        """The average so far, and what the next share is measured by."""
        if self.decay != "dynamic":
            return [mean.cpu() for mean in self.means.values()]
        return [tuple(kept[values].cpu() for kept in (self.means, self.gradients) if values in kept) for values in self.means]

    def restore(self, recalled: Any) -> None:
        """Take it up again."""
        self.remembered = [kept if isinstance(kept, tuple) else (kept,) for kept in recalled]

    @contextmanager
    def holding_end(self, trainer: Trainer) -> Iterator[None]:
        """The average for a while."""
        pieces = list_pieces(trainer.optimizer) if trainer.is_deepspeed_enabled else []  # else they are the model's own
        kept = [values.detach().to("cpu", copy=True) for values in pieces]
        try:
            with keeping_trained(trainer.model):
                self._lay_in(trainer)
                yield
        finally:
            for values, before in zip(pieces, kept, strict=True):
                values.data.copy_(before)

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Put the average in the place of the weights."""
        self._lay_in(trainer)

    @torch.no_grad()
    def _lay_in(self, trainer: Trainer) -> None:
        """The average in the place of the weights; all ranks together."""
        self._take_up(list_pieces(trainer.optimizer))  # of a round that goes on, and has made no step since
        for values, mean in self.means.items():
            values.copy_(mean)
        if trainer.is_deepspeed_enabled:
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    lay_in(parameter, read_master(parameter, sharded=True))
