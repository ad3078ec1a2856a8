"""The commands: parse, call one runner, print. Results go to stdout; logs and progress to stderr.

Nothing heavy is imported before the command that needs it runs: `hft --help` stays instant, and torch is loaded only where a
command opens a model or its data in this process.
"""

import atexit
import gc
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hftcli import __version__
from hftcli.commands import look, make, measure, train
from hftcli.errors import HftError, explain_os_error
from hftcli.launching.signals import ignore_signals, stop_at_signals

if TYPE_CHECKING:
    pass


app = typer.Typer(
    help="Fine-tune language models without making them forget, and see what they forgot.",
    epilog="Any command takes --traceback: show where in the code an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `hft` command; an HftError becomes its message, its fix and its exit code."""
    show_traceback = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    atexit.register(gc.freeze)  # where torch was imported, the interpreter's own last collection would take seconds
    stop_at_signals()
    try:
        app()
    except (HftError, OSError) as error:
        ignore_signals()
        known = error if isinstance(error, HftError) else explain_os_error(error)
        if show_traceback or known is None:
            raise
        print(f"hft: {known.message}", file=sys.stderr)
        if known.fix:
            print(f"     fix: {known.fix}", file=sys.stderr)
        sys.exit(known.exit_code)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for command in (
    train.sft, train.dpo, train.continual, look.plan, look.data, look.verify, measure.evaluate, look.report, make.merge,
    make.reset, look.doctor, measure.compare,
):  # fmt: skip
    app.command("eval" if command is measure.evaluate else None)(command)
