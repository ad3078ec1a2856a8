"""The questions of tasks without what would stand in them twice, as rows are without it (special.py)."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import Rendering, strip_end
from hftcli.data.special import Findings, SpecialTokens, list_texts
from hftcli.data.templates import find_template
from hftcli.data.tokens import get_backend, label_tokens
from hftcli.errors import DataError
from hftcli.recipe.sections import SpecialTokenPolicy
from hftcli.tasks.examples import Example, Task

logger = logging.getLogger(__name__)


def tidy_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, policy: SpecialTokenPolicy = "keep"
) -> tuple[Task, dict[str, Any]]:
    """A task whose questions and answers do not bring a beginning or an end of their own.

    Args:
        policy: what becomes of other special tokens in them: `keep` leaves them and counts them, and the caller says so
            (`say_special`); the others refuse them, since of a question nothing is made plain text.

    Returns:
        The task, and counts of a `DataReport`: `doubled`, `num_special` and `special_tokens`.

    Raises:
        DataError: an answer is nothing but special tokens, or there are others and the policy does not keep them.
        ModelError: the tokenizer or its chat template does not serve.
    """
    get_backend(tokenizer)
    special = SpecialTokens(tokenizer, find_template(tokenizer))
    examples: list[Example] = []
    doubled, tokens, num_special = Counter[str](), Counter[str](), 0
    for number, example in enumerate(task.examples, start=1):
        try:
            tidied, findings = tidy_example(example, special)
            if findings.special and policy != "keep":
                raise _describe_special(findings, policy)
        except DataError as error:
            raise DataError(f"task {task.name}: question {number}: {error.message}", error.fix) from None
        examples.append(tidied)
        doubled.update(findings.doubled)
        tokens.update(findings.special)
        num_special += bool(findings.special)
    bare = task.bare_prompt
    task = dataclasses.replace(task, examples=tuple(examples), bare_prompt=bare and _tidy_prompt(bare, special, Findings()))
    return task, {"doubled": dict(doubled), "num_special": num_special, "special_tokens": dict(tokens.most_common())}


def _describe_special(findings: Findings, policy: SpecialTokenPolicy) -> DataError:
    message = f"its text holds the special tokens {', '.join(sorted(findings.special))}"
    if policy == "escape":
        message += ", which data.special_tokens_in_text: escape makes plain text in rows alone, and not in questions"
    return DataError(message, "take them out, or set data.special_tokens_in_text: keep")


def say_special(name: str, num_special: int, special_tokens: Mapping[str, int]) -> None:
    """Say that special tokens stand in a task's questions, where they do.

    Args:
        name: of the task.
        num_special: questions with some.
        special_tokens: those tokens, each with the questions that it is in.
    """
    if num_special:
        logger.warning(
            "task %s: special tokens stand in the text of %d questions (%s) and end or open turns there",
            name, num_special, ", ".join(special_tokens),
        )  # fmt: skip


def tidy_example(example: Example, special: SpecialTokens) -> tuple[Example, Findings]:
    """A question without what would stand in it twice, and what was found in it.

    Raises:
        DataError: its answer is nothing but special tokens.
    """
    findings = Findings()
    prompt, body, rules = _tidy_prompt(example.prompt, special, findings), example.body, example.rules
    if isinstance(example.prompt, str):
        num_gone = len(example.prompt) - len(prompt)
        body = body and (max(body[0] - num_gone, 0), max(body[1] - num_gone, 0))
        if "source" in rules:  # the question alone, where answered ones stand before it
            rules = {**rules, "source": _tidy_prompt(rules["source"], special, findings)}
    ends = [special.end] if isinstance(prompt, str) else [special.ends.get("assistant", ""), special.end]
    answer, *options = (_tidy_answer(text, ends, findings) for text in (example.answer, *example.options))
    for text in list_texts([prompt, answer, *options]):
        findings.special.update(special.pattern.findall(text))
    tidied = dataclasses.replace(example, prompt=prompt, body=body, rules=rules, answer=answer, options=tuple(options))
    return tidied, findings


def tokenize_text(text: str, special: SpecialTokens) -> list[int]:
    """Plain text that is gone on with, in the tokens that training gives it: with one beginning, and with no end."""
    text = special.tidy_opening(text, Findings())
    if not text:  # what is written from nothing
        return [special.tokenizer.bos_token_id] if special.beginning else []
    return label_tokens(Rendering(text, [], is_plain=True), get_backend(special.tokenizer).encode(text))[0]


def _tidy_prompt(prompt: Any, special: SpecialTokens, findings: Findings) -> Any:
    if isinstance(prompt, str):
        return special.tidy_opening(prompt, findings)
    are_turns = all(isinstance(turn, dict) and "role" in turn and isinstance(turn.get("content"), str) for turn in prompt)
    return special.tidy_turns(prompt, True, findings) if are_turns else prompt  # others are the template's to refuse


def _tidy_answer(answer: str, ends: list[str], findings: Findings) -> str:
    tidied = answer
    for end in filter(None, ends):
        tidied = strip_end(tidied, end)
    if tidied != answer:
        findings.doubled.add("end")
        if not tidied.strip():
            raise DataError(f"its answer is nothing but special tokens: {answer!r}")
    return tidied
