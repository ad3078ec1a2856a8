"""Scoring one model on tasks, by likelihood: no text is generated.

Greedy decoding gives an answer to the letter exactly when, with the right answer fed in, every one of its tokens (the end token
included) is the most likely at its place. So one forward pass gives both the exact match and the likelihood.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from hftcli.data import IGNORED, tokenize_answer
from hftcli.errors import ModelError
from hftcli.run import Score
from hftcli.tasks import Task

BATCH_TOKENS = 8192  # padded tokens in a forward pass


Row = tuple[list[int], list[int]]  # token ids, and labels that are ids where the answer is


def tokenize_task(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """A task's questions with their answers, laid out as in training.

    Raises:
        ModelError: the task asks in conversations, and the tokenizer has no chat template.
    """
    try:
        return [tokenize_answer(example.prompt, example.answer, tokenizer) for example in task.examples]
    except ModelError as error:
        raise ModelError(f"task {task.name}: {error.message}", error.fix) from None


@torch.no_grad()
def score_rows(
    model: torch.nn.Module,
    rows: Sequence[Row],
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a model on a task's rows; they are dealt out over the ranks, which must all call this together.

    Args:
        model: maps `input_ids` and `attention_mask` (B, T) to `logits` (B, T, V); left in the mode it came in.
        on_batch: called with batches done and in all.
    """
    batches = _deal_batches(rows, num_ranks)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # exact answers, nats, answer tokens
    was_training = model.training
    model.eval()
    for index, batch in enumerate(batches):
        totals += _score_batch(model, batch[rank::num_ranks] or batch[:1], bool(batch[rank::num_ranks]), device)
        on_batch(index + 1, len(batches))
    model.train(was_training)
    if num_ranks > 1:
        torch.distributed.all_reduce(totals)
    num_exact, nats, num_tokens = totals.tolist()
    return Score(exact_match=num_exact / len(rows), nll=nats / num_tokens, num_examples=len(rows))


def _deal_batches(rows: Sequence[Row], num_ranks: int) -> list[list[Row]]:
    """Rows of like length together; each batch is shared by all ranks, so that they make the same number of passes."""
    ordered = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    batches = []
    while ordered:
        size = max(BATCH_TOKENS // len(ordered[0][0]), 1) * num_ranks
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


def _score_batch(model: torch.nn.Module, rows: list[Row], counts: bool, device: torch.device) -> torch.Tensor:
    """Exact answers, nats and answer tokens of a batch, as (3,) float64.

    Args:
        counts: False for a rank that has no row of its own and passes only so that ZeRO 3 can gather.
    """
    longest = max(len(ids) for ids, _ in rows)
    input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (ids, labels) in enumerate(rows):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
        mask_BT[row, : len(ids)] = 1
    logits_BTV = model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
    targets_BT = labels_BT[:, 1:].to(device)
    is_answer_BT = targets_BT != IGNORED
    logits_NV = logits_BTV[:, :-1][is_answer_BT].float()
    targets_N = targets_BT[is_answer_BT]
    nats = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    is_right_BT = torch.ones_like(is_answer_BT)
    is_right_BT[is_answer_BT] = logits_NV.argmax(-1) == targets_N
    return counts * torch.stack([is_right_BT.all(-1).sum().double(), nats.double(), is_answer_BT.sum().double()])
