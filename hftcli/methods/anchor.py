"""Anchor: at every token that is trained, what the model expects there is held to what it expected when the round began.

    forward        KL(start || model), over the vocabulary
    reverse        KL(model || start)
    target_masked  KL(start || model) over the vocabulary without the token that is taught, on which the loss pulls the other
                   way (arXiv 2605.29498); both are divided by what is left of them

The start is the model itself with a copy of what trains laid in, as in DPO with `reference: shared`, so that no second model is
held; it reads every batch once more. A step's loss has `strength` times the divergence on top, per trained token.

Shapes: B sequences, T tokens, N tokens that some sequence of the batch trains on, V the vocabulary.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.method import Method
from hftcli.models.start_copy import StartCopy
from hftcli.recipe.methods import AnchorSection


class Anchor(Method):
    """A penalty on the divergence from the start of the round, token by token."""

    section: AnchorSection
    reads_distributions = True
    reads_ahead = True

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Copy what trains: a step checkpoint has moved from there."""
        self.copy = StartCopy(model)

    def start(self, trainer: Trainer) -> None:
        """Take the copy to where the model trains."""
        self.copy.move()

    @torch.no_grad()
    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """What the start expects at the places of a batch before its trained tokens."""
        self.expected_BNV = self.copy.ask(model, inputs, columns_N)

    def penalize_tokens(self, log_probs_BNV: torch.Tensor, targets_BN: torch.Tensor) -> torch.Tensor:
        """What each token has on top of its loss (B, N)."""
        return self.section.strength * measure_divergence(log_probs_BNV, self.expected_BNV, targets_BN, self.section.kind)


def measure_divergence(
    log_probs_BNV: torch.Tensor, expected_BNV: torch.Tensor, targets_BN: torch.Tensor, kind: str
) -> torch.Tensor:
    """The divergence from what is expected at each place (B, N), nats.

    Args:
        log_probs_BNV: of the model, with a gradient.
        expected_BNV: log-probabilities of the start.
        targets_BN: the token that is taught.
    """
    if kind == "target_masked":
        targets_BN1 = targets_BN.unsqueeze(-1)
        log_probs_BNV, expected_BNV = (
            values.scatter(-1, targets_BN1, -torch.inf).log_softmax(-1).scatter(-1, targets_BN1, 0)
            for values in (log_probs_BNV, expected_BNV)
        )
        weights_BNV = expected_BNV.exp().scatter(-1, targets_BN1, 0)
        return (weights_BNV * (expected_BNV - log_probs_BNV)).sum(-1)
    if kind == "reverse":
        return (log_probs_BNV.exp() * (log_probs_BNV - expected_BNV)).sum(-1)
    return (expected_BNV.exp() * (expected_BNV - log_probs_BNV)).sum(-1)
