"""Asking a model: the likelihood of right answers, and the answers that the model writes.

By likelihood, one forward pass over question and right answer. By generation, where a task's metric reads what the model
writes: left-padded batches with a cache, which a row leaves once its answer has ended. By options, where a question lists what
may be said (options.py).

Shapes: B rows of a batch, T tokens, P places where a row of the batch has an answer token, V vocabulary, N places of answers or
rows of a task, S tokens that are generated.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from hftcli.data.prepare import deal_rows
from hftcli.data.tokens import IGNORED, Progress, ignore_progress
from hftcli.measuring.questions import Row, TokenizedTask
from hftcli.models.device import count_batch_tokens, find_exact_device, make_exact

CACHED_TOKENS = 16384  # places in the cache of a batch that is generated: 8 GiB for Llama-2-7B in 16 bits
SAMPLING_SEED = 0  # of the draws of answers: a temperature gives the same answers every time
MEASURING_SEED = 1  # of texts by which a model is measured: by those of the other seed, what trains may have been chosen
NOTHING = -1  # where an answer has ended


def read_answers(
    model: torch.nn.Module,
    rows: Sequence[Row],
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    on_batch: Progress = ignore_progress,
) -> torch.Tensor:
    """Feed a model the right answers.

    Args:
        model: maps `input_ids` and `attention_mask` (B, T) to `logits` (B, T, V).

    Returns:
        (N, 3) in float64, on all ranks: nats of each answer, its tokens, and 1 where greedy decoding gives it exactly.
    """
    readings_N3 = torch.zeros(len(rows), 3, dtype=torch.float64, device=find_exact_device(device))
    batches = deal_rows([len(ids) for ids, _ in rows], count_batch_tokens(device), num_ranks)
    for index, batch in enumerate(batches):
        own = batch[rank::num_ranks]
        # A rank that has no row of its own passes only so that ZeRO 3 can gather.
        logits_NV, targets_N, is_answer_BT = predict_answers(model, [rows[row] for row in own or batch[:1]], device)
        if own:
            nats_N = make_exact(torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"))
            place_N = is_answer_BT.nonzero()[:, 0].to(nats_N.device)
            nats_B = nats_N.new_zeros(len(own)).index_add(0, place_N, nats_N)
            is_right_BT = torch.ones_like(is_answer_BT)
            is_right_BT[is_answer_BT] = logits_NV.argmax(-1) == targets_N
            counts_2B = [make_exact(values_B) for values_B in (is_answer_BT.sum(-1), is_right_BT.all(-1))]
            readings_N3[own] = torch.stack([nats_B, *counts_2B], dim=-1)
        on_batch(index + 1, len(batches))
    if num_ranks > 1:
        torch.distributed.all_reduce(readings_N3)
    return readings_N3.cpu()


def generate_answers(
    model: PreTrainedModel,
    asked: TokenizedTask,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    temperature: float = 0.0,
    on_batch: Progress = ignore_progress,
    keeps_end: bool = False,
    seed: int = SAMPLING_SEED,
) -> list[list[int]]:
    """Let a model answer a task's questions.

    Of its `generation_config` no more than the ends count, by `add_ends`, so that no checkpoint brings rules along.

    Args:
        keeps_end: whether the token that ended an answer stays.

    Returns:
        Token ids of each answer, on all ranks.
    """
    answers_NS = torch.zeros(len(asked.prompts), asked.num_new_tokens, dtype=torch.long, device=device)
    # One number for each place of each answer: what is drawn does not depend on the batch or the rank.
    generator = torch.Generator().manual_seed(seed)
    uniforms_NS = torch.rand(answers_NS.shape, dtype=torch.float64, generator=generator).to(find_exact_device(device))
    batches = deal_rows([len(prompt) + asked.num_new_tokens for prompt in asked.prompts], CACHED_TOKENS, num_ranks)
    for index, batch in enumerate(batches):
        if own := batch[rank::num_ranks]:
            prompts = [asked.prompts[row] for row in own]
            answers_NS[own] = _generate_batch(model, prompts, asked.end_ids, uniforms_NS[own], temperature, device)
        on_batch(index + 1, len(batches))
    if num_ranks > 1:
        torch.distributed.all_reduce(answers_NS)
    gone = {NOTHING} if keeps_end else {NOTHING, *asked.end_ids}  # an end is nowhere but at the end
    return [[token for token in answer if token not in gone] for answer in answers_NS.tolist()]


def _generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], end_ids: list[int], uniforms_BS: torch.Tensor, temperature: float,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Answers (B, S): token ids, and `NOTHING` behind the end token."""
    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    ends = torch.tensor(end_ids, device=device)
    answers_BS = torch.full(uniforms_BS.shape, NOTHING, device=device)
    going = torch.arange(len(prompts), device=device)  # rows whose answer has not ended
    cache = DynamicCache(config=model.config)
    for step in range(uniforms_BS.shape[1]):
        logits_BTV = model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, cache=cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        tokens_B = choose_tokens(logits_BTV[:, -1].float(), uniforms_BS[going.to(uniforms_BS.device), step], temperature)
        answers_BS[going, step] = tokens_B
        goes_on_B = ~torch.isin(tokens_B, ends)
        if not goes_on_B.all():
            going, tokens_B, mask_BT, positions_BT = (
                part[goes_on_B] for part in (going, tokens_B, mask_BT, positions_BT)
            )  # fmt: skip
            if not len(going):
                break
            cache.reorder_cache(goes_on_B.nonzero()[:, 0])
        ids_BT, positions_BT = tokens_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
    return answers_BS


def choose_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """Token ids (B,): the likeliest, or drawn by the inverse of the distribution function.

    Args:
        uniforms_B: in [0, 1), float64, where the logits' float64 is computed; one number decides one draw.
        temperature: what the logits are divided by; 0 takes the likeliest.
    """
    if not temperature:
        return logits_BV.argmax(-1)
    reached_BV = (make_exact(logits_BV) / temperature).softmax(-1).cumsum(-1)
    drawn_B1 = torch.searchsorted(reached_BV, uniforms_B[:, None] * reached_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1).to(logits_BV.device)


def predict_answers(
    model: torch.nn.Module, rows: list[Row], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model says at the N places before answer tokens: logits (N, V) in float32, targets (N,), and where they are."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (ids, labels) in enumerate(rows):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
        mask_BT[row, : len(ids)] = 1
    labels_BT[:, 0] = IGNORED  # nothing stands before it that could say it
    # Logits where no row has an answer would take most of the time and memory.
    wanted_P = (labels_BT != IGNORED).any(0).nonzero()[:, 0]
    logits_BPV = model(
        input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False,
        logits_to_keep=wanted_P.to(device) - 1,
    ).logits  # fmt: skip
    targets_BP = labels_BT[:, wanted_P].to(device)
    is_answer_BP = targets_BP != IGNORED
    return logits_BPV[is_answer_BP].float(), targets_BP[is_answer_BP], is_answer_BP
