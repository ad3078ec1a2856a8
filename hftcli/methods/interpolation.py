"""Interpolation with the start at the end of a round (WiSE-FT, arXiv 2109.01903): what trained goes a part of its way back.

It is no method of the recipe's section `method`, but what `freeze.interpolate` means: `hft merge --interpolate` does the same
to a finished model, and here every round of a sequence starts from an interpolated one. It is computed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.method import Method
from hftcli.models.checkpoint import lay_in, read_master
from hftcli.models.keeping import keeping_trained
from hftcli.models.reader import Start
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec


class Interpolation(Method):
    """(1 - share) of the start and the share of the end."""

    leaves_another_model = True

    def __init__(self, spec: RoundSpec, share: float):
        super().__init__(spec, Section())
        self.share = share
        self.merged: dict[str, torch.Tensor] = {}

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Know where the start is."""
        self.stored = Start(self.spec.model, start, (*plan.trained, *plan.frozen))

    @contextmanager
    def holding_end(self, trainer: Trainer) -> Iterator[None]:
        """The interpolated weights for a while."""
        with keeping_trained(trainer.model):
            for _, parameter, merged in self._interpolate(trainer):
                lay_in(parameter, merged)
            yield

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Lay the interpolated weights in."""
        for name, parameter, merged in self._interpolate(trainer):
            if trainer.args.process_index == 0:
                self.merged[name] = merged.cpu()
            lay_in(parameter, merged)

    def _interpolate(self, trainer: Trainer) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
        """What trains, by name, with the weights between the start and where it is; all ranks together."""
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                end = read_master(trainer.masters.get(parameter, parameter), trainer.is_deepspeed_enabled).detach()
                start = self.stored.read_master(name).float().to(end.device)
                yield name, parameter, torch.lerp(start, end.float(), self.share)

    def list_merged(self) -> dict[str, torch.Tensor]:
        """The interpolated weights, in float32."""
        return self.merged
