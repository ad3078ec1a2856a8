"""Anchor: at every token that is trained, what the model expects there is held to what it expected when the round began.

    forward        KL(start || model), over the vocabulary
    reverse        KL(model || start)
    target_masked  KL(start || model) over the vocabulary without the token that is taught, on which the loss pulls the other
                   way (arXiv 2605.29498); both are divided by what is left of them

The start is the model itself with a copy of what trains laid in, as in DPO with `reference: shared`, so that no second model is
held; it reads every batch once more. With `top_k` it is asked once, before the round, for its likeliest tokens at each place
(expectations.py), and the divergence is that of two distributions over these and one class of all others, which is at most the
whole one. A step's loss has `strength` times the divergence on top, per trained token.

Shapes: B sequences, T tokens, N places before tokens that some sequence of the batch trains on, V the vocabulary; M places that
train, K tokens that are compared.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, Trainer

from hftcli.data.tokens import Progress
from hftcli.errors import InputError
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.expectations import Expectations, find_expectations, leave_out
from hftcli.methods.method import Method
from hftcli.models.start_copy import StartCopy
from hftcli.recipe.methods import AnchorSection
from hftcli.runs.spec import RoundSpec


class Anchor(Method):
    """A penalty on the divergence from the start of the round, token by token."""

    section: AnchorSection
    reads_distributions = True
    copy: StartCopy | None = None

    def __init__(self, spec: RoundSpec, section: AnchorSection):
        super().__init__(spec, section)
        self.reads_ahead, self.asks_places = section.top_k is None, section.top_k is not None
        self.without_target = section.kind == "target_masked"

    def check_start(self, start: Path, plan: FreezePlan) -> None:
        """Raises: InputError: there are not so many tokens to compare."""
        vocabulary = AutoConfig.from_pretrained(start).get_text_config().vocab_size
        if self.section.top_k is not None and self.section.top_k > vocabulary:
            raise InputError(
                f"method.anchor.top_k is {self.section.top_k}, and the model's vocabulary has {vocabulary} tokens",
                "lower it; null compares them all, without a cache",
            )

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Copy what trains: a step checkpoint has moved from there."""
        self.start_folder = start
        if self.reads_ahead:
            self.copy = StartCopy(model)

    def ask_untouched(self, trainer: Trainer, on_batch: Progress) -> None:
        """Have the start asked about every row, or find what it said."""
        if self.section.top_k is not None:
            self.expectations = find_expectations(
                trainer, self.spec, self.start_folder, self.section.top_k, self.without_target, on_batch
            )

    def recall(self) -> Any:
        """What the start expects: the trained model could not say it again."""
        return None if self.reads_ahead else self.expectations.tensors

    def restore(self, recalled: Any) -> None:
        """Take it up again."""
        if recalled is not None:
            self.expectations = Expectations(**recalled)

    def start(self, trainer: Trainer) -> None:
        """Take the copy to where the model trains."""
        if self.copy is not None:
            self.copy.move()

    def see_places(self, places_BT: torch.Tensor) -> None:
        """Which places train, and what the start expects there."""
        places_BT = places_BT[:, 1:]
        places_BN = places_BT[:, (places_BT >= 0).any(0)]
        self.is_trained_BN = places_BN >= 0
        self.kept = self.expectations.find(places_BN[self.is_trained_BN]) if bool(self.is_trained_BN.any()) else None

    @torch.no_grad()
    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """What the start expects at the places of a batch before its trained tokens."""
        assert self.copy is not None
        self.expected_BNV = self.copy.ask(model, inputs, columns_N)

    def penalize_tokens(self, log_probs_BNV: torch.Tensor, targets_BN: torch.Tensor) -> torch.Tensor:
        """What each token has on top of its loss (B, N)."""
        if self.reads_ahead:
            return self._measure_whole(log_probs_BNV, targets_BN)
        penalties_BN = log_probs_BNV.new_zeros(targets_BN.shape)
        if self.kept is None:
            return penalties_BN
        log_probs_MV = log_probs_BNV[self.is_trained_BN]
        if self.without_target:
            log_probs_MV = leave_out(log_probs_MV, targets_BN[self.is_trained_BN])
        has_rest = log_probs_MV.shape[-1] - self.without_target > self.kept[0].shape[-1]
        divergence_M = compare_likeliest(log_probs_MV, *self.kept, has_rest, self.section.kind == "reverse")
        return self.section.strength * penalties_BN.masked_scatter(self.is_trained_BN, divergence_M)

    def _measure_whole(self, log_probs_BNV: torch.Tensor, targets_BN: torch.Tensor) -> torch.Tensor:
        return self.section.strength * measure_divergence(log_probs_BNV, self.expected_BNV, targets_BN, self.section.kind)


def compare_likeliest(
    log_probs_MV: torch.Tensor, ids_MK: torch.Tensor, expected_MK: torch.Tensor, rest_M: torch.Tensor, has_rest: bool,
    is_reverse: bool,
) -> torch.Tensor:  # fmt: skip
    """The divergence from what is expected at each place (M), nats, all but some tokens being one.

    Args:
        log_probs_MV: of the model, with a gradient.
        ids_MK, expected_MK, rest_M: what the start finds likeliest, and what it leaves for the others.
        has_rest: whether there are others.
    """
    ids_MK = ids_MK.long()
    own_MC, expected_MC = log_probs_MV.gather(-1, ids_MK), expected_MK
    if has_rest:
        own_rest_M1 = log_probs_MV.scatter(-1, ids_MK, -torch.inf).logsumexp(-1, keepdim=True)
        own_MC, expected_MC = torch.cat([own_MC, own_rest_M1], -1), torch.cat([expected_MC, rest_M.unsqueeze(-1)], -1)
    is_out_MC = expected_MC == -torch.inf  # the token that is taught, where that is left out
    own_MC, expected_MC = (values_MC.masked_fill(is_out_MC, 0) for values_MC in (own_MC, expected_MC))
    if is_reverse:
        return (own_MC.exp() * (own_MC - expected_MC)).masked_fill(is_out_MC, 0).sum(-1)
    return (expected_MC.exp() * (expected_MC - own_MC)).masked_fill(is_out_MC, 0).sum(-1)


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
