"""Benchmarks: one short file each; a task is a name and its examples.

A name is `benchmark/task`, that of a folder under `data.root` (folder.py), or that of a file, `<path>.jsonl` (general.py).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hftcli.errors import DataError, InputError
from hftcli.recipe.sections import ContinualSection
from hftcli.tasks.examples import Benchmark, Protocol, Split, Task
from hftcli.tasks.folder import FOLDER, find_close, suggest
from hftcli.tasks.general import FILE, SUFFIX
from hftcli.tasks.standard import STANDARD
from hftcli.tasks.tinyworld import TINYWORLD
from hftcli.tasks.trace import TRACE


@dataclass(frozen=True)
class Sequence:
    """What is learned in which order.

    Attributes:
        tasks: full names, in order.
        epochs: by task, the passes that the protocol gives it; None without a protocol.
        temperature: at which the protocol draws answers; 0 takes the likeliest token at every place.
        order: the benchmark's name for the order; None for a list of tasks.
    """

    tasks: tuple[str, ...]
    epochs: dict[str, float] | None = None
    temperature: float = 0.0
    order: str | None = None


def list_tasks() -> list[str]:
    """The tasks whose rows ship with hft."""
    return [name for name in _list_names() if find_benchmark(name)[0].source is None]


def load_task(name: str, root: str | None = None, split: Split = "test", max_examples: int | None = None) -> Task:
    """Read a task's rows.

    Args:
        root: `data.root`; not asked where the rows ship with hft.
        max_examples: the first so many; None for all.

    Raises:
        InputError: no such task.
        DataError: the task has no such split, a file is missing, or a row is not of its benchmark's form.
    """
    benchmark, task = find_benchmark(name)
    loaded = benchmark.load(task, find_rows(name, root, split))
    return replace(loaded, examples=loaded.examples[:max_examples])


def find_rows(name: str, root: str | None, split: Split) -> Path:
    """The file that holds a split of a task.

    Raises:
        InputError: no such task.
        DataError: it has no such split, or the file is missing.
    """
    path = locate_rows(name, root, split)
    if path is None:
        raise DataError(f"{name} has no {split} rows")
    if not path.is_file():
        raise _describe_missing(name, Path(root or "."), path)
    return path


def locate_rows(name: str, root: str | None, split: Split) -> Path | None:
    """Where a split of a task must lie, be it there or not; None where the task has no such split.

    Raises:
        InputError: no such task.
        DataError: it needs a root, and none is given, or there is no such folder.
    """
    benchmark, task = find_benchmark(name)
    if root is None and benchmark is FOLDER:
        raise InputError(f"unknown task '{name}'", _suggest_task(name, None))
    if root is None and benchmark.source is not None:
        raise DataError(f"data.root is missing: the rows of {name} do not ship with hft", benchmark.source)
    if benchmark.source is not None and root is not None and not Path(root).is_dir():
        raise DataError(f"data.root {root}: no such folder", benchmark.source)
    return benchmark.locate(task, Path(root or "."), split)


def check_tasks(names: Iterable[str], root: str | None = None, key: str = "eval.tasks") -> None:
    """Check that tasks can be scored.

    Args:
        key: the recipe's key that names them.

    Raises:
        InputError: one of them is no task.
        DataError: the file of its test rows is missing.
    """
    for name in names:
        find_benchmark(name, key)
        find_rows(name, root, "test")


def find_sequence(continual: ContinualSection, root: str | None = None) -> Sequence:
    """What a recipe's `continual` asks for, each of its tasks with its train and test rows in place.

    Raises:
        InputError: an unknown benchmark, task, order or protocol, a task that is named twice, or an order or protocol that
            would have no effect.
        DataError: files are missing.
    """
    names = continual.tasks.split(",") if isinstance(continual.tasks, str) else continual.tasks
    names = tuple(name.strip() for name in names)
    if not names:
        raise InputError("continual.tasks names no task", f"name a benchmark: {', '.join(BENCHMARKS)}")
    order = None
    if len(names) == 1 and names[0] in BENCHMARKS:
        order, tasks = _find_order(names[0], continual.order)
        names = tuple(f"{names[0]}/{task}" for task in tasks)
    elif continual.order is not None:
        raise InputError(f"continual.order {continual.order} would have no effect: the list of tasks is the order", "drop it")
    for name, count in Counter(names).items():
        find_benchmark(name, "continual.tasks")
        if count > 1:
            raise InputError(f"continual.tasks: {name} stands there {count} times", "name each task once")
        find_rows(name, root, "train")
    check_tasks(names, root, "continual.tasks")
    if continual.protocol is None:
        return Sequence(names, order=order)
    protocol = _find_protocol(names, continual.protocol)
    epochs = {name: protocol.epochs[name.partition("/")[2]] for name in names}
    return Sequence(names, epochs, protocol.temperature, order)


def _find_order(benchmark: str, name: str | None) -> tuple[str, tuple[str, ...]]:
    orders = BENCHMARKS[benchmark].orders
    name = name or next(iter(orders))
    if name not in orders:
        raise InputError(f"continual.order: {benchmark} has no order '{name}'", suggest(name, orders))
    return name, orders[name]


def _find_protocol(names: tuple[str, ...], protocol: str) -> Protocol:
    benchmarks = {name.partition("/")[0] for name in names}
    benchmark = benchmarks.pop()
    if benchmarks or benchmark not in BENCHMARKS or protocol not in BENCHMARKS[benchmark].protocols:
        known = [name for name, found in BENCHMARKS.items() if protocol in found.protocols]
        raise InputError(
            f"continual.protocol {protocol} says nothing of continual.tasks {', '.join(names)}",
            f"drop it, or take tasks of one benchmark that has it: {', '.join(known)}",
        )
    return BENCHMARKS[benchmark].protocols[protocol]


def _list_names() -> list[str]:
    return [f"{name}/{task}" for name, benchmark in BENCHMARKS.items() for task in (*benchmark.tasks, *benchmark.extra)]


def is_task(name: str) -> bool:
    """Whether a name is that of a benchmark's task, as `trace/FOMC`."""
    return name in _list_names()


def find_benchmark(name: str, key: str = "task") -> tuple[Benchmark, str]:
    """A task's benchmark, and its short name there.

    Raises:
        InputError: no such task, or a benchmark where a task must stand.
    """
    if name.endswith(SUFFIX):
        return FILE, name
    benchmark, slash, task = name.partition("/")
    if not slash and benchmark in BENCHMARKS:
        raise InputError(
            f"{key}: '{name}' is a benchmark, not a task",
            f"name its tasks: {', '.join(BENCHMARKS[name].tasks)}, as {name}/<task>",
        )
    if not slash and name not in ("", ".", "..") and "\\" not in name:
        return FOLDER, name
    if name not in _list_names():
        raise InputError(f"{key}: unknown task '{name}'", suggest(name, _list_names()))
    return BENCHMARKS[benchmark], task


def _describe_missing(name: str, root: Path, path: Path) -> InputError:
    """What to do about a file that is not there."""
    benchmark, _ = find_benchmark(name)
    if benchmark is FILE:
        return DataError(f"{path}: no such file", _suggest_file(path))
    nested = [str(folder) for folder in sorted(root.iterdir()) if (folder / path.relative_to(root)).is_file()]
    if nested:
        return DataError(f"{path} is missing", f"set data.root to {' or '.join(nested)}")
    if benchmark is FOLDER and not path.parent.is_dir():
        return InputError(f"unknown task '{name}': {root} has no such folder", _suggest_task(name, root))
    return DataError(f"{path} is missing: a task has its rows in train.json and test.json", benchmark.source or "")


def _suggest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    guess = find_close(path.name, [file.name for file in path.parent.glob(f"*{SUFFIX}")])
    return f"did you mean {path.parent / guess}?" if guess else ""


def _suggest_task(name: str, root: Path | None) -> str:
    """The benchmark, the task of one or the folder that was meant."""
    folders = [folder.name for folder in sorted(root.iterdir()) if folder.is_dir()] if root else []
    full_names = {name.partition("/")[2]: name for name in _list_names()} | {name: name for name in (*BENCHMARKS, *folders)}
    guess = find_close(name, full_names)
    return (
        f"did you mean {full_names[guess]}?" if guess else f"known: {', '.join([*BENCHMARKS, *folders])}, or <benchmark>/<task>"
    )


BENCHMARKS = {"tinyworld": TINYWORLD, "trace": TRACE, "standard": STANDARD}
