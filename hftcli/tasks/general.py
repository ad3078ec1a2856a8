r"""Tasks of a file, one JSON object on each line: multiple choice, closed-book questions, and four benchmarks (official.py).

    {"question": "Which of these is a planet?", "choices": ["Mars", "Titan"], "answer": 0}
    {"question": "who wrote hamlet", "answers": ["William Shakespeare", "Shakespeare"]}
    {"text": "Once upon a time", "continuation": " there was a king."}
    {"messages": [{"role": "user", "content": "Where are you?"}, {"role": "assistant", "content": "At 4 Mill Lane."}]}

A task whose name ends in `.jsonl` is such a file; the keys of its first row tell which of FORMS it holds. Further keys are left
alone, but for those of keys.py that would be a part of the question. How a text goes on, and the last answer of a conversation,
have a likelihood and no score, and are read as they stand, with no cue before them and no end after them. The other prompts are
those of lm-evaluation-harness's ARC and TriviaQA, `Question: ...\nAnswer:`, but a question that has its question mark gets no
second, and of a closed-book answer the first line is kept, of which a beginning up to a full stop or comma counts. Chat
templates and examples before a question are asking.py's.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hftcli.errors import DataError
from hftcli.tasks.examples import Benchmark, Example, Split, Task
from hftcli.tasks.keys import QUESTION_KEYS, DoubledKey, describe_doubled, refuse_keys, take_pairs
from hftcli.tasks.official import (
    convert_gsm8k,
    convert_humaneval,
    convert_ifeval,
    convert_mmlu,
    is_subject,
    is_text,
    sift_ifeval,
)

SUFFIX = ".jsonl"
CUE = "Answer:"
STOPS = "\n"
MAX_NEW_TOKENS = 32  # answers are a few words


@dataclass(frozen=True)
class Form:
    """One kind of question.

    Attributes:
        key: the key that tells its rows from others.
        shape: a row, as messages show it.
        convert: a row and its place, for messages -> the question.
        asking: how its questions are asked and scored: fields of Task.
        fits: whether the key's value in the first row is such a form's.
        takes_chat: whether its questions are asked through a chat template where there is one.
        takes: keys of QUESTION_KEYS that its questions are made of.
        sift: takes out the questions that cannot be asked here, and says how many for which reason.
    """

    key: str
    shape: str
    convert: Callable[[dict[str, Any], str], Example]
    asking: Mapping[str, Any]
    fits: Callable[[object], bool] = lambda _: True
    takes_chat: bool = True
    takes: tuple[str, ...] = ()
    sift: Callable[[tuple[Example, ...]], tuple[tuple[Example, ...], dict[str, int]]] | None = None


def locate(task: str, root: Path, split: Split) -> Path | None:
    """The file is the test; it is named from where the command runs, not from `data.root`."""
    return Path(task) if split == "test" else None


def load(task: str, path: Path) -> Task:
    """Raises: DataError: naming the file, and the line from 1, that is not of the form."""
    rows = read_lines(path)
    first = next(iter(rows.values()))
    form = next((form for form in FORMS.values() if form.key in first and form.fits(first[form.key])), FORMS["closed_book"])
    refused = [key for key in QUESTION_KEYS if key not in form.takes]
    made = []
    for number, row in rows.items():
        made.append(form.convert(row, f"{path}: row {number}"))
        refuse_keys(row, refused, f"{path}: row {number}")
    examples = tuple(made)
    examples, left_out = form.sift(examples) if form.sift else (examples, {})
    return Task(task, examples, left_out=left_out, takes_chat=form.takes_chat, **form.asking)


def read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """The objects of a file of JSON lines, by number of the line from 1; blank lines are left out.

    Raises:
        DataError: naming the file, and the line, that is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    rows = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows[number] = json.loads(line, object_pairs_hook=take_pairs)
            except DoubledKey as error:
                raise describe_doubled(f"{path}: row {number}", error) from None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: row {number}: not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(rows[number], dict):
                raise DataError(f"{path}: row {number}: expected an object, got {line.strip()[:40]}")
    if not rows:
        raise DataError(f"{path}: there are no rows in it")
    return rows


def convert_choice(row: dict[str, Any], place: str) -> Example:
    """A question with choices, of which `answer` is the place of the right one, from 0."""
    question, choices, index = read_question(row, place), read_options(row, "choices", 2, place), row.get("answer")
    if type(index) is not int or not 0 <= index < len(choices):
        raise DataError(
            f"{place}: 'answer': expected the place of the right choice, 0 to {len(choices) - 1}, got {_show(row, 'answer')}",
            _show_forms(),
        )
    return Example(f"Question: {question}\n{CUE}", choices[index], options=choices)


def convert_closed_book(row: dict[str, Any], place: str) -> Example:
    """A question with all of its right answers, of which the first stands for them."""
    question, answers = read_question(row, place), read_options(row, "answers", 1, place)
    mark = "" if question.endswith("?") else "?"
    return Example(f"Question: {question}{mark}\n{CUE}", answers[0], options=answers)


def convert_continuation(row: dict[str, Any], place: str) -> Example:
    """The beginning of a text, and how it goes on: its likelihood alone says something."""
    for key in ("text", "continuation"):
        if not _is_text(row.get(key)):
            raise DataError(f"{place}: '{key}': expected a text, got {_show(row, key)}", _show_forms())
    return Example(row["text"], row["continuation"], options=(row["continuation"],))


def convert_conversation(row: dict[str, Any], place: str) -> Example:
    """A conversation, whose last answer is read."""
    turns = row["messages"] if isinstance(row.get("messages"), list) else []
    is_told = all(isinstance(turn, dict) and turn.keys() == {"role", "content"} and _is_text(turn["content"]) for turn in turns)
    roles = [turn["role"] for turn in turns] if is_told else []
    if roles[-2:] != ["user", "assistant"] or not {*roles} <= {"system", "user", "assistant"}:
        raise DataError(
            f"{place}: 'messages': expected turns with a role and a text, the last two the user's and the assistant's, got "
            f"{_show(row, 'messages')}",
            _show_forms(),
        )
    answer = turns[-1]["content"]
    return Example(turns[:-1], answer, options=(answer,))


def read_question(row: dict[str, Any], place: str) -> str:
    """The question of a row."""
    question = row.get("question")
    if not _is_text(question):
        raise DataError(f"{place}: 'question': expected a text, got {_show(row, 'question')}", _show_forms())
    return question


def read_options(row: dict[str, Any], key: str, least: int, place: str) -> tuple[str, ...]:
    """What may follow the cue, each with the blank between them."""
    options = row.get(key)
    if not isinstance(options, list) or len(options) < least or not all(map(_is_text, options)):
        raise DataError(f"{place}: '{key}': expected {least} or more texts, got {_show(row, key)}", _show_forms())
    return tuple(f" {option}" for option in options)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.strip() != ""


def _show(row: dict[str, Any], key: str) -> str:
    return json.dumps(row[key], ensure_ascii=False)[:60] if key in row else "none"


def _show_forms() -> str:
    return f"a row is {' or '.join(form.shape for form in FORMS.values())}"


FORMS = {
    "ifeval": Form(
        key="instruction_id_list",
        shape='{"prompt": "...", "instruction_id_list": ["..."], "kwargs": [{}]}',
        convert=convert_ifeval,
        asking={"metric": "instructions", "max_new_tokens": 1280, "cut": "start", "has_answers": False},
        sift=sift_ifeval,
    ),
    "humaneval": Form(
        key="entry_point",
        shape='{"prompt": "def ...", "entry_point": "...", "canonical_solution": "...", "test": "..."}',
        convert=convert_humaneval,
        asking={"metric": "code", "max_new_tokens": 512, "cut": "start"},
        takes_chat=False,  # a function that is to be completed is no question
    ),
    "mmlu": Form(
        key="subject",
        fits=is_subject,
        shape='{"subject": "...", "question": "...", "choices": ["...", "..."], "answer": index from 0}',
        convert=convert_mmlu,
        asking={"metric": "choice", "cut": "start", "bare_prompt": CUE},
        takes=("choices",),
    ),
    "choice": Form(
        key="choices",
        shape='{"question": "...", "choices": ["...", "..."], "answer": index from 0}',
        convert=convert_choice,
        asking={"metric": "choice", "cut": "start", "bare_prompt": CUE},
        takes=("choices",),
    ),
    "gsm8k": Form(
        key="answer",
        fits=is_text,
        shape='{"question": "...", "answer": "... #### 7"}',
        convert=convert_gsm8k,
        asking={"metric": "gsm8k", "max_new_tokens": 256, "cut": "start"},
    ),
    "continuation": Form(
        key="continuation",
        shape='{"text": "...", "continuation": "..."}',
        convert=convert_continuation,
        asking={"metric": "none", "cut": "start"},
        takes_chat=False,
    ),
    "conversation": Form(
        key="messages",
        shape='{"messages": [..., {"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        convert=convert_conversation,
        asking={"metric": "none", "cut": "start"},
        takes_chat=False,  # it is one already
    ),
    "closed_book": Form(
        key="answers",
        shape='{"question": "...", "answers": ["...", ...]}',
        convert=convert_closed_book,
        asking={"metric": "closed_book", "max_new_tokens": MAX_NEW_TOKENS, "cut": "start", "stops": STOPS},
    ),
}
FILE = Benchmark(tasks=(), orders={}, locate=locate, load=load)
