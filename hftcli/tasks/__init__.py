"""Benchmarks: one short file each; a task is a name and its examples."""

import difflib

from hftcli.errors import InputError
from hftcli.tasks import tinyworld
from hftcli.tasks.examples import Task


def list_tasks() -> list[str]:
    return [f"{benchmark}/{task}" for benchmark, tasks in BENCHMARKS.items() for task in tasks]


def load_task(name: str) -> Task:
    """Raises: InputError: no such task."""
    check_tasks((name,))
    benchmark, _, task = name.partition("/")
    return Task(name, BENCHMARKS[benchmark][task]())


def check_tasks(names: tuple[str, ...]) -> None:
    """Raises: InputError: one of them is no task."""
    for name in names:
        if name not in list_tasks():
            guess = difflib.get_close_matches(name, list_tasks(), n=1)
            hint = f"did you mean {guess[0]}?" if guess else "known: " + ", ".join(list_tasks())
            raise InputError(f"eval.tasks: unknown task '{name}'", hint)


BENCHMARKS = {"tinyworld": tinyworld.TASKS}
