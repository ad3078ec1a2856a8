"""The commands: parse, call one runner, print. Results go to stdout; logs and progress to stderr.

A command's module is imported when the command is called, and what is heavy in it when it runs: `hft --help` reads this table
alone, and torch is loaded only where a command opens a model or its data in this process.
"""

import atexit
import gc
import os
import re
import sys
from collections.abc import Collection
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hftcli import __version__
from hftcli.errors import HftError, InputError, explain_os_error
from hftcli.launching.signals import ignore_signals, stop_at_signals

# What is typed after `hft`: the module that has it, and the first line of its docstring.
COMMANDS = {
    "sft": ("train", "Supervised fine-tuning; with no recipe, the built-in quick start."),
    "dpo": ("train", "Direct preference optimization; with no recipe, the built-in quick start."),
    "continual": ("train", "Task after task, with the whole forgetting matrix; with no recipe, the built-in quick start."),
    "recipes": ("begin", "The recipes that ship with hft, or the text of one."),
    "init": ("begin", "Write a commented recipe for a model and rows, to be looked through and changed."),
    "plan": ("look", "What trains, what is frozen, and the memory and compute per device, beside full fine-tuning."),
    "data": ("look", "What the data are: format, counts, lengths, and a sample with its trained tokens in colour."),
    "verify": ("look", "Check that frozen parameters are bit-identical to the start and trained ones moved; exit 3 if not."),
    "eval": ("measure", "Score a model on tasks, and measure how far it has moved from its base."),
    "chat": ("talk", "Talk to a model; with --beside, to another one at the same time, such as what it was before training."),
    "generate": ("talk", "Answer prompts, one on each line of a file."),
    "report": (
        "look",
        "What a run learned and lost; of a continual run, its matrix and metrics; of several runs, a line each.",
    ),
    "merge": (
        "make",
        "A full model out of a delta checkpoint; the mean of a model and its base, or its largest changes on its base.",
    ),
    "reset": ("make", "Half-Reset: a tuned model with a random half of its weight matrices back at the base, bit for bit."),
    "paper": ("paper", "The commands of one of the paper's tables; with --table, its numbers beside those that were run."),
    "push": (
        "share",
        "Share a run's model on the Hugging Face hub, with its card and its page; --dry-run shows what would go.",
    ),
    "doctor": ("look", "Check this machine, the hosts of a hostfile, and what of a recipe will not fit; exit 2 at a fault."),
    "advise": (
        "advise",
        "Search for the recipe that learns most of the rows and loses no more than allowed of what must be kept.",
    ),
    "compare": ("measure", "Learning against forgetting: methods at equal learning, over learning rates and seeds."),
}


KEY = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+|freeze|reference")  # of a recipe: in a section, or one that a word may be given


class LazyCommand(TyperCommand):
    """A command as the table has it: its name and its help are known, its options once it is called."""

    def make_context(self, info_name: str | None, args: list[str], *parent: Any, **settings: Any) -> Any:
        """Import the command's module, and have the command in it read the options."""
        assert self.name is not None
        module = import_module(f"hftcli.commands.{COMMANDS[self.name][0]}")
        command = typer.main.get_group(module.app).commands[self.name]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if "--set" in options:
            args = spell_out(args, {*options, "--help"})
        return command.make_context(info_name, args, *parent, **settings)


def spell_out(arguments: list[str], options: Collection[str]) -> list[str]:
    """`--train.learning_rate 1e-4`, and with `=`, as `--set train.learning_rate=1e-4`.

    Args:
        options: the command's own.

    Raises:
        InputError: an option is none of the command's, and the name of a key without its section; or it lacks its value.
    """
    found: list[str] = []
    given = iter(arguments)
    for argument in given:
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--")
        if not (name.startswith("--") and KEY.fullmatch(key)):
            if name.startswith("--") and name not in options and (meant := find_keys(key)):
                raise InputError(f"there is no option {name}", f"give {' or '.join(f'--{key} VALUE' for key in meant)}")
            found.append(argument)
            continue
        if not equals and (value := next(given, "--")).startswith("--"):
            raise InputError(f"{name} has no value", f"give {name} VALUE")
        found += ["--set", f"{key}={value}"]
    return found


def find_keys(name: str) -> list[str]:
    """The recipe's keys that an option without a section may mean: `learning-rate` is `train.learning_rate`."""
    from hftcli.recipe.faults import OTHER_NAMES, list_keys

    if name in OTHER_NAMES:
        return [OTHER_NAMES[name]]
    return [key for key in list_keys() if key.rpartition(".")[2] == name.replace("-", "_")]


app = typer.Typer(
    help="Fine-tune half of a language model, freeze the other half, and see what it forgot.",
    epilog="Any command takes --traceback: show where in the code an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Answer `hft --version`, and give way to the command otherwise."""
    if version:
        print(__version__)
        raise typer.Exit


for name, (_, summary) in COMMANDS.items():
    app.command(name, cls=LazyCommand, help=summary)(lambda: None)


def main() -> None:
    """The `hft` command; an HftError becomes its message, its fix and its exit code."""
    show_traceback = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    if sys.platform == "darwin":  # what torch has no kernel for on a Mac's GPU goes to the processor; read as torch is imported
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    atexit.register(gc.freeze)  # where torch was imported, the interpreter's own last collection would take seconds
    stop_at_signals()
    try:
        app()
    except (HftError, OSError) as error:
        ignore_signals()
        known = error if isinstance(error, HftError) else explain_os_error(error)
        if show_traceback or known is None:
            raise
        from hftcli.reporting.lines import fold

        print(fold(f"hft: {known.message}", sys.stderr), file=sys.stderr)
        if known.fix:
            print(fold(f"     fix: {known.fix}", sys.stderr), file=sys.stderr)
        sys.exit(known.exit_code)
