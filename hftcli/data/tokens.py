"""Text turned into tokens and labels: tokenized, masked, cut to length, packed.

Every format goes one way. A token is trained when it covers a trained character, so one that straddles a border belongs to the
completion. A preference pair goes this way twice, once with each answer, and comes out as the tokens of the prompt and of both
answers. A question of a task goes this way too, but where it is too long it loses a part of its body, and never its answer or
its end.

Shapes: T tokens of a row.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import tokenizers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from hftcli.data.chat import Rendering, Template, find_template, render_row
from hftcli.data.rows import Row, describe_place, is_conversation, naming_row
from hftcli.errors import DataError, ModelError
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.tasks.examples import Cut, Example, Task

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not trained
BATCH_SIZE = 1000  # rows tokenized at once; the tokenizer spreads them over the cores
TOKENS = datasets.List(datasets.Value("int32"))
TOKEN_FEATURES = datasets.Features(input_ids=TOKENS, labels=TOKENS)
PAIR_FEATURES = datasets.Features(prompt_ids=TOKENS, chosen_ids=TOKENS, rejected_ids=TOKENS)


Tokens = tuple[list[int], np.ndarray]  # ids, and labels (T,)
Progress = Callable[[int, int], None]  # called with what is done, and with all that there is


def ignore_progress(done: int, total: int) -> None:
    pass


def tokenize_dataset(
    rows: Dataset,
    data: DataSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Progress = ignore_progress,
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenize canonical rows, cut them to `data.max_length` and drop those that lose every trained token.

    Returns:
        The tokens of the rows that are left, and the counts of a `DataReport` that do not depend on packing.
    """
    template, place = find_template(tokenizer), describe_place(data)
    parts, lengths = [], []
    counts = {"num_used": 0, "num_truncated": 0, "num_tokens": 0, "num_trained_tokens": 0}
    for start in range(0, len(rows), BATCH_SIZE):
        on_progress(start, len(rows))
        batch = rows.skip(start).take(BATCH_SIZE).to_list()
        tokenized = tokenize_rows(batch, place, start + 1, tokenizer, template, train)
        if start == 0 and is_conversation(batch[0]) and train.assistant_only_loss:
            _warn_if_endless(tokenized[0][1], tokenizer)
        kept: dict[str, list] = {"input_ids": [], "labels": []}
        for ids, labels in tokenized:
            lengths.append(len(ids))
            cut_ids, cut_labels = ids[: data.max_length], labels[: data.max_length]
            if num_trained := int((cut_labels != IGNORED).sum()):
                kept["input_ids"].append(cut_ids)
                kept["labels"].append(cut_labels)
                counts["num_used"] += 1
                counts["num_truncated"] += len(cut_ids) < len(ids)
                counts["num_tokens"] += len(cut_ids)
                counts["num_trained_tokens"] += num_trained
        parts.append(Dataset.from_dict(kept, features=TOKEN_FEATURES))
    on_progress(len(rows), len(rows))
    if not counts["num_used"]:
        raise DataError(
            f"{place}: none of the {len(rows)} rows has a trained token among its first {data.max_length} tokens",
            "raise data.max_length",
        )
    return datasets.concatenate_datasets(parts), {
        **counts,
        "num_dropped": len(rows) - counts["num_used"],
        "length_percentiles": measure_percentiles(lengths),
    }


def measure_percentiles(lengths: list[int]) -> dict[str, int]:
    percentiles = {f"p{share}": int(np.percentile(lengths, share, method="nearest")) for share in (50, 90, 99)}
    return {**percentiles, "max": max(lengths)}


def tokenize_pairs(
    rows: Dataset, data: DataSection, tokenizer: PreTrainedTokenizerBase, on_progress: Progress = ignore_progress
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenize canonical pairs and cut them to `data.max_length`; those whose prompt leaves no room for an answer are dropped.

    Returns:
        The tokens of the pairs that are left, and the counts of a `DataReport`.
    """
    template, place = find_template(tokenizer), describe_place(data)
    kept: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    lengths: list[int] = []
    num_truncated = num_identical = 0
    for start in range(0, len(rows), BATCH_SIZE):
        on_progress(start, len(rows))
        batch = rows.skip(start).take(BATCH_SIZE).to_list()
        answered = [
            tokenize_rows(
                [{"prompt": row["prompt"], "completion": row[name]} for row in batch],
                place, start + 1, tokenizer, template, TrainSection(),
            )
            for name in ("chosen", "rejected")
        ]  # fmt: skip
        if start == 0 and is_conversation(batch[0]):
            _warn_if_endless(answered[0][0][1], tokenizer)
        for chosen, rejected in zip(*answered, strict=True):
            prompt, *answers = split_pair(chosen, rejected)
            room = max(data.max_length - len(prompt), 0)
            cut = [answer[:room] for answer in answers]
            lengths += [len(prompt) + len(answer) for answer in answers]
            if not room:
                continue
            is_identical = cut[0] == cut[1]
            num_identical += is_identical
            if is_identical and data.drop_identical:
                continue
            num_truncated += cut != answers
            for name, ids in zip(kept, (prompt, *cut), strict=True):
                kept[name].append(ids)
    on_progress(len(rows), len(rows))
    num_used, num_trained = len(kept["prompt_ids"]), sum(map(len, kept["chosen_ids"] + kept["rejected_ids"]))
    if not num_used:
        raise DataError(
            f"{place}: none of the {len(rows)} pairs has two answers among its first {data.max_length} tokens",
            "raise data.max_length",
        )
    return Dataset.from_dict(kept, features=PAIR_FEATURES), {
        "num_used": num_used,
        "num_dropped": len(rows) - num_used,
        "num_truncated": num_truncated,
        "num_identical": num_identical,
        "num_tokens": 2 * sum(map(len, kept["prompt_ids"])) + num_trained,
        "num_trained_tokens": num_trained,
        "length_percentiles": measure_percentiles(lengths),
    }


def split_pair(chosen: Tokens, rejected: Tokens) -> tuple[list[int], list[int], list[int]]:
    """The tokens that both sequences begin with and neither trains, and the rest of each up to its last trained token."""
    (chosen_ids, chosen_labels), (rejected_ids, rejected_labels) = chosen, rejected
    trained = [(labels != IGNORED).nonzero()[0] for labels in (chosen_labels, rejected_labels)]
    border = min(trained[0][0], trained[1][0])
    # A token may straddle the border in one of them only.
    border = next((i for i in range(border) if chosen_ids[i] != rejected_ids[i]), int(border))
    return chosen_ids[:border], chosen_ids[border : trained[0][-1] + 1], rejected_ids[border : trained[1][-1] + 1]


def tokenize_rows(
    rows: list[Row],
    place: str,
    first_number: int,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    train: TrainSection,
) -> list[Tokens]:
    """Token ids and labels of canonical rows, whole.

    Args:
        place: where the rows are from; with `first_number`, the number of the first of them, it names a bad one.
    """
    renderings = []
    for number, row in enumerate(rows, start=first_number):
        with naming_row(place, number):
            renderings.append(render_row(row, tokenizer, template, train))
    encodings = get_backend(tokenizer).encode_batch(
        [rendering.text for rendering in renderings], add_special_tokens=renderings[0].is_plain
    )
    tokenized = []
    for number, (rendering, encoding) in enumerate(zip(renderings, encodings, strict=True), start=first_number):
        ids, labels = label_tokens(rendering, encoding)
        if not rendering.is_plain and train.assistant_only_loss:
            with naming_row(place, number):
                _check_mask(labels)
        tokenized.append((ids, labels))
    return tokenized


def tokenize_training(
    task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase, on_progress: Progress = ignore_progress
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenize a task's questions with their answers; those that do not fit without their body are dropped.

    Returns:
        The tokens of the questions that are left, and the counts of a `DataReport`.

    Raises:
        DataError: none is left.
    """
    kept: dict[str, list] = {"input_ids": [], "labels": []}
    lengths: list[int] = []
    num_truncated = num_trained = 0
    for start in range(0, len(task.examples), BATCH_SIZE):
        on_progress(start, len(task.examples))
        rows, whole = tokenize_examples(task.examples[start : start + BATCH_SIZE], task.cut, max_length, tokenizer)
        for (ids, labels), length in zip(rows, whole, strict=True):
            lengths.append(length)
            if len(ids) > max_length:
                continue
            kept["input_ids"].append(ids)
            kept["labels"].append(labels)
            num_truncated += len(ids) < length
            num_trained += int((labels != IGNORED).sum())
    on_progress(len(task.examples), len(task.examples))
    if not kept["input_ids"]:
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        raise DataError(
            f"task {task.name}: none of the {len(lengths)} questions fits in {max_length} tokens with its answer, even without "
            f"its body; the shortest, row {shortest + 1}, has {lengths[shortest]} tokens",
            "raise data.max_length",
        )
    return Dataset.from_dict(kept, features=TOKEN_FEATURES), {
        "num_used": len(kept["input_ids"]),
        "num_dropped": len(lengths) - len(kept["input_ids"]),
        "num_truncated": num_truncated,
        "num_tokens": sum(map(len, kept["input_ids"])),
        "num_trained_tokens": num_trained,
        "length_percentiles": measure_percentiles(lengths),
    }


def tokenize_examples(
    examples: Sequence[Example], cut: Cut, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tokens], list[int]]:
    """Token ids and labels of questions with their answers, as in training: the answer and its end have labels.

    Plain prompts lose what `max_length` asks for of their body, and of nothing else. What does not fit without its body stays
    longer than `max_length`, and so does a conversation.

    Returns:
        The tokens of each question, and how many it has before the cut.

    Raises:
        ModelError: the tokenizer or its chat template does not serve.
    """
    template = find_template(tokenizer)

    def render(example: Example) -> Rendering:
        completion = example.answer
        if not isinstance(example.prompt, str):
            completion = [{"role": "assistant", "content": example.answer}]
        return render_row({"prompt": example.prompt, "completion": completion}, tokenizer, template, TrainSection())

    return _fit_examples(examples, cut, max_length, tokenizer, render)


def tokenize_prompts(
    examples: Sequence[Example], cut: Cut, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of the questions alone, cut as `tokenize_examples` cuts them, ready to be answered.

    They are tokenized without their answers, which must not show in them.
    """
    template = find_template(tokenizer)

    def render(example: Example) -> Rendering:
        if isinstance(example.prompt, str):
            return Rendering(example.prompt, [], is_plain=True)
        return Rendering(template.render(example.prompt, add_generation_prompt=True), [], is_plain=False)

    rows, _ = _fit_examples(examples, cut, max_length, tokenizer, render)
    return [ids for ids, _ in rows]


def _fit_examples(
    examples: Sequence[Example],
    cut: Cut,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[Example], Rendering],
) -> tuple[list[Tokens], list[int]]:
    backend = get_backend(tokenizer)
    rows: list[Tokens] = [([], np.array([], dtype=int))] * len(examples)
    lengths = [0] * len(examples)
    pending = dict(enumerate(examples))
    while pending:  # after the first cut, the tokens where the rest is joined may be a few more than counted
        renderings = [render(example) for example in pending.values()]
        texts = [rendering.text for rendering in renderings]
        encodings = backend.encode_batch(texts, add_special_tokens=renderings[0].is_plain)
        longer = {}
        for (index, example), rendering, encoding in zip(pending.items(), renderings, encodings, strict=True):
            rows[index] = label_tokens(rendering, encoding)
            length = len(rows[index][0])
            lengths[index] = lengths[index] or length
            if length > max_length and rendering.is_plain:
                shorter = cut_body(example, cut, encoding.offsets, length - max_length)
                if shorter != example:
                    longer[index] = shorter
        pending = longer
    return rows, lengths


def cut_body(example: Example, cut: Cut, offsets: Sequence[tuple[int, int]], num_over: int) -> Example:
    """A plain question without so many tokens of its body, or without its body where that has no more.

    Args:
        offsets: the characters of each token of a text that begins with the prompt.
        num_over: tokens to take away, at least 1.
    """
    first, last = example.body or (0, len(example.prompt))
    inside = [(start, end) for start, end in offsets if first <= start < end <= last]
    gone = (first, last)
    if num_over < len(inside):
        kept = len(inside) - num_over
        skipped = {"start": 0, "middle": kept // 2, "end": kept}[cut]
        run = inside[skipped : skipped + num_over]
        gone = (run[0][0], run[-1][1])
    prompt = example.prompt[: gone[0]] + example.prompt[gone[1] :]
    return dataclasses.replace(example, prompt=prompt, body=(first, last - (gone[1] - gone[0])))


def label_tokens(rendering: Rendering, encoding: tokenizers.Encoding) -> Tokens:
    """Token ids, and labels (T,): the ids of tokens that cover a trained character, `IGNORED` for the others."""
    ids = np.array(encoding.ids)
    starts, ends = np.array(encoding.offsets).T
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in rendering.spans:
        trained |= (ends > start) & (starts < end)
    # The text brings its own end token, so one that the tokenizer adds would be the second.
    length = len(ids) - encoding.special_tokens_mask[-1]
    return encoding.ids[:length], np.where(trained, ids, IGNORED)[:length]


def get_backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """The Rust tokenizer, which knows the characters of each token, set to neither cut nor pad.

    Raises:
        ModelError: there is none.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer {tokenizer.name_or_path} has no tokenizer.json", "convert it to a fast one")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_mask(labels: np.ndarray) -> None:
    trained = (labels != IGNORED).nonzero()[0]
    if not len(trained):
        reason = "none of its tokens is trained: the chat template marks nothing as the assistant's"
    elif len(trained) == trained[-1] + 1:  # white space at the end is never trained
        reason = "all of its tokens are trained: the chat template marks everything as the assistant's"
    else:
        return
    raise DataError(reason, "mend the {% generation %} markers of the template, or set train.assistant_only_loss: false")


def _warn_if_endless(labels: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so when no end token is among what is trained."""
    if labels[labels != IGNORED][-1] not in tokenizer.get_added_vocab().values():
        logger.warning(
            "the chat template of %s ends the assistant's turn with no special token: the model will not learn to stop",
            tokenizer.name_or_path or "the tokenizer",
        )


def pack_rows(tokens: Dataset, max_length: int) -> Dataset:
    """Lay rows side by side into sequences of `max_length` tokens; `seq_lengths` tells them apart."""
    return pack_dataset(tokens, max_length, "bfd", {"keep_in_memory": True})
