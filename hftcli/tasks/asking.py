"""How a task's questions are put: through a chat template or as plain text, alone or after answered ones."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hftcli.errors import InputError, ModelError
from hftcli.recipe.asking import AskingSection
from hftcli.tasks import find_benchmark, load_task
from hftcli.tasks.examples import Example, Task
from hftcli.tasks.general import FILE

NO_TEMPLATE = "model.chat_template gives a recipe's model one"


def put_task(name: str, root: str | None, max_examples: int | None, asking: AskingSection, has_template: bool) -> Task:
    """A task's questions as they are asked.

    Args:
        root: `data.root`; not asked where the rows ship with hft.
        max_examples: the first so many; None for all.
        has_template: whether the tokenizer has a chat template.

    Raises:
        InputError: no such task, a task that runs what the model writes without leave, or too few rows to be answered before.
        DataError: rows are missing, or not of their form.
        ModelError: a chat template is asked for where there is none.
    """
    task = load_task(name, root)
    if task.metric == "code" and not asking.allow_code:
        raise InputError(
            f"{name} runs the programs that the model writes, in a process without network and files to write",
            "allow it with --allow-code, in a recipe with eval.allow_code: true",
        )
    is_chat = task.takes_chat and (has_template if asking.chat is None else asking.chat)
    if is_chat and not has_template:
        raise ModelError(f"{name} is to be asked through the chat template, and the tokenizer has none", NO_TEMPLATE)
    if asking.max_new_tokens is not None and task.max_new_tokens is not None:
        task = replace(task, max_new_tokens=asking.max_new_tokens, is_cut_given=True)
    if not asking.generate:
        task = _read_only(task)
    pool: Sequence[Example] = ()
    if asking.shots and (not task.has_answers or task.metric == "none"):
        raise InputError(
            f"{name} has no answered questions that could stand before others, and --shots asks for {asking.shots}",
            "ask it by itself without --shots (eval.shots in a recipe), or drop it",
        )
    if asking.shots:
        is_file = find_benchmark(name)[0] is FILE
        pool = task.examples if is_file else load_task(name, root, "train").examples
    examples = tuple(
        _put(example, _choose(name, example, pool, asking.shots), is_chat) for example in task.examples[:max_examples]
    )
    way = "chat" if is_chat or not isinstance(task.examples[0].prompt, str) else "plain"
    way += f", {asking.shots} shots" * bool(asking.shots) + ", nothing written" * (not asking.generate)
    bare = _say("user", task.bare_prompt) if is_chat and isinstance(task.bare_prompt, str) else task.bare_prompt
    return replace(task, examples=examples, bare_prompt=bare, way=way)


def check_acting(tasks: Sequence[Task], asking: AskingSection, temperature: float | None = None) -> None:
    """See that each setting changes how some task is asked.

    Args:
        temperature: `eval.temperature`.

    Raises:
        InputError: one changes nothing.
    """
    names = ", ".join(dict.fromkeys(task.name for task in tasks))
    is_chat_idle = not any(task.takes_chat for task in tasks)
    is_nothing_written = all(task.max_new_tokens is None for task in tasks)
    idle = {
        ("--chat" if asking.chat else "--no-chat") + " (eval.chat in a recipe)": asking.chat is not None and is_chat_idle,
        "--max-new-tokens (eval.max_new_tokens in a recipe)": asking.max_new_tokens is not None and is_nothing_written,
        "eval.temperature": bool(temperature) and is_nothing_written,
    }
    for key in (key for key, is_idle in idle.items() if is_idle and tasks):
        reason = "has a way of its own to be asked" if "chat" in key else "is read alone, and nothing is written"
        raise InputError(f"{key} would have no effect: each of {names} {reason}", "drop it")


def _read_only(task: Task) -> Task:
    """The task by the likelihood of its right answers, the first where there are several; multiple choice stays as it is.

    Raises:
        InputError: only what a model writes can be judged.
    """
    if not task.has_answers or task.metric == "code":
        raise InputError(
            f"{task.name} has no right answers to read: only what a model writes can be judged",
            "drop the task, or let answers be written: without --no-generate, in a recipe with eval.generate: true",
        )
    if task.max_new_tokens is None:
        return task
    examples = tuple(replace(example, options=()) for example in task.examples)
    return replace(task, examples=examples, metric="exact_match", max_new_tokens=None)


def _choose(name: str, example: Example, pool: Iterable[Example], num_shots: int) -> list[Example]:
    """The first rows of the pool that are another question, on the same subject."""
    others = (row for row in pool if row.subject == example.subject and row.prompt != example.prompt)
    chosen = [row for row, _ in zip(others, range(num_shots), strict=False)]
    if len(chosen) < num_shots:
        raise InputError(
            f"{name} has {len(chosen)} other rows{f' on {example.subject}' * bool(example.subject)} to answer before a "
            f"question, not {num_shots}",
            "ask for fewer --shots",
        )
    return chosen


def _put(example: Example, shots: Sequence[Example], is_chat: bool) -> Example:
    if is_chat or not isinstance(example.prompt, str):
        options = tuple(option.removeprefix(" ") for option in example.options) if is_chat else example.options
        answer = example.answer.removeprefix(" ") if is_chat else example.answer
        turns = [turn for shot in shots for turn in (*_ask(shot), *_say("assistant", shot.answer.removeprefix(" ")))]
        return replace(example, prompt=[*turns, *_ask(example)], answer=answer, options=options)
    if not shots:
        return example
    answered = "".join(f"{shot.text.removeprefix(shot.intro)}{shot.answer}\n\n" for shot in shots)
    first, last = example.body or (0, len(example.text))
    shift = len(answered)
    return replace(
        example,
        prompt=f"{example.intro}{answered}{example.text.removeprefix(example.intro)}",
        body=(first + shift, last + shift) if example.body else None,
        rules={**example.rules, "source": example.text},
    )


def _ask(example: Example) -> list[dict[str, str]]:
    return _say("user", example.prompt) if isinstance(example.prompt, str) else example.prompt


def _say(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
