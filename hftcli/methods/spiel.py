"""SpIEL-AG (arXiv 2401.16405): matrices train in few of their entries, of which some are dropped and others grown meanwhile.

It is no method of the recipe's section `method`, but what `freeze.part: spiel` means. What trains are the changes of K entries
of each matrix, chosen at random at first. The first steps of every `PERIOD` also look for others: the K whose gradient is
largest in the first micro-batch are candidates, and their gradients are summed up over `WINDOW` steps. Then a share of the
changes, the smallest, is dropped, which takes their entries back to the start, and as many candidates grow, those with the
largest sums; what would be dropped and grown at once stays. The share is all after the first window, and then falls from `RATE`
in a line to 0.
A grown entry begins with the mean of its gradients, and of their squares, as Adam's moments, at the age of the window.

Where the published code differs, the paper holds: the code's later windows are a step longer than the first, and with
micro-batches its mean is of their gradients, not of the steps'. Weight decay acts on the changes, as there.

Shapes: E entries of a matrix that train, N of them that give way.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.pull import find_optimizer
from hftcli.methods.quiet import Quiet
from hftcli.models.division import write_bases
from hftcli.models.sparse import MovingLinear
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

PERIOD, WINDOW, RATE = 20, 5, 0.2  # the paper's


@dataclass
class Candidates:
    """Entries of a matrix that may grow.

    Attributes:
        places_E: theirs in the matrix.
        step_E: their gradient in the step that is on its way.
        sums_E: of their gradients over the steps of the window.
        squares_E: of the squares of these.
    """

    places_E: torch.Tensor
    step_E: torch.Tensor
    sums_E: torch.Tensor
    squares_E: torch.Tensor


class Spiel(Quiet):
    """Entries that are dropped and grown."""

    def __init__(self, spec: RoundSpec):
        super().__init__(spec)
        self.num_done = 0
        self.candidates: dict[str, Candidates] = {}
        self.lags: dict[str, torch.Tensor] = {}  # by how many steps each entry is younger than its matrix's moments
        self.held: dict[str, torch.Tensor] = {}  # the younger entries as they were before a step

    def expect(self, recalled: Any) -> None:
        """Begin with the entries of a step."""
        self.bases = recalled["places"]

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Put the layers in."""
        super().prepare_model(model, plan, start, mixed, sharded)
        self.moving = {name: layer for name, layer in self.layers.items() if isinstance(layer, MovingLinear)}

    def start(self, trainer: Trainer) -> None:
        """Know the optimizer and the round's steps, and look for candidates."""
        super().end_step()  # what a step checkpoint laid in counts
        self.num_steps, self.num_ranks = trainer.state.max_steps, trainer.args.world_size
        self.optimizer = find_optimizer(trainer.optimizer)
        self.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._hold_younger())
        self.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._step_younger())
        for name, layer in self.moving.items():
            device = layer.index.device
            self.lags[name] = self.lags[name].to(device) if name in self.lags else torch.zeros_like(layer.index)
            if name in self.candidates:
                found = self.candidates[name]
                self.candidates[name] = Candidates(*(values.to(device) for values in vars(found).values()))
        self._watch()

    def end_step(self) -> None:
        """Count the step; after the last of a window, drop and grow."""
        super().end_step()
        self.num_done += 1
        for found in self.candidates.values():
            if self.num_ranks > 1:  # as the gradients of a step are
                torch.distributed.all_reduce(found.step_E)
                found.step_E /= self.num_ranks
            found.sums_E += found.step_E
            found.squares_E += found.step_E**2
            found.step_E.zero_()
        if self.num_done % PERIOD == WINDOW and self.num_done < self.num_steps:
            rate = 1.0 if self.num_done == WINDOW else RATE * (1 - self.num_done / self.num_steps)
            for name in self.candidates:
                self._exchange(name, rate)
            self.candidates = {}
        self._watch()

    def recall(self) -> dict[str, Any]:
        """Which entries train, how old they are, and what is known of candidates."""
        return {
            "num_done": self.num_done,
            "places": {name: layer.index.cpu() for name, layer in self.moving.items()},
            "lags": {name: lag_E.cpu() for name, lag_E in self.lags.items()},
            "candidates": {
                name: tuple(values.cpu() for values in vars(found).values()) for name, found in self.candidates.items()
            },
        }

    def restore(self, recalled: Any) -> None:
        """Take it up again; the entries are those of the step already."""
        self.num_done, self.lags = recalled["num_done"], dict(recalled["lags"])
        self.candidates = {name: Candidates(*values) for name, values in recalled["candidates"].items()}

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Merge, and leave word of which entries trained at the end."""
        super().finish(trainer, round_)
        if trainer.args.process_index == 0 and self.moving:
            write_bases(round_.entries_path, {name: layer.index.cpu() for name, layer in self.moving.items()}, {})

    def _watch(self) -> None:
        """Take gradients in the steps of a window."""
        is_open = self.num_done % PERIOD < WINDOW and self.num_done < self.num_steps
        for name, layer in self.moving.items():
            layer.collect = partial(self._collect, name) if is_open else None

    @torch.no_grad()
    def _collect(self, name: str, gradient: torch.Tensor) -> None:
        """Add a micro-batch's gradient of a matrix to its candidates', which the first of a window names."""
        if name not in self.candidates:
            first = gradient.float()
            if self.num_ranks > 1:
                first = first.clone()
                torch.distributed.all_reduce(first)
            layer = self.moving[name]
            places_E = first.abs().topk(len(layer.index)).indices.to(layer.index.dtype)
            self.candidates[name] = Candidates(places_E, *(torch.zeros_like(layer.start_E) for _ in range(3)))
        found = self.candidates[name]
        found.step_E += gradient.index_select(0, found.places_E).float()

    @torch.no_grad()
    def _exchange(self, name: str, rate: float) -> None:
        """Drop the smallest changes of a matrix and grow the candidates with the largest sums."""
        layer, found = self.moving[name], self.candidates[name]
        number = int(len(layer.index) * rate)
        numbers_N = layer.entries.detach().abs().topk(number, largest=False).indices
        is_active = torch.zeros(layer.weight.numel(), dtype=torch.bool, device=layer.index.device)
        is_active[layer.index.long()] = True
        is_active[layer.index[numbers_N].long()] = False
        fitting = (~is_active[found.places_E.long()]).nonzero().flatten()
        best = found.sums_E[fitting].abs().topk(min(number, len(fitting))).indices
        grown = fitting[best]
        numbers_N, grown = skip_common(numbers_N, layer.index, grown, found.places_E)
        numbers_N = numbers_N[: len(grown)]
        layer.move(numbers_N, found.places_E[grown])
        state, (beta1, beta2) = self.optimizer.state[layer.entries], self._find_group(layer)["betas"]
        state["exp_avg"][numbers_N] = found.sums_E[grown] / WINDOW * (1 - beta1**WINDOW)
        state["exp_avg_sq"][numbers_N] = found.squares_E[grown] / WINDOW * (1 - beta2**WINDOW)
        self.lags[name][numbers_N] = int(state["step"]) - WINDOW

    def _find_group(self, layer: MovingLinear) -> dict[str, Any]:
        """The optimizer's settings for a matrix."""
        return next(group for group in self.optimizer.param_groups if any(value is layer.entries for value in group["params"]))

    @torch.no_grad()
    def _hold_younger(self) -> None:
        """Before a step: keep what AdamW would correct for a higher age."""
        for name, lag_E in self.lags.items():
            entries = self.moving[name].entries
            if entries.grad is not None and (is_younger := lag_E > 0).any():
                self.held[name] = entries[is_younger].clone()

    @torch.no_grad()
    def _step_younger(self) -> None:
        """After it: AdamW's step of the younger entries by their own age; their moments are as they should be."""
        for name, before in self.held.items():
            layer, lag_E = self.moving[name], self.lags[name]
            is_younger = lag_E > 0
            state, group = self.optimizer.state[layer.entries], self._find_group(layer)
            age = (int(state["step"]) - lag_E[is_younger]).double()
            first, second = (
                (state[key][is_younger] / (1 - beta**age))
                for key, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True)
            )
            rate = float(group["lr"])
            after = before * (1 - rate * group["weight_decay"]) - rate * first / (second.sqrt() + group["eps"])
            layer.entries[is_younger] = after.to(layer.entries.dtype)
        self.held = {}


def skip_common(
    dropped_N: torch.Tensor, index_E: torch.Tensor, grown_N: torch.Tensor, places_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is dropped and what is grown, without places that are both.

    Args:
        dropped_N: numbers of places in `index_E`.
        grown_N: numbers of places in `places_E`.
    """
    dropped, grown = index_E[dropped_N], places_E[grown_N]
    return dropped_N[~torch.isin(dropped, grown)], grown_N[~torch.isin(grown, dropped)]
