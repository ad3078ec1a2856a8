"""The runs of a comparison: a recipe with every combination of what is varied, and every seed."""

import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import yaml

from hftcli.comparing.points import SEED_KEYS
from hftcli.errors import RecipeError
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.recipe import Recipe


def make_grid(
    recipe: Path | str | None, overrides: Sequence[str], vary: Iterable[str], num_seeds: int, output: Path
) -> list[Recipe]:
    """The recipes of all settings with all seeds, each with a folder of its own under `output`.

    Args:
        overrides: `key=value` of every run.
        vary: `key=value,value,...`; the product of several is taken.
        num_seeds: seeds 1 to so many, for the halves and the order of the data alike.

    Raises:
        RecipeError: a fault in one of them; nothing has run yet.
    """
    axes = [_read_axis(text) for text in vary]
    keys = [key for key, _ in axes]
    if taken := [key for key in keys if key in (*SEED_KEYS, "output")]:
        raise RecipeError(f"--vary {taken[0]}: hft compare sets it itself", "give --seeds and --output")
    recipes = []
    for values in product(*(values for _, values in axes)):
        settings = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        for seed in range(1, num_seeds + 1):
            folder = output / _name_folder(settings, seed)
            given = [*overrides, *settings, *(f"{key}={seed}" for key in SEED_KEYS), f"output={yaml.safe_dump(str(folder))}"]
            recipes.append(_load(recipe, given))
    return recipes


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
    return key, [yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip() for value in found]


def _name_folder(settings: Sequence[str], seed: int) -> str:
    """`trainable_fraction=0.5,learning_rate=3e-4-1`."""
    told = []
    for setting in settings:
        key, _, value = setting.partition("=")
        plain = re.sub(r"[^\w.+-]+", "-", value).strip("-")
        told.append(f"{key.rpartition('.')[2]}={plain}")
    return f"{','.join(told) or 'run'}-{seed}"
