"""L2-SP (arXiv 1802.01483): weights are held to where the round starts.

The penalty is alpha / 2 ||w - w_start||^2, summed over all that trains. The paper adds a second term, which draws layers that
are newly initialised to zero; fine-tuning a language model initialises none, so that embeddings and head are held like all
else. In a sequence, the start is that of the round.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.ewc import QuadraticPenalty
from hftcli.methods.method import Method
from hftcli.recipe.methods import L2spSection


class L2sp(Method):
    """L2-SP: all that trains is drawn back to where the round starts."""

    section: L2spSection

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Remember where the round starts: a step checkpoint has moved from there."""
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        self.anchors = {name: value.detach().clone() for name, value in trained}

    def start(self, trainer: Trainer) -> None:
        """Pair every weight that trains with its start."""
        trained = [(name, value) for name, value in trainer.model.named_parameters() if value.requires_grad]
        self.terms = [(parameter, self.anchors.pop(name).to(parameter.device)) for name, parameter in trained]

    def compute_penalty(self) -> torch.Tensor:
        """Alpha / 2 times the squared distance from the start."""
        equal = torch.ones(())  # every weight counts alike
        distance = sum(QuadraticPenalty.apply(parameter, equal, anchor) for parameter, anchor in self.terms)
        return self.section.strength / 2 * distance
