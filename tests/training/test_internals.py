"""What hft uses of other libraries' own affairs: it is listed, it is there, and it is used in one file."""

import ast
import importlib
import inspect
import os
import pkgutil
import textwrap
from pathlib import Path

import deepspeed.ops
import pytest
import torch
import transformers
import trl

import hftcli
from hftcli.training import internals

OWNERS = {
    "transformers.Trainer": transformers.Trainer,
    "transformers.PreTrainedConfig": transformers.PreTrainedConfig,
    "trl.SFTTrainer": trl.SFTTrainer,
    "trl.DPOTrainer": trl.DPOTrainer,
    "deepspeed.ops": deepspeed.ops,
}
FILE = Path(internals.__file__)
LISTED = {name for names in internals.INTERNALS.values() for name in names}
# Documented under these names: by os, and by torch's notes on how autograd finds a change in place.
DOCUMENTED = {"_exit": os, "_version": torch.Tensor}


def read_source(owner: object) -> str:
    """The source of a module, or of a class and of what it inherits from."""
    if not inspect.isclass(owner):
        return inspect.getsource(owner)
    return "".join(
        inspect.getsource(base) for base in owner.__mro__ if base.__module__.partition(".")[0] in ("trl", "transformers")
    )


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in internals.INTERNALS.items() for name in names])
def test_what_is_listed_is_in_the_installed_version(owner: str, name: str):
    found = ast.walk(ast.parse(textwrap.dedent(read_source(OWNERS[owner]))))
    fields = ("attr", "name", "id", "value")
    known = {vars(node)[field] for node in found for field in fields if isinstance(vars(node).get(field), str)}
    assert name in known, f"{owner} has no {name} any more: {internals.INTERNALS[owner][name]}"


def test_what_is_documented_is_there():
    assert all(hasattr(owner, name) for name, owner in DOCUMENTED.items())


def find_underscored(path: Path) -> tuple[set[str], set[str]]:
    """Names with an underscore that a file defines, and those that it takes from an object or a module."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name)}
    taken = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    taken |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return {*defined, *DOCUMENTED}, {name for name in taken if name.startswith("_") and not name.endswith("__")}


def test_nothing_else_takes_a_name_with_an_underscore_from_a_library():
    for path in Path(hftcli.__file__).parent.rglob("*.py"):
        defined, taken = find_underscored(path)
        if path != FILE:
            assert taken <= defined, f"{path.name} takes {sorted(taken - defined)}, which belongs into {FILE.name}"


def test_what_is_used_is_listed_and_what_is_listed_is_used():
    used = {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.FunctionDef)
    }
    assert {name for name in used if name.startswith("_")} == LISTED


def test_nothing_else_overrides_what_a_library_keeps_to_itself():
    """A method of ours that is called like one of a library's would be called by it."""
    for module in pkgutil.walk_packages(hftcli.__path__, "hftcli."):
        if module.name in ("hftcli.__main__", internals.__name__):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(kind) or kind.__module__ != module.name:
                continue
            foreign = [base for base in kind.__mro__ if base.__module__.startswith(("trl", "transformers", "deepspeed"))]
            own = {name for name in vars(kind) if name.startswith("_") and not name.endswith("__")}
            taken = {name for name in own for base in foreign if name in vars(base)} - {"_abc_impl"}
            assert not taken, f"{kind.__name__} in {module.name} overrides {sorted(taken)}, which belongs into {FILE.name}"
