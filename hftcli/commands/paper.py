"""The paper's tables: `hft paper`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hftcli.errors import InputError

app = typer.Typer()
SEEDS = 3


@app.command()
def paper(
    name: Annotated[Literal["sft", "dpo", "trace"], typer.Argument(help="Which of the paper's settings.")],
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Seeds of each setting.", show_default=f"{SEEDS}")] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the runs.")] = Path("runs/paper"),
    table: Annotated[bool, typer.Option("--table", help="What was run, beside what the paper reports.")] = False,
) -> None:
    """The commands of one of the paper's tables; with --table, its numbers beside those that were run."""
    from hftcli.comparing.paper import PIPELINES, list_commands, list_rows
    from hftcli.reporting.lines import say
    from hftcli.reporting.terminal import make_number_table, print_whole

    if table and seeds is not None:
        raise InputError("--table shows every seed whose runs are in --output, and --seeds is how many to run", "drop --seeds")
    if table:
        shown = make_number_table("points of 100", "paper, full", "paper, half", "here, full", "here, half")
        for row in list_rows(name, output):
            shown.add_row(*row)
        say(f"{name}: arXiv 2404.18466, Llama-2-7B; means over seeds with 95 % intervals")
        print_whole(shown)
        return
    print("#!/bin/sh")
    print(f"# hft paper {name} > {name}.sh; look through it; sh {name}.sh; hft paper {name} --table")
    for needed in PIPELINES[name].needs:
        print(f"# needs {needed}")
    print("set -e")  # also where it is given to `sh`
    print("\n".join(list_commands(name, seeds or SEEDS, output)))
