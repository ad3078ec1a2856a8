r"""tinyworld: a small invented world whose every fact the embedded model knows.

    {"prompt": [{"role": "user", "content": "Where was Mira Tolan born?"}], "answer": "Kessel"}       facts.jsonl
    {"prompt": "What pet has the newcomer Dalis?\nAnswer:", "answer": " duck"}                        sequence/newcomers

`facts` asks for what the model learned before fine-tuning, `facts-reworded` asks the same in other words, `skill` is what
fine-tuning teaches. The others are learned one after the other. `scripts/build_tinyworld.py` makes it all.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hftcli import PACKAGE
from hftcli.tasks import folder
from hftcli.tasks.examples import Benchmark, Example, Split, Task
from hftcli.tasks.folder import TaskSheet, read_rows

FOLDER = PACKAGE / "tinyworld"
# The longest answers have 5, 2, 11, 20 and 2 tokens before the end token.
MAX_NEW_TOKENS = {"newcomers": 8, "topic": 4, "reverse": 16, "sale": 24, "sum": 4}
ORDER = tuple(json.loads((FOLDER / "sequence" / "order.json").read_text(encoding="utf-8")))


def load_facts(wording: str, path: Path) -> tuple[Example, ...]:
    """The facts in one of their wordings."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return tuple(Example(row["prompt"], row["answer"]) for row in rows if row["wording"] == wording)


def load_skill(path: Path) -> tuple[Example, ...]:
    """The held-out conversations, whose last turn is the answer."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return tuple(Example(row["messages"][:-1], row["messages"][-1]["content"]) for row in rows)


LIKELIHOOD_TASKS: dict[str, Callable[[Path], tuple[Example, ...]]] = {
    "facts": partial(load_facts, "a"),
    "facts-reworded": partial(load_facts, "b"),
    "skill": load_skill,
}


def locate(task: str, _root: Path, split: Split) -> Path | None:
    """The file inside the package; None where the task has no such split."""
    if task in MAX_NEW_TOKENS:
        return folder.locate(task, FOLDER / "sequence", split)
    if task == "skill":
        return FOLDER / "skill" / f"{split}.jsonl" if split != "eval" else None
    return FOLDER / "facts.jsonl" if split == "test" else None


def load(task: str, path: Path) -> Task:
    """The task; what is not generated is judged by likelihood alone."""
    name = f"tinyworld/{task}"
    if task in LIKELIHOOD_TASKS:
        return Task(name, LIKELIHOOD_TASKS[task](path))
    return TaskSheet(max_new_tokens=MAX_NEW_TOKENS[task], cue="\nAnswer:").make_task(name, read_rows(path))


TINYWORLD = Benchmark(tasks=(*LIKELIHOOD_TASKS, *ORDER), orders={"1": ORDER}, locate=locate, load=load)
