"""From a file to a recipe, checked whole before anything is loaded.

`load_recipe` reads one YAML file, lays `--set key=value` over it, and either returns a `Recipe` or raises one `RecipeError`
that lists every fault with its file, line and key.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hftcli import PACKAGE
from hftcli.errors import RecipeError
from hftcli.recipe.faults import check_fit, check_foreign_keys, check_methods, check_trainer_keys, describe_fault
from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.sections import ContinualSection, DpoSection
from hftcli.recipe.source import RecipeFile, apply_override

QUICK_START_RECIPES: dict[Objective, str] = {"sft": "tinyworld", "dpo": "tinyworld-dpo", "continual": "tinyworld-continual"}


def load_recipe(path: Path | str | None, overrides: Iterable[str] = (), objective: Objective | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, the name of a recipe that ships with hft, or None for the quick start.
        overrides: `key.path=value` strings; the value is YAML.
        objective: what the recipe is for; None takes what its sections say.

    Raises:
        RecipeError: naming every fault at once.
        NewerFile: a newer hft wrote it.
    """
    path = find_recipe(path, objective or "sft")
    source = RecipeFile(path)
    values = source.values
    for override in overrides:
        apply_override(values, override, source)
    try:
        recipe = Recipe.model_validate(values, context=path)
    except ValidationError as error:
        raise RecipeError("\n".join(describe_fault(fault, source) for fault in error.errors())) from None
    objective = objective or recipe.objective
    faults = []
    if objective != "continual" and recipe.data.path is None:
        faults.append(f"{source.place(('data',))}: data.path is missing")
    faults += [*check_foreign_keys(recipe, objective, source), *check_trainer_keys(recipe, objective, source)]
    faults += [*check_methods(recipe, objective, source), *check_fit(recipe, source)]
    if faults:
        raise RecipeError("\n".join(faults))
    return _resolve(recipe, objective, path)


def _resolve(recipe: Recipe, objective: Objective, path: Path) -> Recipe:
    """Fill in what follows from the objective and the file."""
    found: dict[str, Any] = {"output": recipe.output or f"runs/{path.stem}"}
    if objective == "continual":
        found["continual"] = recipe.continual or ContinualSection()
    if objective == "dpo":
        found |= {"dpo": recipe.dpo or DpoSection(), "reference": recipe.reference or "precompute"}
    return recipe.model_copy(update=found)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def list_recipes() -> list[Path]:
    """The recipes that ship with hft: in the package when installed, at the top of a checkout."""
    folders = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
    return sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.yaml"))


def find_recipe(path: Path | str | None, objective: Objective = "sft") -> Path:
    """The file that a path or name means; None means the objective's quick start.

    Raises:
        RecipeError: there is none.
    """
    shipped = {file.stem: file for file in list_recipes()}
    if path is None:
        return shipped[QUICK_START_RECIPES[objective]]
    if Path(path).is_file():
        return Path(path)
    if str(path) in shipped:
        return shipped[str(path)]
    raise RecipeError(f"{path}: no such recipe", "give a YAML file, or one of: " + ", ".join(shipped))
