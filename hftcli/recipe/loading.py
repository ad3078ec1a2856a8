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
from hftcli.freezing.rule import QUIET
from hftcli.recipe.effects import check_effects
from hftcli.recipe.faults import (
    check_booleans,
    check_finite,
    check_fit,
    check_foreign_keys,
    check_measuring,
    check_methods,
    check_secrets,
    check_trainer_keys,
    describe_faults,
    type_trainer_keys,
)
from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.section import open_nulls
from hftcli.recipe.sections import QUICK_START, ContinualSection, DpoSection
from hftcli.recipe.source import RecipeDumper, RecipeFile, apply_override

QUICK_START_RECIPES: dict[Objective, str] = {"sft": "tinyworld", "dpo": "tinyworld-dpo", "continual": "tinyworld-continual"}


def load_recipe(
    path: Path | str | None, overrides: Iterable[str] = (), objective: Objective | None = None, needs_rows: bool = True,
    is_written: bool = False,
) -> Recipe:  # fmt: skip
    """Read a recipe.

    Args:
        path: a YAML file, the name of a recipe that ships with hft, or None: the quick start, or with a model or tasks of the
            user's own, the schema's defaults.
        overrides: `key.path=value` strings; the value is YAML.
        objective: what the recipe is for; None takes what its sections say.
        needs_rows: False where nothing is asked of the rows, which may then be missing.
        is_written: a run's own, which is read to know what it did: a setting without effect changes nothing of that, be it one
            that an earlier hft let pass.

    Raises:
        RecipeError: naming every fault at once.
        NewerFile: a newer hft wrote it.
    """
    overrides = tuple(overrides)
    found = find_base(path, overrides, objective or "sft")
    source = RecipeFile(found)
    values = source.values
    _raise_form(values)
    if isinstance(values.get("data"), list):  # short for its sources alone
        values["data"] = {"sources": values["data"]}
    for override in overrides:
        if values.get("freeze") == "quiet":
            values["freeze"] = dict(QUIET)  # a short name, of which one key may be changed
        apply_override(values, override, source)
    values = open_nulls(values, Recipe)
    faults = [*check_secrets(values, source), *check_booleans(values, source), *type_trainer_keys(values, source)]
    try:
        recipe = Recipe.model_validate({"model": {}, **values}, context=found)
    except ValidationError as error:
        faults += describe_faults(error.errors(), source)
        raise RecipeError("\n".join(faults)) from None
    objective = objective or recipe.objective
    if objective != "continual" and recipe.data.path is None and not recipe.data.sources and needs_rows:
        faults.append(f"{source.place(('data',))}: data.path is missing")
    faults += [*check_foreign_keys(recipe, objective, source), *check_trainer_keys(recipe, objective, source)]
    faults += [*check_methods(recipe, objective, source), *check_fit(recipe, source)]
    faults += check_finite(recipe.model_dump(), source)
    if not faults and not is_written:  # what is not of its type has no effect to speak of
        faults += [*check_measuring(recipe, objective, source), *check_effects(recipe, objective, source)]
    if faults:
        raise RecipeError("\n".join(faults))
    return _resolve(recipe, objective, found.stem if found else objective)


def _raise_form(values: dict[str, Any]) -> None:
    """Say in this form, in place, what a file of the first one says: there, true left it to the device as null does now."""
    if type(values.get("version")) is not int or values["version"] != 1:
        return
    values["version"] = 2
    if isinstance(train := values.get("train"), dict) and train.get("bf16") is True:
        train["bf16"] = None


def find_base(path: Path | str | None, overrides: Iterable[str], objective: Objective) -> Path | None:
    """The file that a recipe begins with; None where that is nothing, so that all that is not given has its default.

    The quick start's settings suit its own model, and with rows of the user's own it stays the quick start.

    Raises:
        RecipeError: there is none of that name.
    """
    given = dict(override.partition("=")[::2] for override in overrides) if path is None else {}
    is_own_model = not given.keys().isdisjoint({"model", "model.path"})
    are_own_tasks = objective == "continual" and (
        "data.root" in given or QUICK_START not in given.get("continual.tasks", QUICK_START)
    )
    return None if is_own_model or are_own_tasks else find_recipe(path, objective)


def describe_defaults(recipe: Recipe) -> str:
    """What a model and rows without a recipe are trained with."""
    train, freeze = recipe.train, recipe.freeze
    passes = "1 epoch" if train.num_train_epochs == 1 else f"{train.num_train_epochs:g} epochs"
    length = f"{train.max_steps} steps" if train.max_steps > 0 else passes
    return (
        f"no recipe: {length} at learning rate {train.learning_rate:g} ({train.lr_scheduler_type}), batches of "
        f"{train.global_batch_size}, at most {recipe.data.max_length} tokens, {freeze.trainable_fraction:.0%} of each "
        f"{freeze.group} trained; --set changes each"
    )


def _resolve(recipe: Recipe, objective: Objective, name: str) -> Recipe:
    """Fill in what follows from the objective and the recipe's name."""
    found: dict[str, Any] = {"output": recipe.output or f"runs/{name}"}
    if objective == "continual":
        found["continual"] = recipe.continual or ContinualSection()
    if objective == "dpo":
        found |= {"dpo": recipe.dpo or DpoSection(), "reference": recipe.reference or "precompute"}
    return recipe.model_copy(update=found)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back as the same recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


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
