"""Token weights: what a token counts in the loss, by how the model reads it in this very step, or read it at the start.

    dft     p                    its probability (arXiv 2508.05629, equation 9)
    talr    p^(1 / tau)          tau, the median over a micro-batch's rows of their mean loss (arXiv 2509.20758)
    eaft    H / ln 20, at most 1 the entropy of what could stand there (arXiv 2601.02151, which takes it over the 20 likeliest
                                 tokens; here it is over all)
    stm     1 or 0               whether the start of the round found it likely enough: 1 / p at most 2.5 (arXiv 2501.14315)
    psft    p / q, or 0          q, its probability up to 8 steps before; 0 where p / q is above 1.28 (arXiv 2508.17784)

Each with `strength` as an exponent: 0 is plain training. A weight has no gradient, and the loss stays a sum over the trained
tokens of a step divided by their number, so that weights below 1 make a step smaller.

Proximal SFT maximizes min(p / q, clip(p / q, 1 - 0.2, 1 + 0.28)), PPO's objective with an advantage of 1, of which the lower
bound never binds. Its gradient is that of log p with the weight above, so that the loss that is shown is comparable with the
others', and its step is the paper's. In the authors' code (zwhong714/PSFT) q is taken anew for every 256 rows, on which 8 steps
are taken.

Texts that the start of the round writes (self_replay.py) teach nothing, and are left alone: their tokens have the weight 1.

For `stm` and `psft` the model as it was reads every batch once more: the model itself, with a copy of what trained laid in.

Shapes: B sequences of a micro-batch, each a row or several packed ones, T tokens but for the first, N of them that some row
trains on, R rows of a sequence.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.ift import find_documents
from hftcli.methods.method import Method
from hftcli.models.start_copy import StartCopy
from hftcli.recipe.methods import TokenWeightsSection
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec

logger = logging.getLogger(__name__)

EAFT_TOKENS = 20  # of arXiv 2601.02151: their largest entropy is a weight of 1
METRIC = "token_weight"
LITTLE_WEIGHT = 0.05  # of the mean token of a round: it teaches next to nothing
# What helps then with the kinds by which a token may count nothing at all, at any strength.
REMEDIES = {
    "stm": "raise method.token_weights.max_perplexity",
    "psft": "raise method.token_weights.clip, or lower method.token_weights.snapshot_steps",
}


class TokenWeights(Method):
    """Tokens that contradict what the model knows count less."""

    section: TokenWeightsSection
    copy: StartCopy | None = None
    num_steps = 0
    documents_BT: torch.Tensor | None = None
    weighed: torch.Tensor | None = None  # of the last micro-batch: the weights' sum, and how many they are

    def __init__(self, spec: RoundSpec, section: TokenWeightsSection):
        super().__init__(spec, section)
        # Of packed rows, their places say where one ends.
        self.reads_ahead = section.asks_start or (section.kind == "talr" and spec.train.packing)
        self.asks_places = spec.method.self_replay is not None

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Copy what trains, where the start is asked: a step checkpoint has moved from there."""
        if self.section.asks_start:
            self.copy = StartCopy(model, moves=self.renews)

    @property
    def renews(self) -> bool:
        """Whether the copy does not stay at the start of the round."""
        return self.section.kind == "psft" and self.section.snapshot_steps is not None

    def recall(self) -> Any:
        """The copy, where it is no more the start, and the steps so far."""
        return {"num_steps": self.num_steps, "copy": self.copy.recall()} if self.renews and self.copy is not None else None

    def restore(self, recalled: Any) -> None:
        """Take the copy of the stopped round."""
        if recalled is not None and self.copy is not None:
            self.num_steps = recalled["num_steps"]
            self.copy.restore(recalled["copy"])

    def start(self, trainer: Trainer) -> None:
        """Take the copy to where the model trains."""
        if self.copy is not None:
            self.copy.move()

    def end_step(self) -> None:
        """Copy the model anew after every so many steps."""
        self.num_steps += 1
        if self.renews and self.copy is not None and self.num_steps % (self.section.snapshot_steps or 1) == 0:
            self.copy.renew()

    def see_places(self, places_BT: torch.Tensor) -> None:
        """Which tokens are of texts that the start has written."""
        assert self.num_given is not None  # a method asks for them
        self.is_own_BT = places_BT >= self.num_given

    @torch.no_grad()
    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """How likely the model as it was finds the tokens of a batch, or which row each of them is of."""
        if not self.section.asks_start:
            self.documents_BT = find_documents(inputs)[:, 1:]
            return
        assert self.copy is not None
        targets_BT = inputs["labels"][:, 1:].clamp(min=0)
        log_probs_BNV = self.copy.ask(model, inputs, columns_N)
        known_BN = log_probs_BNV.gather(-1, targets_BT[:, columns_N].unsqueeze(-1)).squeeze(-1)
        self.start_log_probs_BT = torch.zeros_like(targets_BT, dtype=known_BN.dtype).index_copy(1, columns_N, known_BN)

    def weigh_tokens(self, log_probs_BT: torch.Tensor, entropies_BT: torch.Tensor, is_trained_BT: torch.Tensor) -> torch.Tensor:
        """What each trained token counts, (B, T); anything where none is trained."""
        is_own_BT = self.is_own_BT[:, 1:] if self.asks_places else torch.zeros_like(is_trained_BT)
        is_taught_BT = is_trained_BT & ~is_own_BT
        weights_BT = self._weigh(log_probs_BT, entropies_BT, is_taught_BT)
        self.weighed = torch.stack([weights_BT.masked_fill(~is_taught_BT, 0).sum(), is_taught_BT.sum()])
        return weights_BT.masked_fill(is_own_BT, 1)

    def list_totals(self) -> Mapping[str, torch.Tensor]:
        """The weight of the rows' trained tokens."""
        return {} if self.weighed is None else {METRIC: self.weighed}

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Say where the tokens counted so little that the round taught next to nothing."""
        if trainer.args.process_index:
            return
        found = [row[METRIC] for row in round_.read_metrics() if METRIC in row]
        if found and (mean := sum(found) / len(found)) < LITTLE_WEIGHT:
            logger.warning(
                "method.token_weights: %s left a trained token %.2g of its weight on average, so that next to nothing was "
                "taught; %s", self.section.kind, mean,
                REMEDIES.get(self.section.kind, "lower its strength, or drop it"),
            )  # fmt: skip

    def _weigh(self, log_probs_BT: torch.Tensor, entropies_BT: torch.Tensor, is_trained_BT: torch.Tensor) -> torch.Tensor:
        """The same of tokens of rows alone."""
        log_probs_BT = log_probs_BT.detach().float()
        if self.section.kind in ("stm", "psft") and not self.section.strength:
            return torch.ones_like(log_probs_BT)
        if self.section.kind == "psft":
            ratios_BT = (log_probs_BT - self.start_log_probs_BT).exp()
            return torch.where(ratios_BT <= 1 + self.section.clip, ratios_BT.pow(self.section.strength), 0)
        if self.section.kind == "stm":
            is_known_BT = -self.start_log_probs_BT <= math.log(self.section.max_perplexity)
            return is_known_BT.float()
        if self.section.kind == "dft":
            logs_BT = log_probs_BT
        elif self.section.kind == "talr":
            logs_BT = log_probs_BT / find_temperature(log_probs_BT, is_trained_BT, self.documents_BT)
        else:
            shares_BT = entropies_BT.detach().float() / math.log(EAFT_TOKENS)
            logs_BT = shares_BT.clamp(torch.finfo(torch.float32).tiny, 1).log()
        return (self.section.strength * logs_BT).exp()


def find_temperature(
    log_probs_BT: torch.Tensor, is_trained_BT: torch.Tensor, documents_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Tau: the median over rows of the mean loss of their trained tokens; rows that train none do not count.

    Args:
        documents_BT: the row that each token is of, within a sequence of several; None where each sequence is one.
    """
    rows_BT = torch.zeros_like(is_trained_BT, dtype=torch.long) if documents_BT is None else documents_BT - documents_BT.min()
    sums_BR = log_probs_BT.new_zeros(len(rows_BT), int(rows_BT.max()) + 1)
    counts_BR = sums_BR.scatter_add(1, rows_BT, is_trained_BT.to(sums_BR.dtype))
    losses_BR = -sums_BR.scatter_add(1, rows_BT, log_probs_BT * is_trained_BT) / counts_BR
    is_counted_BR = counts_BR > 0
    tau = losses_BR[is_counted_BR].quantile(0.5) if bool(is_counted_BR.any()) else losses_BR.new_ones(())
    return tau.clamp(min=1e-6)  # a batch that is known by heart
