"""A recipe to begin with: the keys that most people set, each with its first sentence from the schema and its default."""

import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from hftcli import PACKAGE
from hftcli.freezing.positions import find_max_positions, read_config
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import open_section
from hftcli.recipe.sections import QUICK_START, DataSection

KEYS: dict[str, tuple[str, ...]] = {
    "model": ("path",),
    "data": ("path", "max_length"),
    "freeze": ("trainable_fraction", "seed"),
    "train": ("num_train_epochs", "learning_rate", "global_batch_size", "per_device_train_batch_size"),
    "launch": ("num_processes", "zero_stage"),
    "eval": ("tasks",),
}
WIDTH = 100


def write_starter(model: str, data: str, name: str, tasks: list[str]) -> str:
    """The text of the recipe.

    Args:
        name: the file's name, for the command in its first line.
        tasks: what to ask before and after.
    """
    given: dict[str, Any] = {"model.path": model, "data.path": data, "eval.tasks": tasks}
    default = DataSection.model_fields["max_length"].default
    given["data.max_length"] = min(default, read_max_positions(model) or default)
    lines = [f"# hft sft {name}", f"# The other keys are in hft's recipes/README.md. Output: runs/{Path(name).stem}"]
    for section, keys in KEYS.items():
        schema = open_section(Recipe.model_fields[section].annotation)
        assert schema is not None
        lines += ["", f"{section}:"]
        for key in keys:
            lines += _comment(schema, key)
            value = given.get(f"{section}.{key}", schema.model_fields[key].default)
            lines.append(f"  {key}: {_dump(value)}")
    return "\n".join(lines) + "\n"


def read_max_positions(model: str) -> int | None:
    """The positions of a model that is here; None where it is not, or where they have no limit.

    Raises:
        ModelError: its config is damaged.
    """
    path = (PACKAGE / QUICK_START / "model" if model == QUICK_START else Path(model)) / "config.json"
    return find_max_positions(read_config(path)) if path.is_file() else None


def _comment(schema: type[BaseModel], key: str) -> list[str]:
    """What the schema says first of a key."""
    words = " ".join((schema.model_fields[key].description or "").split())
    return textwrap.wrap(words.partition(". ")[0].rstrip(".:") + ".", WIDTH, initial_indent="  # ", subsequent_indent="  # ")


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
