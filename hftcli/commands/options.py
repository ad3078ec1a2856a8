"""Options that commands share, and what is made of them."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hftcli.errors import InputError

if TYPE_CHECKING:
    from hftcli.recipe.recipe import Objective, Recipe


RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A YAML file, or the name of a shipped recipe.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Folder of the run.")]
ProcessesOption = Annotated[int | None, typer.Option("--num-processes", help="Processes on each machine.")]
HostfileOption = Annotated[Path | None, typer.Option("--hostfile", help="The machines, in DeepSpeed's format, over ssh.")]
SlurmOption = Annotated[bool, typer.Option("--slurm", help="Write the batch script of the run, to be queued with sbatch.")]
SubmitOption = Annotated[bool, typer.Option("--submit", help="With --slurm: queue it.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Prepare and check, print the launch command, stop.")]
Dtype = Literal["float32", "bfloat16", "float16"]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_recipe(
    recipe: str | None,
    overrides: list[str] | None,
    output: Path | None,
    num_processes: int | None,
    objective: "Objective | None" = None,
) -> "Recipe":
    from hftcli.recipe.loading import load_recipe

    extra = [f"output={json.dumps(str(output))}"] if output else []
    extra += [f"launch.num_processes={num_processes}"] if num_processes else []
    return load_recipe(recipe, [*(overrides or ()), *extra], objective)


def fetch_folder(path: str) -> Path:
    """The folder of a model that the command line names."""
    from hftcli.models.description import fetch_checkpoint
    from hftcli.runners import resolve_start

    return fetch_checkpoint(resolve_start(path).path)


def place_run(hostfile: Path | None, slurm: bool = False, submit: bool = False, dry_run: bool = False) -> list[str]:
    """Where a run is to be, as overrides of its recipe."""
    if submit and (dry_run or not slurm):
        raise InputError("--submit queues the script that --slurm writes", "give it with --slurm, and without --dry-run")
    return [f"launch.hostfile={json.dumps(str(hostfile))}"] if hostfile else []


def check_place(recipe: "Recipe", dry_run: bool, use_slurm: bool) -> "Recipe":
    """The recipe with Slurm's section where it is asked for; without an allocation, nothing is begun that needs one."""
    from hftcli.launching import slurm

    if use_slurm:
        return slurm.add_section(recipe)
    if not dry_run:
        slurm.check_allocation(recipe.launch, os.environ)
    return recipe
