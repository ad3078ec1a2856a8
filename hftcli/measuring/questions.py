"""A task as tokens: its questions with their right answers, and ready to be answered.

What is asked has the tokens that training shows, and every right answer is seen to count before anything is asked.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hftcli.data.asked import say_special, tidy_task
from hftcli.data.tokens import IGNORED, Layout, Tokens, get_backend, lay_out_bare, lay_out_prompts, tokenize_examples
from hftcli.errors import DataError, ModelError
from hftcli.measuring.grading import find_faults, find_longest
from hftcli.measuring.options import Question, tokenize_questions
from hftcli.recipe.sections import SpecialTokenPolicy
from hftcli.runs.scores import HELD_OUT
from hftcli.tasks.examples import Task

logger = logging.getLogger(__name__)

NUM_NAMED = 10  # faults that a message names

Row = tuple[list[int], list[int]]  # token ids, and labels that are ids where the answer is


@dataclass(frozen=True)
class TokenizedTask:
    """A task as a model meets it.

    Attributes:
        rows: the questions with their answers, laid out as in training.
        layouts: the questions alone, with room left for an answer; none where nothing is generated.
        num_new_tokens: where an answer that has not ended is cut; 0 where nothing is generated.
        end_ids: tokens that end an answer.
        questions: the questions with all that may be said, in place of `rows`; none where nothing is listed.
        bare_questions: of multiple choice: the same after a prompt that asks nothing.
        faults: questions, by index from 0, whose right answer no model can give, and why.
    """

    task: Task
    rows: list[Row]
    layouts: list[Layout]
    num_new_tokens: int
    end_ids: list[int]
    questions: list[Question] = field(default_factory=list)
    bare_questions: list[Question] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of the questions alone."""
        return [layout.prompt for layout in self.layouts]

    @property
    def has_score(self) -> bool:
        """Whether more than the likelihood of its right answers is measured."""
        return bool(self.task.examples) and self.task.metric != "none"


def tokenize_task(
    task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase, policy: SpecialTokenPolicy = "keep"
) -> TokenizedTask:
    """Tokenize a task's questions.

    Args:
        max_length: tokens of a question with its answer, be it the right one or the model's. A plain question's body is cut to
            it, then the end of a right answer, whose likelihood is that of the tokens left; of answers that are listed, as
            `tokenize_questions` says. What is generated takes at most half of it.
        policy: what becomes of special tokens in the questions' text, as `tidy_task` has it.

    Raises:
        DataError: a question does not fit, even without its body, or as a conversation, which has none; or an answer is
            nothing but special tokens; or the policy refuses those in its text.
        ModelError: the task asks in conversations, and the tokenizer has no chat template.
    """
    task, found = tidy_task(task, tokenizer, policy)
    say_special(task.name, found["num_special"], found["special_tokens"])
    rows: list[Row] = []
    questions: list[Question] = []
    bare_questions: list[Question] = []
    end_ids = _find_eos(tokenizer)
    if task.examples[0].options:
        bare_rows = [(task.bare_prompt, row.options) for row in task.examples] if task.bare_prompt else []
        listed = [(row.prompt, row.options) for row in task.examples]
        questions = tokenize_questions(listed, max_length, tokenizer, task.name)
        bare_questions = tokenize_questions(bare_rows, max_length, tokenizer, task.name)
        end_ids = sorted(find_stops(task.stops, tokenizer).union(end_ids)) if task.max_new_tokens else []
        if task.max_new_tokens and not isinstance(task.examples[0].prompt, str):
            end_ids = sorted({*end_ids, *find_turn_ends(task, tokenizer)})
    elif not task.has_answers:
        end_ids = sorted({*end_ids, *find_turn_ends(task, tokenizer)})
    else:
        rows, end_ids = _tokenize_rows(task, max_length, tokenizer)
    asked = TokenizedTask(task, rows, [], 0, end_ids, questions, bare_questions)
    asked = _lay_out(asked, max_length, tokenizer) if task.max_new_tokens else asked
    return replace(asked, faults=find_task_faults(asked, tokenizer))


def _tokenize_rows(task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], list[int]]:
    """The questions with their answers, and the tokens that end these."""
    try:
        tokens, lengths = tokenize_examples(task.examples, task.cut, max_length, tokenizer)
    except ModelError as error:
        raise ModelError(f"task {task.name}: {error.message}", error.fix) from None
    rows = []
    for number, (ids, labels) in enumerate(tokens, start=1):
        if (labels[:max_length] == IGNORED).all():
            raise _describe_overlong(task, number, f"is longer than data.max_length, {max_length} tokens")
        rows.append((ids[:max_length], labels[:max_length].tolist()))
    if num_cut := sum(length > len(ids) for length, (ids, _) in zip(lengths, rows, strict=True)):
        logger.warning(
            "%s: %d of %d questions lose a part: they have more than %d tokens", task.name, num_cut, len(rows), max_length
        )
    return rows, find_ends(tokens, tokenizer)


def _lay_out(asked: TokenizedTask, max_length: int, tokenizer: PreTrainedTokenizerBase) -> TokenizedTask:
    """With the questions alone, and as many tokens for an answer as the right ones need."""
    task, most = asked.task, max_length // 2
    num_new_tokens = min(task.max_new_tokens or 0, most)
    layouts = _lay_out_prompts(task, max_length - num_new_tokens, tokenizer)
    longest = num_new_tokens
    if task.has_answers and not task.is_cut_given:
        longest = min(find_longest(task, layouts, asked.end_ids, num_new_tokens, tokenizer), most)
    if longest > num_new_tokens:
        logger.warning(
            "%s: answers are cut at %d tokens, as many as the right ones have, and not at %d",
            task.name, longest, num_new_tokens,
        )  # fmt: skip
        num_new_tokens = longest
        layouts = _lay_out_prompts(task, max_length - num_new_tokens, tokenizer)
    elif num_new_tokens < (task.max_new_tokens or 0):
        logger.warning(
            "%s: answers are cut at %d tokens, half of data.max_length, and not at %d",
            task.name, num_new_tokens, task.max_new_tokens,
        )  # fmt: skip
    room = max_length - num_new_tokens
    for number, layout in enumerate(layouts, start=1):
        if len(layout.prompt) > room:
            fault = f"has {len(layout.prompt)} tokens, and data.max_length {max_length} leaves {room} beside the answer"
            raise _describe_overlong(task, number, fault)
    if num_cut := sum(layout.is_cut for layout in layouts):
        logger.warning(
            "%s: %d of %d questions lose a part where they are asked: they have more than %d tokens, and %d are the answer's",
            task.name, num_cut, len(layouts), room, num_new_tokens,
        )  # fmt: skip
    return replace(asked, layouts=layouts, num_new_tokens=num_new_tokens)


def _lay_out_prompts(task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[Layout]:
    if task.has_answers:
        return lay_out_prompts(task.examples, task.cut, max_length, tokenizer)
    return lay_out_bare(task.examples, task.cut, max_length, tokenizer)


def find_task_faults(asked: TokenizedTask, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Questions of a task, by index from 0, whose right answer would not count if a model gave it, and why."""
    faults = find_faults(asked.task, asked.layouts, asked.end_ids, asked.num_new_tokens, tokenizer) if asked.layouts else {}
    for index, (example, question) in enumerate(zip(asked.task.examples, asked.questions, strict=False)):
        if asked.bare_questions:
            right = question.options[example.options.index(example.answer)]
            same = {option for option, ids in zip(example.options, question.options, strict=True) if ids == right}
            if len(same) > 1:
                faults[index] = "another choice has the same tokens as the right one"
    return faults


def add_ends(asked: TokenizedTask, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> TokenizedTask:
    """A task whose answers end at a checkpoint's own ends too."""
    end_ids = sorted({*asked.end_ids, *ends})
    if not asked.num_new_tokens or end_ids == asked.end_ids:
        return asked
    asked = replace(asked, end_ids=end_ids)
    return replace(asked, faults=find_task_faults(asked, tokenizer))


def report_faults(asked: TokenizedTask, is_strict: bool) -> None:
    """Name the questions whose right answer no model can give.

    Raises:
        DataError: there are some, and `is_strict`.
    """
    if not asked.faults:
        return
    named = "; ".join(f"question {index + 1}: {fault}" for index, fault in list(asked.faults.items())[:NUM_NAMED])
    more = "" if len(asked.faults) <= NUM_NAMED else "; and so on"
    message = (
        f"task {asked.task.name}: {len(asked.faults)} of {len(asked.task.examples)} questions have a right answer that does "
        f"not count as right: {named}{more}"
    )
    if is_strict:
        raise DataError(message, "mend these rows, or ask without strict")
    logger.warning(message)


def hold_out(rows: Dataset) -> TokenizedTask:
    """Rows, as `prepare_dataset` gives them, as a task of which only the likelihood of the trained tokens is measured."""
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    return TokenizedTask(Task(HELD_OUT, examples=()), pairs, layouts=[], num_new_tokens=0, end_ids=[])


def find_stops(characters: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens with one of the characters, and nothing but blanks before it that would be lost where the token ends an answer."""
    if not characters:
        return set()
    backend, stop = get_backend(tokenizer), re.compile(rf"\s*[{re.escape(characters)}]")
    return {token for token in range(backend.get_vocab_size()) if stop.match(backend.decode([token]))}


def _describe_overlong(task: Task, number: int, fault: str) -> DataError:
    is_plain = isinstance(task.examples[number - 1].prompt, str)
    how = "even without its body" if is_plain else "a conversation, of which nothing is cut"
    return DataError(f"task {task.name}: question {number}, {how}, {fault}", "raise data.max_length")


def find_ends(rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and what ends an answer in training where that is a special token too."""
    _, labels = rows[0]
    last = int(labels[labels != IGNORED][-1])
    special = {last} & set(tokenizer.get_added_vocab().values())
    return sorted(special.union(_find_eos(tokenizer)))


def _find_eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def find_turn_ends(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer of the assistant; nothing of its own where the questions are plain text."""
    if isinstance(task.examples[0].prompt, str):
        return []
    probe = replace(task.examples[0], answer="Yes.", options=())
    return find_ends(tokenize_examples([probe], task.cut, 1, tokenizer)[0], tokenizer)
