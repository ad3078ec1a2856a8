"""What is measured within a round: which tasks ask for what it trains on, and which for what was known before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.sections import QUICK_START
from hftcli.runs.scores import HELD_OUT
from hftcli.tasks import locate_rows


def split_tasks(recipe: Recipe, task: str | None = None, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """What asks for what a round trains on, what for what was known before it, and when that is measured within the round.

    Args:
        task: what a round of a sequence trains on.
        earlier: the tasks of the rounds before it.

    Raises:
        InputError: a limit goes by what nothing measures.
    """
    learned = list_learned(recipe) if task is None else (task,)
    known = tuple(dict.fromkeys((*earlier, *(name for name in recipe.eval.tasks if name not in learned))))
    if recipe.eval.measures_within:
        _check_limits(recipe, learned, known)
    held_out = (HELD_OUT,) if recipe.eval.held_out.path is not None and recipe.objective == "sft" else ()
    return {
        "learned": (*learned, *held_out),
        "known": known,
        "every_steps": recipe.eval.every_steps,
        "num_points": recipe.eval.num_points,
    }


def list_learned(recipe: Recipe) -> tuple[str, ...]:
    """Of `eval.tasks`, those that ask for the rows of `data`, each once.

    They are named alike, or a file of the task is trained on, or the folder of its training rows, however paths are written.
    """
    paths = (recipe.data.path, *(source.path for source in recipe.data.sources))
    trained = {path for path in paths if path is not None}
    places = {_find_place(path) for path in trained}
    return tuple(
        name for name in dict.fromkeys(recipe.eval.tasks) if name in trained or places & _list_places(name, recipe.data.root)
    )


def _find_place(path: str) -> Path:
    return (PACKAGE / path if path.startswith(f"{QUICK_START}/") else Path(path)).resolve()


def _list_places(name: str, root: str | None) -> set[Path]:
    """The files of a task's training and test rows, and the folder of the first."""
    train, test = locate_rows(name, root, "train"), locate_rows(name, root, "test")
    return {path.resolve() for path in (train, train and train.parent, test) if path is not None}


def _check_limits(recipe: Recipe, learned: Sequence[str], known: Sequence[str]) -> None:
    """Raises: InputError: a limit, or the choice of a step, goes by what nothing measures."""
    stop, best, has_held_out = recipe.stop, recipe.checkpoint.best, recipe.eval.held_out.path is not None
    if stop.max_forgetting is not None and not known:
        asking = f": {', '.join(learned)} asks for what is trained on" if learned else ""
        raise InputError(
            f"stop.max_forgetting needs a task that asks for what was known before{asking}", "name one under eval.tasks"
        )
    has_pairs = recipe.objective == "dpo" and has_held_out and stop.by == "score"
    has_rows = recipe.objective == "sft" and has_held_out and (stop.by == "nll" or recipe.data.pattern is not None)
    for key, is_on in (("stop.min_learning", stop.min_learning is not None), ("checkpoint.best", best == "learning")):
        if is_on and not (learned or has_pairs or has_rows):
            raise InputError(
                f"{key} needs something that asks for what is trained on, and of eval.tasks none does",
                "give eval.held_out, with stop.by: score"
                if recipe.objective == "dpo"
                else "name the task of data.path there, or give eval.held_out with stop.by: nll",
            )
