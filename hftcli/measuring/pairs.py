"""Scoring one model on preference pairs, beside the reference that it started as.

Shapes: B rows of a batch, T tokens, V vocabulary, N places of answers, K draws of the reference at a place.
"""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset

from hftcli.data.prepare import deal_pairs
from hftcli.data.tokens import IGNORED, Progress, ignore_progress
from hftcli.measuring.asking import predict_answers
from hftcli.measuring.questions import Row
from hftcli.models.device import count_batch_tokens, make_exact
from hftcli.runs.scores import PairScore

NUM_DRAWS = 8  # tokens that the reference draws at every place of an answer, to estimate its KL to the model


@dataclass(frozen=True)
class Reading:
    """What a model says of the answers of one batch of pairs.

    Attributes:
        log_probs_B2: of the chosen and the rejected answer, float64.
        drawn_NK: tokens that the reference drew at the N places of the answers.
        drawn_log_probs_NK: how likely the model finds them.
    """

    log_probs_B2: torch.Tensor
    drawn_NK: torch.Tensor
    drawn_log_probs_NK: torch.Tensor


@torch.no_grad()
def read_pairs(
    model: torch.nn.Module,
    pairs: Dataset,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    reference: list[Reading] | None = None,
    on_batch: Progress = ignore_progress,
) -> list[Reading]:
    """Let a model read preference pairs; they are dealt out over the ranks, which must all call this together.

    Args:
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, as data.py makes them.
        reference: what the reference read of them; None where the model is the reference.

    Returns:
        The readings of this rank's pairs.
    """
    batches = [[pairs[row] for row in rows] for rows in deal_pairs(pairs, count_batch_tokens(device), num_ranks)]
    readings: list[Reading] = []
    was_training = model.training
    model.eval()
    for index, batch in enumerate(batches):
        own = batch[rank::num_ranks]
        rows = [_label_answer(pair, name) for pair in own or batch[:1] for name in ("chosen_ids", "rejected_ids")]
        logits_NV, targets_N, is_answer_BT = predict_answers(model, rows, device)
        if own:  # a rank without a pair of its own passes only so that ZeRO 3 can gather
            drawn_NK = None if reference is None else reference[len(readings)].drawn_NK.to(device)
            readings.append(_read_batch(logits_NV.log_softmax(-1), targets_N, is_answer_BT, drawn_NK, seed=index))
        on_batch(index + 1, len(batches))
    model.train(was_training)
    return readings


def _label_answer(pair: dict[str, list[int]], name: str) -> Row:
    return pair["prompt_ids"] + pair[name], [IGNORED] * len(pair["prompt_ids"]) + pair[name]


def _read_batch(
    log_probs_NV: torch.Tensor, targets_N: torch.Tensor, is_answer_BT: torch.Tensor, drawn_NK: torch.Tensor | None, seed: int
) -> Reading:
    picked_N = make_exact(log_probs_NV.gather(-1, targets_N[:, None])[:, 0])
    places_N = is_answer_BT.nonzero()[:, 0].to(picked_N.device)
    sums_B = picked_N.new_zeros(len(is_answer_BT)).index_add(0, places_N, picked_N)
    if drawn_NK is None:
        generator = torch.Generator(log_probs_NV.device).manual_seed(seed)
        drawn_NK = torch.multinomial(log_probs_NV.exp(), NUM_DRAWS, replacement=True, generator=generator)
    return Reading(sums_B.view(-1, 2).cpu(), drawn_NK.cpu(), log_probs_NV.gather(-1, drawn_NK).cpu().double())


def score_pairs(
    readings: list[Reading], reference: list[Reading], beta: float, device: torch.device, num_ranks: int = 1
) -> PairScore:
    """Compare what the model reads with what the reference read; the ranks must all call this together.

    KL is estimated without bias, and never below zero for a draw, by r - 1 - log r of the likelihood ratios r of tokens that
    the reference drew (estimator k3 of http://joschu.net/blog/kl-approx.html).
    """
    totals = torch.zeros(6, dtype=torch.float64)  # pairs won, margins, likelier answers, pairs, KL, draws
    for model, start in zip(readings, reference, strict=True):
        margins_B = beta * (model.log_probs_B2 - start.log_probs_B2).diff(dim=-1)[:, 0].neg()
        likelier_B = model.log_probs_B2[:, 0] > model.log_probs_B2[:, 1]
        log_ratios_NK = model.drawn_log_probs_NK - start.drawn_log_probs_NK
        kl = (log_ratios_NK.exp() - 1 - log_ratios_NK).sum()
        won = ((margins_B > 0).double() + (margins_B == 0).double() / 2).sum()
        counts = (margins_B.sum(), likelier_B.sum().double(), torch.tensor(len(margins_B)).double(), kl)
        totals += torch.stack([won, *counts, torch.tensor(log_ratios_NK.numel()).double()])
    if num_ranks > 1:
        totals = totals.to(device)
        torch.distributed.all_reduce(totals)
    won, margin, likelier, num_pairs, kl, num_draws = totals.tolist()
    accuracy = won / num_pairs
    return PairScore(
        reward_accuracy=accuracy,
        reward_accuracy_error=math.sqrt(accuracy * (1 - accuracy) / num_pairs),
        reward_margin=margin / num_pairs,
        likelihood_accuracy=likelier / num_pairs,
        kl=kl / num_draws,
        num_pairs=int(num_pairs),
    )
