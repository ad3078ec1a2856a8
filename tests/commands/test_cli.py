"""The table of commands, and what is left alone until a command needs it."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from hftcli.commands.cli import COMMANDS, spell_out
from hftcli.commands.options import join_given
from hftcli.errors import InputError
from hftcli.recipe.faults import list_keys

HEAVY = {"torch", "transformers", "yaml", "numpy", "jinja2", "rich.progress", "hftcli.recipe.recipe", "hftcli.runners"}


def test_the_table_is_what_the_modules_have():
    found = {
        command.name or command.callback.__name__: (module, inspect.getdoc(command.callback).splitlines()[0])
        for module in {module for module, _ in COMMANDS.values()}
        for command in import_module(f"hftcli.commands.{module}").app.registered_commands
    }
    assert found == COMMANDS


def list_imports(*arguments: str) -> set[str]:
    """Every module that is there when the command ends."""
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from hftcli.commands.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_list_of_commands_imports_none_of_them():
    imported = list_imports("--help")
    assert "hftcli.commands.cli" in imported
    # The options of a command are read with pydantic, by Typer itself.
    assert imported.isdisjoint({*HEAVY, "pydantic", *(f"hftcli.commands.{module}" for module, _ in COMMANDS.values())})


@pytest.mark.parametrize("name", {module: name for name, (module, _) in COMMANDS.items()}.values())  # one of each module
def test_the_help_of_a_command_imports_nothing_heavy(name):
    imported = list_imports(name, "--help")
    assert f"hftcli.commands.{COMMANDS[name][0]}" in imported
    assert imported.isdisjoint(HEAVY)


def test_every_key_of_a_recipe_is_an_option_too():
    options = {"--set", "--output", "--dry-run"}
    given = ["my.yaml", "--train.learning_rate", "1e-4", "--model.path=a=b", "--output", "x", "--data.max_length", "-1"]
    expected = ["my.yaml", "--set", "train.learning_rate=1e-4", "--set", "model.path=a=b", "--output", "x"]
    assert spell_out(given, options) == [*expected, "--set", "data.max_length=-1"]
    for wrong in (["--train.learning_rate"], ["--train.learning_rate", "--dry-run"]):
        with pytest.raises(InputError, match="--train.learning_rate has no value"):
            spell_out(wrong, options)
    with pytest.raises(InputError) as raised:
        spell_out(["--learning-rate", "1e-4"], options)
    assert raised.value.fix == "give --train.learning_rate VALUE"
    with pytest.raises(InputError) as raised:
        spell_out(["--weight_decay=1"], options)
    assert raised.value.fix == "give --train.weight_decay VALUE", "one that is passed on to the trainer"
    assert spell_out(["--freeze", "quiet"], options) == ["--set", "freeze=quiet"]
    assert spell_out(["--reference", "shared"], options) == ["--set", "reference=shared"]
    assert spell_out(["--no-such"], options) == ["--no-such"], "what is like no key is for the parser to refuse"


def test_the_keys_are_those_of_the_schema():
    keys = list(list_keys())
    assert len(keys) == len(set(keys))
    for key in ("model.path", "train.learning_rate", "eval.held_out.path", "method.lora.r", "dpo.beta", "output"):
        assert key in keys
    assert "train.hub_token" not in keys


def test_a_recipe_is_named_once():
    assert join_given("a", None, {"model.path": "m", "data.path": None}, ["x=1"]) == ("a", ['model.path="m"', "x=1"])
    assert join_given(None, "b", {}, None) == ("b", [])
    with pytest.raises(InputError, match="two recipes: a and --recipe b"):
        join_given("a", "b", {}, None)
