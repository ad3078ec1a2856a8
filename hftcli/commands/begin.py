"""The commands to begin with: `hft recipes`, `hft init`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hftcli.errors import InputError

app = typer.Typer()


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one: hft recipes tulu > my.yaml.")] = None,
) -> None:
    """The recipes that ship with hft, or the text of one."""
    from hftcli.recipe.loading import list_recipes

    shipped = {file.stem: file.read_text(encoding="utf-8") for file in list_recipes()}
    if name is None:
        width = max(map(len, shipped))
        for stem, text in shipped.items():
            print(f"{stem:{width}}  {text.splitlines()[0].lstrip('# ')}")
    elif name in shipped:
        print(shipped[name], end="")
    else:
        raise InputError(f"no recipe {name} ships with hft", f"give one of {', '.join(shipped)}")


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="The model to start from: a folder, a run or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="The rows to train on: a file, a folder or a hub id.")],
    tasks: Annotated[str, typer.Option("--tasks", help="What to ask before and after, with commas between.")] = "",
    output: Annotated[Path, typer.Option("--output", help="The file to write.")] = Path("my.yaml"),
) -> None:
    """Write a commented recipe for a model and rows, to be looked through and changed."""
    from hftcli.recipe.starter import write_starter
    from hftcli.reporting.places import name_hft
    from hftcli.runs.files import write_text

    if output.exists():
        raise InputError(f"--output {output}: there is a file already", "give another, or remove it")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}", "make it, or give another")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    write_text(output, write_starter(model, data, str(output), names))
    print(output)
    for command, meaning in (("data --recipe", "what was read"), ("plan", "what would train"), ("sft", "train")):
        print(f"next    {name_hft()} {command} {output}  # {meaning}", file=sys.stderr)
