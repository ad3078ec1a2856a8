"""What trains changes within a round: `freeze.redraw`, in one process, or in several that all hold it whole.

The optimizer knows all that ever trains in the round, and steps on what has a gradient. What waits has none, is held as what is
frozen is, with its float32 master in host memory where the model holds it rounded, and its moments are dropped, or kept there
too. A step checkpoint so holds every weight that may have moved.

By the papers, where their published codes differ: LISA's leaves the moments of a layer where they were until it is drawn again,
BAdam's gives its first block a step less than all others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.rule import RedrawRule
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.method import Method
from hftcli.methods.pull import find_optimizer
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

Moments = dict[str, tuple[torch.Tensor, str]]  # what the optimizer keeps of a tensor, in host memory, and where it was


class Redraw(Method):
    """Draw after draw trains."""

    leaves_another_model = True

    def __init__(self, spec: RoundSpec, rule: RedrawRule):
        super().__init__(spec, Section())
        self.rule = rule
        self.num_done = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.waiting: list[str] = []  # whatever counts as trained for the moment
        self.masters: dict[str, torch.Tensor] = {}  # of what waits and is held rounded
        self.moments: dict[str, Moments] = {}  # of what waits, where they are kept
        self.largest_bytes = 0

    def take_draws(self, draws: Sequence[frozenset[str]], every: int) -> None:
        """What trains, draw by draw, and the steps of each."""
        self.draws, self.every = tuple(draws), every

    def expect(self, recalled: Any) -> None:
        """Begin with the draw of a step: the optimizer's state is laid in by the data types that parameters have then."""
        self.num_done = recalled["num_done"]

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Have all wait that the draw does not train."""
        self.is_mixed = mixed
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for name in self.parameters.keys() - self.draws[self._place()]:
            self._rest(name)

    def list_waiting(self) -> Mapping[str, tuple[torch.nn.Parameter, torch.Tensor]]:
        """What trains in other draws: the parameter, and the tensor that has its exact values."""
        return {name: (self.parameters[name], self.masters.get(name, self.parameters[name])) for name in self.waiting}

    def start(self, trainer: Trainer) -> None:
        """Know the optimizer."""
        self.optimizer = find_optimizer(trainer.optimizer)

    def end_step(self) -> None:
        """After the last step of a draw, the next one."""
        self.num_done += 1
        if self.num_done % self.every == 0 and self.num_done // self.every < len(self.draws):
            self.largest_bytes = self.count_optimizer_bytes()
            self._switch(self.draws[self._place()])

    def recall(self) -> dict[str, Any]:
        """Where in the draws the round is, and the moments that wait."""
        return {"num_done": self.num_done, "moments": self.moments, "largest_bytes": self.count_optimizer_bytes()}

    def restore(self, recalled: Any) -> None:
        """Take it up; the weights, and the moments of what trains, are those of the step already."""
        self.num_done, self.moments = recalled["num_done"], dict(recalled["moments"])
        self.largest_bytes = recalled["largest_bytes"]
        for name, master in self.masters.items():
            self.parameters[name].data.copy_(master)

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """All that trained counts as trained."""
        for value in self.parameters.values():
            value.requires_grad_(True)
        self.waiting.clear()

    def list_merged(self) -> dict[str, torch.Tensor]:
        """The masters of what waits, which the model holds rounded."""
        return dict(self.masters)

    def count_optimizer_bytes(self) -> int:
        """The most that the optimizer has kept of a draw."""
        assert self.optimizer is not None
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return max(self.largest_bytes, sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim()))

    def _place(self) -> int:
        return min(self.num_done // self.every, len(self.draws) - 1)

    def _switch(self, draw: frozenset[str]) -> None:
        """Let others train."""
        for name, value in self.parameters.items():
            if value.requires_grad and name not in draw:
                self._rest(name)
        for name in self.parameters.keys() & draw:
            if not self.parameters[name].requires_grad:
                self._wake(name)

    @torch.no_grad()
    def _rest(self, name: str) -> None:
        value = self.parameters[name]
        self.waiting.append(name)
        value.requires_grad_(False)
        value.grad = None
        if self.optimizer is not None:
            state = self.optimizer.state.pop(value, {})
            if self.rule.states == "keep" and state:
                self.moments[name] = {key: (moment.cpu(), str(moment.device)) for key, moment in state.items()}
        if self.is_mixed and value.dim() > 1:
            self.masters[name] = value.detach().to("cpu", torch.float32, copy=True)
            value.data = value.data.to(torch.bfloat16)

    @torch.no_grad()
    def _wake(self, name: str) -> None:
        value = self.parameters[name]
        self.waiting.remove(name)
        if name in self.masters:
            value.data = self.masters.pop(name).to(value.device)
        value.requires_grad_(True)
        if name in self.moments and self.optimizer is not None:
            self.optimizer.state[value] = {key: moment.to(place) for key, (moment, place) in self.moments.pop(name).items()}
