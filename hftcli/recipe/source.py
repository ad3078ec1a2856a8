"""A recipe as it was written: the YAML file with the line of every key, and `--set key=value` laid over it."""

import re
from pathlib import Path
from typing import Any

import yaml

from hftcli.errors import RecipeError
from hftcli.freezing.rule import QUIET

Keys = tuple[str, ...]  # of a value, from the outside in

SECRET_NAME = re.compile(r"(?i)(hub|hf|api|auth|access|wandb)_?(token|key)|password|secret")
SECRET_VALUE = re.compile(r"(?i)\bhf_[a-z0-9]{16,}|(token|api_key|secret|password)=[^\s,]")
# Keys that say more about what a path holds, and that go when `--set` gives another path.
PATH_KEYS = {
    ("model", "path"): ("revision",),
    ("data", "path"): ("name", "split", "revision", "sources"),
    ("data", "sources"): ("path", "name", "split", "revision"),
    ("eval", "held_out", "path"): ("name", "split", "revision"),
}
# Keys of `freeze` that go with a grain, and that go when `--set freeze=quiet` gives another; it leaves the file's others.
GRAIN_KEYS = ("grain", "blocks", "part")
# Two lengths of a training, of which `--set` gives one in place of the file's other.
LENGTH_KEYS: dict[Keys, tuple[str, ...]] = {
    ("train", "max_steps"): ("num_train_epochs",),
    ("train", "num_train_epochs"): ("max_steps",),
}


class RecipeLoader(yaml.SafeLoader):
    """Reads scalars by the core schema of YAML 1.2: 1e-8 is a number, 010 is ten, and 8:00:00, no and 2024-01-01 are text."""

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """A decimal, octal or hexadecimal number."""
        text = node.value.lower()
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, of which no key may stand twice."""
        keys = [key.value for key, _ in node.value]
        if doubled := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key '{doubled}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.yaml_implicit_resolvers = {}  # in place of those of YAML 1.1


class RecipeDumper(yaml.SafeDumper):
    """Writes in quotes what `RecipeLoader` would take for something else than text."""

    yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", tuple("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     tuple("-+.0123456789")),
):  # fmt: skip
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), first)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_number)


class RecipeFile:
    """A YAML file with the line of every key, so that a fault can name its place.

    Args:
        path: None is a file with nothing in it.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.origins: dict[Keys, str] = {}
        self.values: dict[str, Any] = {}
        if path is None:
            return
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}"
            raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path}:1: a recipe is a mapping of sections, got a {node.tag.rpartition(':')[2]}")
        if node:
            self.values = self._read_node(node, ())

    def _read_node(self, node: yaml.Node, keys: Keys) -> Any:
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
        if isinstance(node, yaml.SequenceNode):
            return [self._read_node(part, (*keys, str(index))) for index, part in enumerate(node.value)]
        return RecipeLoader("").construct_object(node, deep=True)

    def place(self, keys: Keys, is_given: bool = False) -> str:
        """Where a key was given: the longest part of its path that stands somewhere.

        Args:
            is_given: it has a value, so that it stands where a part of that stands, if nowhere else.
        """
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return self.origins[keys[:length]]
        below = [place for found, place in self.origins.items() if is_given and found[: len(keys)] == keys]
        return below[-1] if below else str(self.path) if self.path else "no recipe, and no --set"


def apply_override(values: dict[str, Any], override: str, source: RecipeFile) -> None:
    """Lay `key.path=value` over the values; a section that is null is opened, and `freeze=quiet` leaves what else stands there.

    Raises:
        RecipeError: it has another form, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    place = f"--set {key}=..." if holds_secret(key, text) else f"--set {override}"
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{place}: expected key=value, such as train.learning_rate=1e-5")
    keys = tuple(key.split("."))
    try:
        value = yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: the value is not YAML: {getattr(error, 'problem', None) or error}") from None
    for depth, part in enumerate(keys[:-1], start=1):
        if values.get(part) is None:
            values[part] = {}
        if not isinstance(values[part], dict):
            raise RecipeError(f"{place}: {'.'.join(keys[:depth])} is a value, not a section")
        values = values[part]
    replaced = LENGTH_KEYS if value not in (None, -1) else {}  # of which -1 asks for no length
    for other in (*PATH_KEYS.get(keys, ()), *replaced.get(keys, ())):
        if not source.place((*keys[:-1], other)).startswith("--set "):
            values.pop(other, None)
    if keys == ("freeze",) and value == "quiet" and isinstance(found := values.get("freeze"), dict):
        value = {name: kept for name, kept in found.items() if name not in GRAIN_KEYS} | QUIET
        source.origins |= {("freeze", name): place for name in GRAIN_KEYS}
    values[keys[-1]] = value
    source.origins[keys] = place


def holds_secret(key: str, value: Any) -> bool:
    """Whether a key is called, or a value looks, like what nobody else may read."""
    return bool(SECRET_NAME.search(key) or (isinstance(value, str) and SECRET_VALUE.search(value)))
