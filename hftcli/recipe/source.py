"""A recipe as it was written: the YAML file with the line of every key, and `--set key=value` laid over it."""

from pathlib import Path
from typing import Any

import yaml

from hftcli.errors import RecipeError


class RecipeFile:
    """A YAML file with the line of every key, so that a fault can name its place."""

    def __init__(self, path: Path):
        self.path = path
        self.origins: dict[tuple, str] = {}
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}"
            raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path}:1: a recipe is a mapping of sections, got a {node.tag.rpartition(':')[2]}")
        self.values: dict[str, Any] = self._read_node(node, ()) if node else {}

    def _read_node(self, node: yaml.Node, keys: tuple) -> Any:
        if isinstance(node, yaml.MappingNode):
            values = {}
            for key_node, value_node in node.value:
                key = (*keys, key_node.value)
                if key_node.value in values:
                    place = f"{self.path}:{key_node.start_mark.line + 1}"
                    raise RecipeError(f"{place}: key '{'.'.join(key)}' is given twice, first at {self.origins[key]}")
                self.origins[key] = f"{self.path}:{key_node.start_mark.line + 1}"
                values[key_node.value] = self._read_node(value_node, key)
            return values
        return yaml.SafeLoader("").construct_object(node, deep=True)

    def place(self, keys: tuple) -> str:
        """Where a key was given: the longest part of its path that stands somewhere."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return self.origins[keys[:length]]
        return str(self.path)


def apply_override(values: dict, override: str, source: RecipeFile) -> None:
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{place}: expected key=value, such as train.learning_rate=1e-5")
    keys = tuple(key.split("."))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: the value is not YAML: {getattr(error, 'problem', None) or error}") from None
    for depth, part in enumerate(keys[:-1], start=1):
        if not isinstance(values.setdefault(part, {}), dict):
            raise RecipeError(f"{place}: {'.'.join(keys[:depth])} is a value, not a section")
        values = values[part]
    values[keys[-1]] = value
    source.origins[keys] = place
