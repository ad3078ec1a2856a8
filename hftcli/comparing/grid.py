"""The runs of a comparison: a recipe with every combination of what is varied, and every seed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml

from hftcli.comparing.comparison import Comparison
from hftcli.comparing.points import SEED_KEYS
from hftcli.errors import RecipeError
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """A run of a grid.

    Attributes:
        settings: `key=value` of what is varied.
    """

    settings: tuple[str, ...]
    recipe: Recipe


def make_grid(
    recipe: Path | str | None, overrides: Sequence[str], vary: Iterable[str], seeds: Iterable[int], output: Path
) -> list[Planned]:
    """The recipes of all settings with all seeds, each with a folder of its own under `output`.

    Args:
        overrides: `key=value` of every run.
        vary: `key=value,value,...`; the product of several is taken.
        seeds: for the halves and the order of the data alike.

    Raises:
        RecipeError: a fault in one of them; nothing has run yet.
    """
    axes = [_read_axis(text) for text in vary]
    keys = [key for key, _ in axes]
    if taken := [key for key in keys if key in (*SEED_KEYS, "output")]:
        raise RecipeError(f"--vary {taken[0]}: hft compare sets it itself", "give --seeds and --output")
    _check_order(keys)
    grid = []
    for values in product(*(values for _, values in axes)):
        settings = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for seed in seeds:
            folder = output / _name_folder(settings, seed)
            given = [*overrides, *settings, *(f"{key}={seed}" for key in SEED_KEYS), f"output={yaml.safe_dump(str(folder))}"]
            grid.append(Planned(tuple(settings), _load(recipe, given)))
    outputs = [planned.recipe.output for planned in grid]
    if doubled := [output for output in outputs if outputs.count(output) > 1]:
        raise RecipeError(f"--vary: two runs would be written to {doubled[0]}", "give each value once")
    return grid


def _check_order(keys: Sequence[str]) -> None:
    """Raises: RecipeError: a key's values would be lost: they are laid over one another in order."""
    for place, key in enumerate(keys):
        if key in keys[:place]:
            raise RecipeError(f"--vary {key} is given twice", f"give all values in one: --vary {key}=A,B")
        if inner := next((earlier for earlier in keys[:place] if earlier.startswith(f"{key}.")), None):
            raise RecipeError(f"--vary {key} would write over --vary {inner}, which lies inside it", f"give {key} before it")


def choose_settings(grid: Iterable[Planned], comparison: Comparison) -> list[tuple[str, ...]]:
    """Of a grid that has run, the settings of each method that none of its others beats, by their means over the seeds."""
    settings = {str(planned.recipe.output): planned.settings for planned in grid}
    chosen = [
        settings[method.settings[place].points[0].name] for method in comparison.methods for place in sorted(method.frontier)
    ]
    return list(dict.fromkeys(chosen))


def aim_at(recipe: Path | str | None, overrides: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The overrides, and those by which a recipe learns other tasks, and is asked for them in place of its own.

    Raises:
        RecipeError: a recipe of one task, and several are given.
    """
    found = _load(recipe, overrides)
    if found.continual is not None:
        return [*overrides, f"continual.tasks={_dump(list(tasks))}", "continual.order=null", "continual.protocol=null"]
    if len(tasks) > 1:
        raise RecipeError(f"--tune-tasks: the recipe learns one task, and {len(tasks)} are given", "give one")
    asked = list(dict.fromkeys(tasks[0] if name == found.data.path else name for name in found.eval.tasks))
    return [*overrides, f"data.path={_dump(tasks[0])}", f"eval.tasks={_dump(asked)}"]


def _dump(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _load(recipe: Path | str | None, overrides: Sequence[str]) -> Recipe:
    """With its objective filled in: what the recipe's sections say it is."""
    return load_recipe(recipe, overrides, load_recipe(recipe, overrides).objective)


def _read_axis(text: str) -> tuple[str, list[str]]:
    """Raises: RecipeError: not key=value,value."""
    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = []
    if not equals or not key or not found:
        raise RecipeError(f"--vary {text}: expected key=value,value, such as train.learning_rate=3e-4,7e-4")
    return key, [_dump(value) for value in found]


def _name_folder(settings: Sequence[str], seed: int) -> str:
    """`trainable_fraction=0.5,learning_rate=3e-4-1`."""
    told = []
    for setting in settings:
        key, _, value = setting.partition("=")
        plain = re.sub(r"[^\w.+-]+", "-", value).strip("-")
        told.append(f"{key.rpartition('.')[2]}={plain}")
    return f"{','.join(told) or 'run'}-{seed}"
