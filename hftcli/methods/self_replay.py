"""Self-replay: the model trains on texts of its own beside the rows, so that it keeps writing as it does.

The texts are drawn from the start of the round, at temperature 1, before it trains: from nothing, or, with `begin: chat`, from
what the chat template prints before a user's first word. training/own_rows.py draws them.

    ce   the likelihood of what was drawn: up to a constant an unbiased estimate of KL(start || model) (arXiv 2505.13811)
    kl   KL(start || model) at each drawn token, over the vocabulary: the same in the mean, without the noise of the draw
         (arXiv 2605.26097). The start, the model itself with a copy of what trains laid in, reads these rows once more.

Shapes: B sequences, T tokens, N tokens that some sequence of the batch trains on, V the vocabulary, O sequences with own texts.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.anchor import measure_divergence
from hftcli.methods.method import Method
from hftcli.models.start_copy import StartCopy
from hftcli.recipe.methods import SelfReplaySection
from hftcli.runs.spec import RoundSpec


class SelfReplay(Method):
    """Texts of the start among the rows, in every epoch."""

    section: SelfReplaySection
    copy: StartCopy | None = None

    def __init__(self, spec: RoundSpec, section: SelfReplaySection):
        super().__init__(spec, section)
        self.reads_ahead = self.reads_distributions = section.loss == "kl"
        self.asks_places = self.reads_ahead or section.weight != 1

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Copy what trains, where the start is asked: a step checkpoint has moved from there."""
        if self.reads_ahead:
            self.copy = StartCopy(model)

    def start(self, trainer: Trainer) -> None:
        """Take the copy to where the model trains."""
        if self.copy is not None:
            self.copy.move()

    def see_places(self, places_BT: torch.Tensor) -> None:
        """Which tokens are of own texts."""
        assert self.num_given is not None  # it asks for texts
        self.is_own_BT = places_BT >= self.num_given

    @torch.no_grad()
    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """What the start expects in the sequences of a batch that hold own texts."""
        assert self.copy is not None
        self.is_own_BN = self.is_own_BT[:, 1:][:, columns_N]
        self.rows_O = self.is_own_BN.any(1).nonzero().squeeze(-1)
        self.expected_ONV: torch.Tensor | None = None
        if len(self.rows_O):
            # A flattened batch is one sequence, whose borders are in vectors of their own.
            held = {name: values[self.rows_O] if _is_table(values) else values for name, values in inputs.items()}
            self.expected_ONV = self.copy.ask(model, held, columns_N)

    def penalize_tokens(self, log_probs_BNV: torch.Tensor, targets_BN: torch.Tensor) -> torch.Tensor | None:
        """The divergence of own tokens (B, N), 0 elsewhere."""
        if self.expected_ONV is None:
            return None
        divergence_ON = measure_divergence(log_probs_BNV[self.rows_O], self.expected_ONV, targets_BN[self.rows_O], "forward")
        divergence_BN = log_probs_BNV.new_zeros(targets_BN.shape).index_copy(0, self.rows_O, divergence_ON)
        return self.section.weight * divergence_BN.masked_fill(~self.is_own_BN, 0)

    def weigh_tokens(
        self, log_probs_BT: torch.Tensor, entropies_BT: torch.Tensor, is_trained_BT: torch.Tensor
    ) -> torch.Tensor | None:
        """What the likelihood of a token counts: with the divergence, that of own tokens nothing."""
        if not self.asks_places:
            return None
        own_weight = 0.0 if self.reads_ahead else self.section.weight
        return torch.ones_like(log_probs_BT).masked_fill(self.is_own_BT[:, 1:], own_weight)


def _is_table(values: torch.Tensor) -> bool:
    return isinstance(values, torch.Tensor) and values.dim() > 1
