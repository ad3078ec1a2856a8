"""tinyworld: a small invented world whose every fact the embedded model knows.

    {"prompt": [{"role": "user", "content": "Where was Mira Tolan born?"}], "answer": "Kessel"}

`facts` asks for what the model learned before fine-tuning, `facts-reworded` asks the same in other words, `skill` is what
fine-tuning teaches. `scripts/build_tinyworld.py` makes it all.
"""

import json
from functools import partial

from hftcli.recipe import PACKAGE
from hftcli.tasks.examples import Example

FOLDER = PACKAGE / "tinyworld"


def load_facts(wording: str) -> tuple[Example, ...]:
    rows = map(json.loads, (FOLDER / "facts.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(Example(row["prompt"], row["answer"]) for row in rows if row["wording"] == wording)


def load_skill() -> tuple[Example, ...]:
    rows = map(json.loads, (FOLDER / "skill" / "test.jsonl").read_text(encoding="utf-8").splitlines())
    return tuple(Example(row["messages"][:-1], row["messages"][-1]["content"]) for row in rows)


TASKS = {"facts": partial(load_facts, "a"), "facts-reworded": partial(load_facts, "b"), "skill": load_skill}
