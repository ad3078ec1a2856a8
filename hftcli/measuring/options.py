"""The likelihood of what may follow a prompt: the choices of a question, or all of its right answers.

A prompt is read once, for all that may follow it: its keys and values are copied beside each option. That is what makes this
some times faster than reading a row for each option.

Shapes: B prompts of a batch, P tokens of a prompt, O options of a batch, S tokens of an option, V vocabulary, N options in all.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data.prepare import deal_rows
from hftcli.data.templates import find_template
from hftcli.data.tokens import IGNORED, Progress, Tokens, get_backend, ignore_progress, label_tokens, render_answer
from hftcli.errors import DataError
from hftcli.models.device import find_exact_device, make_exact

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096  # places in the cache of a batch, and more than the places whose logits it holds


@dataclass(frozen=True)
class Question:
    """A prompt with what may follow it.

    Attributes:
        prompt: the token ids that all options begin with; at least one.
        options: token ids of each option after these.
        nums_scored: how many of an option's tokens belong to it; tokens of the prompt that options do not share stand before.
    """

    prompt: list[int]
    options: list[list[int]]
    nums_scored: list[int]


def tokenize_questions(
    rows: Sequence[tuple[str | list[dict[str, str]], Sequence[str]]],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "task",
) -> list[Question]:
    """Tokenize each prompt together with each of its options where training puts it, as one text with no end token.

    Args:
        rows: prompts, each with its options.
        max_length: tokens of a prompt with an option. Where there are more, an option that is the only one loses its end, down
            to what the prompt leaves or to half of them, whichever is more; then the prompt its beginning, down to its last
            token, but for the special tokens with which every text begins.
        name: of the task, for messages.

    Raises:
        DataError: one of several options does not fit beside that.
    """
    if not rows:
        return []
    template = find_template(tokenizer)
    renderings = [
        render_answer(prompt, option, tokenizer, template, has_end=False) for prompt, options in rows for option in options
    ]
    texts = [rendering.text for rendering in renderings]
    encodings = get_backend(tokenizer).encode_batch(texts, add_special_tokens=renderings[0].is_plain)
    tokens = iter([label_tokens(*pair) for pair in zip(renderings, encodings, strict=True)])
    special = frozenset(tokenizer.all_special_ids)
    made = [_make_question([next(tokens) for _ in options], max_length, special) for _, options in rows]
    for number, (question, _, _) in enumerate(made, start=1):
        longest = max(map(len, question.options))
        if len(question.prompt) + longest > max_length:
            raise DataError(
                f"task {name}: question {number}: the longest of its {len(question.options)} answers has {longest} tokens, and "
                f"data.max_length {max_length} leaves no place for it beside the question's last token",
                "raise data.max_length",
            )
    num_cut, num_ends = sum(is_cut for _, is_cut, _ in made), sum(is_cut for _, _, is_cut in made)
    if num_cut:
        logger.warning("%d of %d prompts lose their beginning: they have more than %d tokens", num_cut, len(rows), max_length)
    if num_ends:
        logger.warning(
            "task %s: %d of %d answers lose their end: with their question they have more than %d tokens",
            name, num_ends, len(rows), max_length,
        )  # fmt: skip
    return [question for question, _, _ in made]


def _make_question(rows: Sequence[Tokens], max_length: int, special: frozenset[int]) -> tuple[Question, bool, bool]:
    """A question, whether its prompt is cut, and whether its only option is."""
    starts = [int((labels != IGNORED).nonzero()[0][0]) for _, labels in rows]
    first, _ = rows[0]
    num_shared = next(
        (place for place in range(min(starts)) if any(ids[place] != first[place] for ids, _ in rows)), min(starts)
    )
    options = [ids[num_shared:] for ids, _ in rows]
    nums_scored = [len(ids) - start for (ids, _), start in zip(rows, starts, strict=True)]
    room = max(max_length - num_shared, max_length // 2)
    if is_shortened := len(options) == 1 and len(options[0]) > room:  # all of it is scored: it shares its whole prompt
        options, nums_scored = [options[0][:room]], [room]
    num_first = next((place for place in range(num_shared) if first[place] not in special), num_shared)
    num_over = max(min(num_shared + max(map(len, options)) - max_length, num_shared - num_first - 1), 0)
    question = Question(first[:num_first] + first[num_first + num_over : num_shared], options, nums_scored)
    return question, num_over > 0, is_shortened


@torch.no_grad()
def read_options(
    model: PreTrainedModel,
    questions: Sequence[Question],
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    on_batch: Progress = ignore_progress,
) -> list[list[float]]:
    """Log-likelihood of each option of each question, in nats; the questions are dealt out over the ranks.

    Args:
        model: its weights are whole, and it makes passes of its own on each rank.
    """
    starts = list(accumulate((len(question.options) for question in questions), initial=0))
    log_likelihoods_N = torch.zeros(starts[-1], dtype=torch.float64, device=find_exact_device(device))
    lengths = [len(question.options) * (len(question.prompt) + max(map(len, question.options))) for question in questions]
    batches = deal_rows(lengths, BATCH_TOKENS, num_ranks)
    for index, batch in enumerate(batches):
        if own := batch[rank::num_ranks]:
            places = [place for row in own for place in range(starts[row], starts[row + 1])]
            log_likelihoods_N[places] = _read_batch(model, [questions[row] for row in own], device)
        on_batch(index + 1, len(batches))
    if num_ranks > 1:
        torch.distributed.all_reduce(log_likelihoods_N)
    found = log_likelihoods_N.tolist()
    return [found[start:end] for start, end in pairwise(starts)]


def _read_batch(model: PreTrainedModel, batch: list[Question], device: torch.device) -> torch.Tensor:
    """Log-likelihoods (O,), float64."""
    ids_BP, mask_BP = _pad([question.prompt for question in batch], device, left=True)
    positions_BP = (mask_BP.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits_B1V = model(
        input_ids=ids_BP, attention_mask=mask_BP, position_ids=positions_BP, cache=cache, use_cache=True,
        logits_to_keep=1,
    ).logits  # fmt: skip
    owners = [row for row, question in enumerate(batch) for _ in question.options]
    owner_O = torch.tensor(owners, device=device)
    options = [option for question in batch for option in question.options]
    nums_scored = [number for question in batch for number in question.nums_scored]
    ids_OS, mask_OS = _pad(options, device, left=False)
    is_scored_OS = mask_OS.bool()
    for row, (option, number) in enumerate(zip(options, nums_scored, strict=True)):
        is_scored_OS[row, : len(option) - number] = False
    # The prompt's last token predicts the first of each option, and each token of an option the next.
    logits_NV, targets_N = logits_B1V[:, 0][owner_O][is_scored_OS[:, 0]], ids_OS[:, 0][is_scored_OS[:, 0]]
    nats_N = make_exact(torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none"))
    places_N = is_scored_OS[:, 0].nonzero()[:, 0].to(nats_N.device)
    log_likelihoods_O = nats_N.new_zeros(len(options)).index_add(0, places_N, -nats_N)
    if ids_OS.shape[1] > 1:
        cache.reorder_cache(owner_O)
        positions_OS = positions_BP[owner_O, -1:] + 1 + torch.arange(ids_OS.shape[1] - 1, device=device)
        logits_OSV = model(
            input_ids=ids_OS[:, :-1], attention_mask=torch.cat([mask_BP[owner_O], mask_OS[:, :-1]], dim=-1),
            position_ids=positions_OS, cache=cache, use_cache=True,
        ).logits  # fmt: skip
        is_scored_OS = is_scored_OS[:, 1:]
        nats_N = make_exact(
            torch.nn.functional.cross_entropy(logits_OSV[is_scored_OS].float(), ids_OS[:, 1:][is_scored_OS], reduction="none")
        )
        places_N = is_scored_OS.nonzero()[:, 0].to(nats_N.device)
        log_likelihoods_O = log_likelihoods_O.index_add(0, places_N, -nats_N)
    return log_likelihoods_O


def _pad(rows: list[list[int]], device: torch.device, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and where they are, both (rows, longest)."""
    longest = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, ids in enumerate(rows):
        places = slice(longest - len(ids), None) if left else slice(len(ids))
        ids_BT[row, places] = torch.tensor(ids)
        mask_BT[row, places] = 1
    return ids_BT.to(device), mask_BT.to(device)
