"""Text turned into tokens and labels; the questions of tasks, cut to length.

A token is trained when it covers a trained character, so one that straddles a border belongs to the completion. A question of a
task that is too long loses a part of its body, and never its answer or its end.

Shapes: T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import Rendering, render_row
from hftcli.data.contents import find_answer, render_opening
from hftcli.data.special import Encoded
from hftcli.data.templates import NO_TEMPLATE_FIX, Template, find_template
from hftcli.data.turns import Messages
from hftcli.errors import DataError, ModelError
from hftcli.recipe.sections import TrainSection
from hftcli.tasks.examples import Cut, Example, Task

IGNORED = -100  # the label of a token that is not trained
BATCH_SIZE = 1000  # rows tokenized at once; the tokenizer spreads them over the cores
TOKENS = datasets.List(datasets.Value("int32"))
TOKEN_FEATURES = datasets.Features(input_ids=TOKENS, labels=TOKENS)
PAIR_FEATURES = datasets.Features(prompt_ids=TOKENS, chosen_ids=TOKENS, rejected_ids=TOKENS)


Tokens = tuple[list[int], np.ndarray]  # ids, and labels (T,)
Columns = dict[str, list[list[int] | np.ndarray]]  # by the names of a dataset's columns, the tokens of each row
Progress = Callable[[int, int], None]  # called with what is done, and with all that there is


def ignore_progress(done: int, total: int) -> None:
    """What is done where nobody watches."""


def measure_percentiles(lengths: list[int]) -> dict[str, int]:
    """Lengths that half, nine tenths and all but a hundredth of the rows do not exceed, and the longest."""
    percentiles = {f"p{share}": int(np.percentile(lengths, share, method="nearest")) for share in (50, 90, 99)}
    return {**percentiles, "max": max(lengths)}


def tokenize_training(
    task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase, on_progress: Progress = ignore_progress
) -> tuple[Columns, dict[str, Any]]:
    """Tokenize a task's questions with their answers; those that do not fit without their body are dropped.

    Returns:
        The ids and labels of the questions that are left, and counts of a `DataReport`.

    Raises:
        DataError: none is left.
    """
    kept: Columns = {"input_ids": [], "labels": []}
    lengths: list[int] = []
    num_truncated = 0
    for start in range(0, len(task.examples), BATCH_SIZE):
        on_progress(start, len(task.examples))
        batch = task.examples[start : start + BATCH_SIZE]
        rows, whole = tokenize_examples(batch, task.cut, max_length, tokenizer, is_trained=True)
        for (ids, labels), length in zip(rows, whole, strict=True):
            lengths.append(length)
            if len(ids) > max_length:
                continue
            kept["input_ids"].append(ids)
            kept["labels"].append(labels)
            num_truncated += len(ids) < length
    on_progress(len(task.examples), len(task.examples))
    if not kept["input_ids"]:
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        raise DataError(
            f"task {task.name}: none of the {len(lengths)} questions fits in {max_length} tokens with its answer, even without "
            f"its body; the shortest, row {shortest + 1}, has {lengths[shortest]} tokens",
            "raise data.max_length",
        )
    return kept, {
        "num_used": len(kept["input_ids"]),
        "num_dropped": len(lengths) - len(kept["input_ids"]),
        "num_truncated": num_truncated,
        "length_percentiles": measure_percentiles(lengths),
    }


def tokenize_examples(
    examples: Sequence[Example], cut: Cut, max_length: int, tokenizer: PreTrainedTokenizerBase, is_trained: bool = False
) -> tuple[list[Tokens], list[int]]:
    """Token ids and labels of questions with their answers, as in training: the answer and its end have labels.

    Plain prompts lose what `max_length` asks for of their body, and of nothing else. What does not fit without its body stays
    longer than `max_length`, and so does a conversation.

    Args:
        is_trained: whether what a chat template prints between its generation prompt and the answer has labels too.

    Returns:
        The tokens of each question, and how many it has before the cut.

    Raises:
        ModelError: the tokenizer or its chat template does not serve.
    """
    render = _make_renderer(tokenizer, is_trained)
    rows, lengths, _ = _fit_examples(examples, cut, max_length, tokenizer, lambda example: render(example, example.answer))
    return rows, lengths


def _make_renderer(tokenizer: PreTrainedTokenizerBase, is_trained: bool = False) -> Callable[[Example, str], Rendering]:
    """What lays out a question with an answer as training does; one of several answers that are listed has no end."""
    template = find_template(tokenizer)

    def render(example: Example, answer: str) -> Rendering:
        return render_answer(example.prompt, answer, tokenizer, template, not example.options, is_trained)

    return render


def render_answer(
    prompt: str | Messages,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    has_end: bool = True,
    is_trained: bool = False,
) -> Rendering:
    """A question with an answer where training puts it.

    What a chat template prints between its generation prompt and the answer, such as a blank or an empty thought, is trained
    with the answer, and is a part of the question where that is asked: so the span begins with the answer's first character.

    Args:
        has_end: whether the end that is learned with the answer follows it.
        is_trained: whether the span is that of training, with what stands before the answer.

    Raises:
        DataError: the chat template does not render it.
        ModelError: the tokenizer has no chat template for a conversation, or no end token for plain text.
    """
    if isinstance(prompt, str) and not has_end:
        return Rendering(prompt + answer, [(len(prompt), len(prompt) + len(answer))], is_plain=True)
    if isinstance(prompt, str):
        return render_row({"prompt": prompt, "completion": answer}, tokenizer, template, TrainSection())
    template = _need_template(template)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    if not has_end:
        text = template.render(messages)
        start, end = find_answer(text, messages, template)
        return Rendering(text[:end], [(start, end)], is_plain=False)
    rendering = render_row({"prompt": prompt, "completion": messages[-1:]}, tokenizer, template, TrainSection())
    if is_trained:
        return rendering
    start, _ = find_answer(rendering.text, messages, template)
    spans = [(max(first, start), last) for first, last in rendering.spans if last > start]
    return Rendering(rendering.text, spans or [(start, start)], is_plain=False)


def render_prompt(prompt: str | Messages, template: Template | None) -> Rendering:
    """A question alone, up to where training puts its answer.

    Raises:
        DataError: the chat template does not render it.
        ModelError: it is a conversation, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return Rendering(prompt, [], is_plain=True)
    return Rendering(render_opening(prompt, _need_template(template)), [], is_plain=False)


def _need_template(template: Template | None) -> Template:
    if template is None:
        raise ModelError("the questions are conversations, but the tokenizer has no chat template", NO_TEMPLATE_FIX)
    return template


def tokenize_prompts(
    examples: Sequence[Example], cut: Cut, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of the questions alone, cut as `tokenize_examples` cuts them, ready to be answered.

    They are tokenized without their answers, which must not show in them.
    """
    return [layout.prompt for layout in lay_out_bare(examples, cut, max_length, tokenizer)]


@dataclass(frozen=True)
class Layout:
    """A question with room for an answer, laid out as training lays it out.

    Attributes:
        prompt: the token ids that stand before every right answer.
        lead: the end of the question's text where a token of an answer covers it too: what is written must begin with it.
        answers: the token ids of each right answer after the prompt, the lead and the end that is learned with them.
        is_cut: whether the question lost a part of its body.
    """

    prompt: list[int]
    lead: str
    answers: list[list[int]]
    is_cut: bool = False


def lay_out_bare(examples: Sequence[Example], cut: Cut, max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[Layout]:
    """The questions of `tokenize_prompts`, of which no right answer is known."""
    template = find_template(tokenizer)
    rows, lengths, _ = _fit_examples(
        examples, cut, max_length, tokenizer, lambda example: render_prompt(example.prompt, template)
    )  # fmt: skip
    return [Layout(ids, "", [], len(ids) < length) for (ids, _), length in zip(rows, lengths, strict=True)]


def lay_out_prompts(examples: Sequence[Example], cut: Cut, max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[Layout]:
    """The questions as they are asked, cut as `tokenize_prompts` cuts them.

    A tokenizer may join the end of a question and the beginning of its answer in one token. Training shows that token, so a
    model is asked before it. Of the answer no more shows in what is asked than where that border lies.
    """
    render = _make_renderer(tokenizer)

    def render_alone(example: Example) -> Rendering:
        answered = render(example, _list_answers(example)[0])
        return Rendering(answered.text[: answered.spans[0][0]], [], answered.is_plain)

    alone, lengths, shortened = _fit_examples(examples, cut, max_length, tokenizer, render_alone)
    backend, layouts = get_backend(tokenizer), []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = shortened[start : start + BATCH_SIZE]
        renderings = [render(example, answer) for example in batch for answer in _list_answers(example)]
        encodings = backend.encode_batch([one.text for one in renderings], add_special_tokens=renderings[0].is_plain)
        made = iter(zip(renderings, encodings, strict=True))
        for example, (ids, _) in zip(batch, alone[start : start + BATCH_SIZE], strict=True):
            layouts.append(_find_border(ids, [next(made) for _ in _list_answers(example)], tokenizer))
    return [replace(layout, is_cut=len(ids) < length) for layout, (ids, _), length in zip(layouts, alone, lengths, strict=True)]


def _list_answers(example: Example) -> tuple[str, ...]:
    """All right answers of a question whose answer is generated."""
    return example.options or (example.answer,)


def _find_border(
    alone: list[int], answered: Sequence[tuple[Rendering, tokenizers.Encoding]], tokenizer: PreTrainedTokenizerBase
) -> Layout:
    """Where the tokens of a question end in all of its layouts.

    Args:
        alone: the question alone, as it stands before the first answer.
        answered: with each right answer.
    """
    rows = [label_tokens(*pair) for pair in answered]
    starts = [next(iter((labels != IGNORED).nonzero()[0].tolist()), len(labels)) for _, labels in rows]
    first, _ = rows[0]
    border = next((place for place in range(min(starts)) if any(ids[place] != first[place] for ids, _ in rows)), min(starts))
    whole, prompt = (
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in (alone, first[:border])
    )
    # An answer that brings a thought of its own stands behind another beginning: then the first one's is asked.
    text = answered[0][0].text[: answered[0][0].spans[0][0]]
    if not all(rendering.text.startswith(text) for rendering, _ in answered) or not whole.startswith(prompt):
        return Layout(alone, "", [ids[start:] for (ids, _), start in zip(rows, starts, strict=True)])
    return Layout(first[:border], whole[len(prompt) :], [ids[border:] for ids, _ in rows])


def _fit_examples(
    examples: Sequence[Example],
    cut: Cut,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[Example], Rendering],
) -> tuple[list[Tokens], list[int], list[Example]]:
    """The tokens of each, how many they are before the cut, and the examples after it."""
    backend = get_backend(tokenizer)
    rows: list[Tokens] = [([], np.array([], dtype=int))] * len(examples)
    lengths = [0] * len(examples)
    shortened = list(examples)
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
                    longer[index] = shortened[index] = shorter
        pending = longer
    return rows, lengths, shortened


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
    prompt = str(example.prompt)[: gone[0]] + str(example.prompt)[gone[1] :]
    return replace(example, prompt=prompt, body=(first, last - (gone[1] - gone[0])))


def label_tokens(rendering: Rendering, encoding: tokenizers.Encoding | Encoded) -> Tokens:
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
