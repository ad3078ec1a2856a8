"""From the tokens that a model wrote to a score, and whether a right answer can be given at all.

The second is the check of the first: every right answer is read as if a perfect model had written it. What does not come out as
right is a fault of the question, its tokens or its limits, and of no model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hftcli.data.tokens import Layout
from hftcli.tasks.examples import Example, Task
from hftcli.tasks.metrics import METRICS

GOING_ON = " and so on"  # what follows where nothing ends an answer


@dataclass(frozen=True)
class Grade:
    """What one answer is worth.

    Attributes:
        text: what was written, as far as it counts.
        score, lenient: in [0, 1].
        is_cut: whether it had not ended where it was cut.
    """

    text: str
    score: float
    lenient: float
    is_cut: bool = False


def grade_answer(
    task: Task, example: Example, layout: Layout, written: list[int], tokenizer: PreTrainedTokenizerBase,
    num_new_tokens: int | None = None,
) -> Grade:  # fmt: skip
    """Judge what was written after a question, token ids without the end.

    Args:
        num_new_tokens: where an answer that had not ended was cut; None where none was.
    """
    text, is_begun = read_written(task, layout, written, tokenizer)
    metric = METRICS[task.metric]
    is_cut = len(written) == num_new_tokens and not _is_stopped(task, layout, written, tokenizer)
    return Grade(text, metric.strict(text, example) if is_begun else 0.0, metric.lenient(text, example), is_cut)


def _is_stopped(task: Task, layout: Layout, written: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a character ends an answer, within a token that does not."""
    text = decode_answer(layout.prompt, written, tokenizer).removeprefix(layout.lead)
    return any(stop in text for stop in task.stops)


def read_written(
    task: Task, layout: Layout, written: list[int], tokenizer: PreTrainedTokenizerBase, more: str = ""
) -> tuple[str, bool]:
    """What was written, as far as it counts, and whether it begins with the end of the question as it must.

    Args:
        more: text that follows the tokens.
    """
    text = decode_answer(layout.prompt, written, tokenizer) + more
    return cut_answer(text.removeprefix(layout.lead), task.stops), text.startswith(layout.lead)


def decode_answer(prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that an answer adds to its prompt: alone, it would lose the space that some decoders take from a beginning."""

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return decode(prompt + answer)[len(decode(prompt)) :]


def cut_answer(text: str, stops: str) -> str:
    """The text before the first of the characters, without blanks around it; the text itself where nothing stops it."""
    if not stops:
        return text
    return re.split(f"[{re.escape(stops)}]", text, maxsplit=1)[0].strip()


def find_faults(
    task: Task, layouts: Sequence[Layout], end_ids: Sequence[int], num_new_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> dict[int, str]:
    """Questions of which a right answer does not get 1 from a model that writes it, by index from 0, and why."""
    faults = {}
    for index, (example, layout) in enumerate(zip(task.examples, layouts, strict=True)):
        for answer in layout.answers:
            if fault := _find_fault(task, example, layout, answer, end_ids, num_new_tokens, tokenizer):
                faults[index] = fault
                break
    return faults


def _find_fault(
    task: Task,
    example: Example,
    layout: Layout,
    answer: list[int],
    end_ids: Sequence[int],
    num_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    end = find_end(answer, end_ids)
    written = answer[:end]
    is_ended = end < len(answer) or bool(example.options)  # of several right answers none is learned with its end
    text, is_begun = read_written(task, layout, written, tokenizer, "" if is_ended else GOING_ON)
    if not _is_right(task, example, text, is_begun):
        if end < len(answer) - 1:
            return f"the end token {tokenizer.decode(answer[end : end + 1])} stands in its answer"
        return "no token ends its answer" if not is_ended else f"its answer is read as {text[:60]!r}"
    if len(written) > num_new_tokens:
        text, is_begun = read_written(task, layout, written[:num_new_tokens], tokenizer)
        if not _is_right(task, example, text, is_begun):
            return f"its answer has {len(written)} tokens, and no more than {num_new_tokens} are written"
    return None


def _is_right(task: Task, example: Example, text: str, is_begun: bool) -> bool:
    metric = METRICS[task.metric]
    return is_begun and metric.strict(text, example) >= metric.least


def find_end(answer: list[int], end_ids: Sequence[int]) -> int:
    """The place of the first token that ends an answer, or its length."""
    return next((place for place, token in enumerate(answer) if token in end_ids), len(answer))


def find_longest(
    task: Task, layouts: Sequence[Layout], end_ids: Sequence[int], num_new_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> int:
    """How many tokens must be written so that no right answer is wrong for its length alone; no fewer than now."""
    longest = num_new_tokens
    for example, layout in zip(task.examples, layouts, strict=True):
        for answer in layout.answers:
            end = find_end(answer, end_ids)
            # What decides a score may be less than the whole, such as a first character.
            if end > longest and not _is_right(task, example, *read_written(task, layout, answer[:longest], tokenizer)):
                longest = end
    return longest
