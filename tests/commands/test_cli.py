"""The table of commands, and what is left alone until a command needs it."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

from hftcli.commands.cli import COMMANDS

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
