r"""Rows with a label in canonical form, and as multiple choice: `data.pattern`.

    {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
    -> {"prompt": "It rains.\nQuestion: It is wet. True or False?\nAnswer:", "completion": " True"}

Both are plain text. Of a held-out row the choices are the words of all labels (measuring/options.py reads them).
"""

import math

from hftcli.data.turns import Lost, is_empty
from hftcli.errors import DataError
from hftcli.recipe.pattern import PatternSection, name_label
from hftcli.tasks.examples import Example, Task
from hftcli.tasks.general import CUE

PATTERN = "pattern"  # the format's name


def convert_labelled(row: dict[str, object], pattern: PatternSection, lost: Lost) -> dict[str, str]:
    """The question of a row with the word for its label.

    Raises:
        DataError: naming the column; where the row stands, the caller knows.
    """
    used = (*pattern.columns, pattern.label)
    if missing := [column for column in used if column not in row]:
        listed = ", ".join(map(repr, missing))
        raise DataError(f"it has no column {listed}, which data.pattern names", f"it has {', '.join(row) or 'none'}")
    values = {}
    for column in pattern.columns:
        value = row[column]
        is_endless = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or is_endless or is_empty(value):
            raise DataError(f"column {column!r}: expected a text or a number, got {str(value)[:40]!r}")
        values[column] = str(value)
    label = name_label(row[pattern.label])
    if label not in pattern.verbalizers:
        known = ", ".join(pattern.verbalizers)
        raise DataError(
            f"column {pattern.label!r}: the label {row[pattern.label]!r} has no word under data.pattern.verbalizers",
            f"give it one; those known are {known}",
        )
    lost.unused |= {column for column in row if column not in used}
    question = pattern.fill(values)
    return {"prompt": question, "completion": pattern.answer(label, question)}


def make_choices(name: str, rows: list[dict[str, str]], pattern: PatternSection) -> Task:
    """Canonical rows of a pattern as multiple choice between the words of its labels."""
    examples = tuple(Example(row["prompt"], row["completion"], options=pattern.list_answers(row["prompt"])) for row in rows)
    bare = pattern.fill(dict.fromkeys(pattern.columns, "")).lstrip()
    return Task(name, examples, metric="choice", cut="start", bare_prompt=bare or CUE)
