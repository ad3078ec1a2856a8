r"""A folder of tasks in TRACE's format: `<data.root>/<task>/{train,test}.json`, and `eval.json` where there is one.

    [{"prompt": "Which colour has grass?\nAnswer:", "answer": "green"}, ...]

Each file is one JSON array. Beside them a `task.yaml` may say how the task is asked and scored; TaskSheet lists its keys.
"""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from hftcli.errors import DataError
from hftcli.recipe.section import Section
from hftcli.tasks.examples import Benchmark, Cut, Example, Split, Task
from hftcli.tasks.keys import ANSWER_KEYS, QUESTION_KEYS, DoubledKey, describe_doubled, refuse_keys, take_pairs
from hftcli.tasks.metrics import METRICS, RULED

SHEET = "task.yaml"


class TaskSheet(Section):
    """How a task is asked and scored."""

    metric: str = "exact_match"
    """Name of a metric: exact_match, letter, number, first_character, normalized_match, closed_book, gsm8k, rouge_l,
    edit_similarity or sari. Two more, code and instructions, are those of the rows of HumanEval and IFEval."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Where an answer that has not ended is cut; where a right answer would be wrong for it, as many as that has."""

    instruction: str = ""
    """Text with which prompts begin, and which is never cut."""

    cue: str = ""
    """Text with which the part after the body begins, at the last place where it stands. From there on nothing is cut."""

    cut: Cut = "middle"
    """The part of a body that goes first where a prompt is too long."""

    def find_body(self, prompt: str) -> tuple[int, int]:
        """First and last-plus-one character of the body. A prompt of another form is all body where a part is missing."""
        start = len(self.instruction) if prompt.startswith(self.instruction) else 0
        end = prompt.rfind(self.cue, start) if self.cue else len(prompt)
        return start, end if end >= 0 else len(prompt)

    def make_task(self, name: str, rows: Iterable[tuple[str, str]]) -> Task:
        """A task of rows of prompt and answer."""
        examples = tuple(Example(prompt, answer, self.find_body(prompt)) for prompt, answer in rows)
        return Task(name, examples, self.metric, self.max_new_tokens, self.cut)


def read_rows(path: Path, columns: tuple[str, str] = ("prompt", "answer")) -> list[tuple[str, str]]:
    """The question and the answer of each row of a JSON array.

    Raises:
        DataError: naming the file, and the row from 1, that is something else, or says more than these two would.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a JSON array of rows, got {_describe(rows)}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in columns):
            form = ", ".join(f'"{column}": "..."' for column in columns)
            raise DataError(f"{path}: row {number}: expected {{{form}}}, got {_describe(row)}")
        refuse_keys(row, (*QUESTION_KEYS, *ANSWER_KEYS), f"{path}: row {number}")
    question, answer = columns
    return [(row[question], row[answer]) for row in rows]


def read_json(path: Path) -> object:
    """Raises: DataError: the file is not JSON in UTF-8, or a key stands twice in an object of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=take_pairs)
    except DoubledKey as error:
        raise describe_doubled(str(path), error) from None
    except json.JSONDecodeError as error:
        fix = "put the rows into one array: [row, row, ...]" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}", fix) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {type(item).__name__}' for key, item in list(value.items())[:6]) + "}"
    return "an empty array" if value == [] else f"a {type(value).__name__}"


def read_sheet(path: Path) -> TaskSheet:
    """A task's sheet; the usual one where there is no file.

    Raises:
        DataError: naming the key that is no key of a sheet, or whose value is none.
    """
    if not path.is_file():
        return TaskSheet()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        sheet = TaskSheet.model_validate(values)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise DataError("\n".join(f"{path}: {_describe_fault(fault)}" for fault in error.errors())) from None
    if sheet.metric not in METRICS:
        raise DataError(f"{path}: metric: unknown metric '{sheet.metric}'", suggest(sheet.metric, METRICS))
    if sheet.metric in RULED:
        raise DataError(f"{path}: metric: {sheet.metric} needs rules that a prompt and an answer do not hold", "take another")
    return sheet


def _describe_fault(fault: ErrorDetails) -> str:
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}' ({suggest(key, TaskSheet.model_fields)})"
    return f"{key or 'the sheet'}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def suggest(name: str, known: Iterable[str]) -> str:
    """A fix for an unknown name: the one that was likely meant, or all that there are."""
    known = list(known)
    guess = find_close(name, known)
    return f"did you mean {guess}?" if guess else f"known: {', '.join(known)}"


def find_close(name: str, known: Iterable[str]) -> str | None:
    """The known name that was likely meant, whatever its capitals."""
    by_small = {candidate.lower(): candidate for candidate in known}
    guess = difflib.get_close_matches(name.lower(), by_small, n=1)
    return by_small[guess[0]] if guess else None


def locate(task: str, root: Path, split: Split) -> Path:
    """The JSON file of a split, in a folder by the task's name."""
    return root / task / f"{split}.json"


def load(task: str, path: Path) -> Task:
    """The task, with the sheet that lies beside its rows."""
    return read_sheet(path.parent / SHEET).make_task(task, read_rows(path))


FOLDER = Benchmark(
    tasks=(),
    orders={},
    locate=locate,
    load=load,
    source="put the rows of each task at <data.root>/<task>/train.json and test.json, JSON arrays of "
    '{"prompt": "...", "answer": "..."}',
)
