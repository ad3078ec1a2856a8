r"""Tasks of a file: multiple choice and closed-book questions, one JSON object on each line.

    {"question": "Which of these is a planet?", "choices": ["Mars", "Titan"], "answer": 0}
    {"question": "who wrote hamlet", "answers": ["William Shakespeare", "Shakespeare"]}

A task whose name ends in `.jsonl` is such a file; the keys of its first row tell which of the two it holds. Further keys are
left alone. The prompts are those of lm-evaluation-harness's ARC and TriviaQA, `Question: ...\nAnswer:`, with no examples before
them and no chat template, and an answer ends where TriviaQA ends it; but a question that has its question mark gets no second.
"""

import json
from pathlib import Path
from typing import Any

from hftcli.errors import DataError
from hftcli.tasks.examples import Benchmark, Example, Split, Task

SUFFIX = ".jsonl"
CUE = "Answer:"
STOPS = "\n.,"
MAX_NEW_TOKENS = 32  # answers are a few words
FORMS = '{"question": "...", "choices": ["...", "..."], "answer": index from 0} or {"question": "...", "answers": ["...", ...]}'


def locate(task: str, root: Path, split: Split) -> Path | None:
    """The file is the test; it is named from where the command runs, not from `data.root`."""
    return Path(task) if split == "test" else None


def load(task: str, path: Path) -> Task:
    """Raises: DataError: naming the file, and the line from 1, that is not of the form."""
    rows = read_lines(path)
    is_choice = "choices" in next(iter(rows.values()))
    examples = tuple(_make_example(row, is_choice, f"{path}: row {number}") for number, row in rows.items())
    if is_choice:
        return Task(task, examples, "choice", cut="start", bare_prompt=CUE)
    return Task(task, examples, "closed_book", MAX_NEW_TOKENS, cut="start", stops=STOPS)


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
                rows[number] = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: row {number}: not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(rows[number], dict):
                raise DataError(f"{path}: row {number}: expected an object, got {line.strip()[:40]}")
    if not rows:
        raise DataError(f"{path}: there are no rows in it")
    return rows


def _make_example(row: dict[str, Any], is_choice: bool, place: str) -> Example:
    question, key = row.get("question"), "choices" if is_choice else "answers"
    if not _is_text(question):
        raise DataError(f"{place}: 'question': expected a text, got {_show(row, 'question')}", f"a row is {FORMS}")
    options, least = row.get(key), 2 if is_choice else 1
    if not isinstance(options, list) or len(options) < least or not all(map(_is_text, options)):
        raise DataError(f"{place}: '{key}': expected {least} or more texts, got {_show(row, key)}", f"a row is {FORMS}")
    index = row.get("answer") if is_choice else 0
    if type(index) is not int or not 0 <= index < len(options):
        raise DataError(
            f"{place}: 'answer': expected the place of the right choice, 0 to {len(options) - 1}, got {_show(row, 'answer')}",
            f"a row is {FORMS}",
        )
    mark = "" if is_choice or question.endswith("?") else "?"
    options = tuple(f" {option}" for option in options)
    return Example(f"Question: {question}{mark}\n{CUE}", options[index], options=options)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _show(row: dict[str, Any], key: str) -> str:
    return json.dumps(row[key], ensure_ascii=False)[:60] if key in row else "none"


FILE = Benchmark(tasks=(), orders={}, locate=locate, load=load)
