"""The head and the loss of a forward pass, in one of two ways that give the same numbers up to rounding.

    chunked   TRL's: no two tiles of logits at once; the backward pass computes them again
    plain     the logits of the trained tokens are kept, so nothing is computed again

Where there is no GPU, TRL's kernel also multiplies what trains no token: prompts, padding.

Shapes: B, sequences; T, tokens of a sequence; N, tokens that some sequence of the batch trains on; V, the vocabulary.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from hftcli.freezing.activations import LossKernel

# What TRL's trainers ask their kernel for; the last one where `use_weighting` is set.
SFT_OUTPUTS = ("log_probs", "entropy", "is_top1")
DPO_OUTPUTS = (*SFT_OUTPUTS, "mean_logits", "log_sum_sq_probs")

# What each token counts, by its log-probability, its entropy and whether it is trained; None: all the same.
Weighing = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
# What each token has on top of its loss (B, N), by the log-probabilities at its place (B, N, V) and the token (B, N);
# None: nothing.
Penalty = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


def set_loss_kernel(model: PreTrainedModel, kernel: LossKernel) -> None:
    """Let a model answer `fused_lm_head=True` as in SFTTrainer."""
    add_fused_lm_head(model, outputs=SFT_OUTPUTS)
    if kernel == "plain":
        keep_logits(model, SFT_OUTPUTS)


@dataclass
class PenalizedOutput(FusedCausalLMOutput):
    """TRL's output, and what each token has on top of its loss, (B, T - 1)."""

    penalties: torch.Tensor | None = None


def shape_loss(model: PreTrainedModel, weighings: Sequence[Weighing]) -> None:
    """Have a model that has TRL's fused head weigh the tokens that it trains on and add penalties, where a graph is built."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> FusedCausalLMOutput | Any:
        found = plain(*args, **kwargs)
        if isinstance(found, FusedCausalLMOutput) and torch.is_grad_enabled():
            all_weights = [weigh(found.log_probs, found.entropy, found.label_mask) for weigh in weighings]
            for weights_BT in all_weights:
                found.log_probs = found.log_probs if weights_BT is None else found.log_probs * weights_BT
            if isinstance(found, PenalizedOutput) and found.penalties is not None:
                found.log_probs = found.log_probs - found.penalties
        return found

    model.forward = forward


def find_columns(labels_BT: torch.Tensor) -> torch.Tensor:
    """Places before tokens that some row trains on (N)."""
    return (labels_BT[:, 1:] != -100).any(0).nonzero().squeeze(-1)


def keep_logits(model: PreTrainedModel, outputs: Collection[str], penalties: Sequence[Penalty] = ()) -> None:
    """Have a model that has TRL's fused head keep its logits, wherever a graph is built.

    Args:
        outputs: fields of FusedCausalLMOutput to fill besides the log-probabilities; they have no gradient.
        penalties: what is added to the loss of each token.
    """
    chunked = model.forward

    @functools.wraps(chunked)
    def forward(
        *args: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> FusedCausalLMOutput | Any:
        if not fused_lm_head or labels is None or not torch.is_grad_enabled():
            return chunked(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        targets_BT = labels[:, 1:]
        mask_BT = targets_BT != -100
        columns_N = find_columns(labels)
        found = chunked(*args, logits_to_keep=columns_N, **kwargs)
        logits_BNV = found.logits.float()
        scores_BNV = torch.log_softmax(logits_BNV, dim=-1)
        targets_BN = targets_BT[:, columns_N].clamp(min=0)
        values = {"log_probs": scores_BNV.gather(-1, targets_BN.unsqueeze(-1)).squeeze(-1)}
        found_penalties = [penalty(scores_BNV, targets_BN) for penalty in penalties]
        if given := [penalty_BN for penalty_BN in found_penalties if penalty_BN is not None]:
            values["penalties"] = torch.stack(given).sum(0)
        with torch.no_grad():
            if "entropy" in outputs:
                values["entropy"] = -scores_BNV.exp().mul_(scores_BNV).sum(-1)
            if "is_top1" in outputs:
                values["is_top1"] = scores_BNV.argmax(-1) == targets_BN
            if "mean_logits" in outputs:
                values["mean_logits"] = logits_BNV.mean(-1)
            if "log_sum_sq_probs" in outputs:
                values["log_sum_sq_probs"] = (2 * scores_BNV).logsumexp(-1)
        fields = {
            name: torch.zeros_like(mask_BT, dtype=value.dtype).index_copy(1, columns_N, value).masked_fill(~mask_BT, 0)
            for name, value in values.items()
        }
        kind = PenalizedOutput if penalties else FusedCausalLMOutput
        return kind(label_mask=mask_BT, aux_loss=getattr(found, "aux_loss", None), **fields)

    model.forward = forward
