"""What is wrong with the rows of a sequence of tasks, found before any training.

Released benchmarks ask about rows that they train on, count rows many times over, and hold empty ones. None of it stops a
run; all of it changes what its numbers mean.
"""

import json
from collections.abc import Iterable

from hftcli.recipe.section import Section
from hftcli.tasks import find_benchmark, load_task, locate_rows
from hftcli.tasks.examples import Example, Task


class TaskReport(Section):
    """One task's rows. What is counted twice or wrong is counted in rows."""

    task: str
    """Its full name."""
    num_train: int
    """Training rows."""
    num_eval: int | None
    """Rows of the eval split; null where the task has none."""
    num_test: int
    """Test rows."""
    num_official: tuple[int, int, int] | None
    """Rows in train, eval and test of the benchmark's official set; null where it is not known."""
    num_duplicates: int
    """Training rows whose prompt and answer have been there before."""
    num_test_in_train: int
    """Test rows whose prompt is also trained on."""
    num_eval_in_test: int
    """Eval rows whose prompt is also in the test."""
    num_empty: int
    """Rows of train and test with nothing between instruction and cue, or with an empty answer."""


class SequenceReport(Section):
    """The data check of a sequence."""

    tasks: tuple[TaskReport, ...]
    """Each task's rows, in order."""
    warnings: tuple[str, ...]
    """What is wrong with them, a sentence each."""


def check_sequence(tasks: Iterable[str], root: str | None = None) -> SequenceReport:
    """Read all rows of the tasks, one task after the other.

    Raises:
        InputError: one of them is no task.
        DataError: a file is missing, or a row is not of its benchmark's form.
    """
    reports = tuple(check_task(task, root) for task in tasks)
    return SequenceReport(tasks=reports, warnings=tuple(warning for report in reports for warning in describe_faults(report)))


def check_task(name: str, root: str | None = None) -> TaskReport:
    """Count a task's rows, and what is wrong with them."""
    benchmark, task = find_benchmark(name)
    train, test = (load_task(name, root, split) for split in ("train", "test"))
    eval_path = locate_rows(name, root, "eval")
    held_out = load_task(name, root, "eval") if eval_path and eval_path.is_file() else None
    train_prompts, test_prompts = ({_find_prompt(example) for example in split.examples} for split in (train, test))
    return TaskReport(
        task=name,
        num_train=len(train.examples),
        num_eval=len(held_out.examples) if held_out else None,
        num_test=len(test.examples),
        num_official=benchmark.num_rows.get(task),
        num_duplicates=len(train.examples) - len({(_find_prompt(example), example.answer) for example in train.examples}),
        num_test_in_train=_count_among(test, train_prompts),
        num_eval_in_test=_count_among(held_out, test_prompts) if held_out else 0,
        num_empty=sum(_is_empty(example) for example in (*train.examples, *test.examples)),
    )


def _find_prompt(example: Example) -> str:
    return example.prompt if isinstance(example.prompt, str) else json.dumps(example.prompt)


def _count_among(task: Task, prompts: set[str]) -> int:
    return sum(_find_prompt(example) in prompts for example in task.examples)


def _is_empty(example: Example) -> bool:
    start, end = example.body or (0, None)
    return not example.answer.strip() or not _find_prompt(example)[start:end].strip()


def describe_faults(report: TaskReport) -> Iterable[str]:
    """What is wrong with a task's rows, a sentence each."""
    found = (report.num_train, report.num_eval, report.num_test)
    if report.num_official and found != report.num_official:
        official = _join(report.num_official)
        yield f"{report.task} has {_join(found)} rows in train, eval and test; the official set has {official}."
    if report.num_duplicates:
        yield f"{report.task}: {report.num_duplicates} of {report.num_train} training rows are repeated."
    if report.num_test_in_train:
        yield f"{report.task}: {report.num_test_in_train} of {report.num_test} test prompts are also trained on."
    if report.num_eval_in_test:
        yield f"{report.task}: {report.num_eval_in_test} of {report.num_eval} eval prompts are also in the test."
    if report.num_empty:
        yield f"{report.task}: {report.num_empty} rows of train and test have an empty body or an empty answer."


def _join(numbers: Iterable[int | None]) -> str:
    return "/".join("-" if number is None else f"{number:,}" for number in numbers)


def format_report(report: SequenceReport) -> str:
    """A line for each task and for each warning."""
    width = max(len(task.task) for task in report.tasks)
    rows = [f"{'task':{width}} {'train':>7} {'unique':>7} {'eval':>7} {'test':>7} {'also trained on':>16}"]
    for task in report.tasks:
        num_unique = task.num_train - task.num_duplicates
        num_eval = "-" if task.num_eval is None else task.num_eval
        rows.append(
            f"{task.task:{width}} {task.num_train:>7} {num_unique:>7} {num_eval:>7} {task.num_test:>7} "
            f"{task.num_test_in_train:>16}"
        )
    return "\n".join([*rows, *(f"warning: {warning}" for warning in report.warnings)])
