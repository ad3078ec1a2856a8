"""Options that commands share, and what is made of them."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hftcli.errors import InputError

if TYPE_CHECKING:
    from hftcli.recipe.recipe import Objective, Recipe

OPTIONS = {"data.root": "--root", "data.max_length": "--max-length"}  # of `hft eval`, by the keys of a recipe

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or the name of a shipped recipe; also as --recipe.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model to start from: a folder, a run or a hub id.")]
DataOption = Annotated[str | None, typer.Option("--data", help="The rows to train on: a file, a folder or a hub id.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, as --KEY VALUE does."),
]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Folder of the run.")]
ProcessesOption = Annotated[int | None, typer.Option("--num-processes", min=1, help="Processes on each machine.")]
HostfileOption = Annotated[Path | None, typer.Option("--hostfile", help="The machines, in DeepSpeed's format, over ssh.")]
SlurmOption = Annotated[bool, typer.Option("--slurm", help="Write the batch script of the run, to be queued with sbatch.")]
SubmitOption = Annotated[bool, typer.Option("--submit", help="With --slurm: queue it.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Prepare and check, print the launch command, stop.")]
Dtype = Literal["float32", "bfloat16", "float16"]
ChatOption = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Ask files through the chat template; by default if there is one.")
]
ShotsOption = Annotated[int, typer.Option("--shots", min=0, help="Answered questions before each, of the task's own rows.")]
CutOption = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Where an answer is cut; a task knows its own.")]
GenerateOption = Annotated[
    bool,
    typer.Option("--generate/--no-generate", help="Let answers be written, or read the right ones alone, which is faster."),
]
CodeOption = Annotated[bool, typer.Option("--allow-code", help="Run what the model writes for HumanEval.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse tasks with a right answer that no model can give.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Place:
    """Where a run is to be, and whether it begins now.

    Raises:
        InputError: nothing would be queued that `submit` asks for.
    """

    hostfile: Path | None = None
    slurm: bool = False
    submit: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.submit and (self.dry_run or not self.slurm):
            raise InputError("--submit queues the script that --slurm writes", "give it with --slurm, and without --dry-run")


HERE = Place()
Given = tuple[str | None, list[str]]  # a recipe's name, and what overrides its keys


def join_given(named: str | None, recipe: str | None, given: dict[str, str | None], overrides: Sequence[str] | None) -> Given:
    """The recipe, by its place or by --recipe, and all that overrides it, options first.

    Raises:
        InputError: two recipes are named.
    """
    if named is not None and recipe is not None:
        raise InputError(f"two recipes: {named} and --recipe {recipe}", "name one")
    options = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return named or recipe, [*options, *(overrides or ())]


def read_recipe(
    recipe: str | None,
    overrides: Sequence[str] | None = None,
    output: Path | None = None,
    num_processes: int | None = None,
    place: Place = HERE,
    objective: "Objective | None" = None,
    needs_rows: bool = True,
) -> "Recipe":
    """The recipe with what the command line overrides; without one, the quick start of the objective, or the defaults."""
    from hftcli.recipe.loading import describe_defaults, find_base, load_recipe
    from hftcli.reporting.lines import fold

    extra = [f"launch.hostfile={json.dumps(str(place.hostfile))}"] if place.hostfile else []
    extra += [f"output={json.dumps(str(output))}"] if output else []
    extra += [f"launch.num_processes={num_processes}"] if num_processes else []
    given = [*(overrides or ()), *extra]
    resolved = load_recipe(recipe, given, objective, needs_rows)
    if find_base(recipe, given, objective or "sft") is None:
        print(fold(describe_defaults(resolved), sys.stderr), file=sys.stderr)
    return resolved


def check_place(recipe: "Recipe", place: Place = HERE) -> "Recipe":
    """The recipe with Slurm's section where it is asked for; without an allocation, nothing is begun that needs one."""
    from hftcli.launching import slurm

    if place.slurm:
        return slurm.add_section(recipe)
    if not place.dry_run:
        slurm.check_allocation(recipe.launch, os.environ)
    return recipe


def check_files(**paths: Path | None) -> None:
    """Raises: InputError: a file that the option of this name asks for cannot be written, for something else is there."""
    for name, path in paths.items():
        if path is None:
            continue
        if path.is_dir():
            raise InputError(f"--{name} {path} is a folder, and a file is to be written", f"name a file: {path / 'FILE'}")
        if taken := next((parent for parent in path.parents if parent.is_file()), None):
            raise InputError(f"--{name} {path}: {taken} is a file, and no folder", "give another")


@contextmanager
def naming_options() -> Iterator[None]:
    """Name what is wrong with rows by the options of a command that takes no recipe."""
    try:
        yield
    except InputError as error:
        message, fix = error.message, error.fix
        for key, option in OPTIONS.items():
            message, fix = message.replace(key, option), fix.replace(key, option)
        raise type(error)(message, fix) from None


def fetch_folder(path: str) -> Path:
    """The folder of a model that the command line names."""
    from hftcli.models.description import fetch_checkpoint
    from hftcli.runners import resolve_start

    return fetch_checkpoint(resolve_start(path).path)
