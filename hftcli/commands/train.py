"""The commands that train: `hft sft`, `hft dpo`, `hft continual`."""

import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from hftcli.commands.options import (
    DataOption,
    DryRunOption,
    HostfileOption,
    ModelOption,
    OutputOption,
    Place,
    ProcessesOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
    SlurmOption,
    SubmitOption,
    check_place,
    join_given,
    read_recipe,
)
from hftcli.errors import InputError

if TYPE_CHECKING:
    from hftcli.recipe.recipe import Recipe
    from hftcli.recipe.sections import LaunchSection
    from hftcli.runs.run import Run

app = typer.Typer()


@app.command()
def sft(
    named: RecipeArgument = None,
    recipe: RecipeOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    hostfile: HostfileOption = None,
    slurm: SlurmOption = False,
    submit: SubmitOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Supervised fine-tuning; with no recipe, the built-in quick start."""
    place = Place(hostfile, slurm, submit, dry_run)
    recipe, given = join_given(named, recipe, {"model.path": model, "data.path": data}, overrides)
    _run_single(read_recipe(recipe, given, output, num_processes, place, "sft"), place)


@app.command()
def dpo(
    named: RecipeArgument = None,
    recipe: RecipeOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    hostfile: HostfileOption = None,
    slurm: SlurmOption = False,
    submit: SubmitOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Direct preference optimization; with no recipe, the built-in quick start."""
    place = Place(hostfile, slurm, submit, dry_run)
    recipe, given = join_given(named, recipe, {"model.path": model, "data.path": data}, overrides)
    _run_single(read_recipe(recipe, given, output, num_processes, place, "dpo"), place)


@app.command()
def continual(
    named: RecipeArgument = None,
    recipe: RecipeOption = None,
    model: ModelOption = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="A benchmark (tinyworld, trace, standard), or tasks, with commas between.")
    ] = None,
    order: Annotated[str | None, typer.Option("--order", help="Which of the benchmark's orders.")] = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    hostfile: HostfileOption = None,
    slurm: SlurmOption = False,
    submit: SubmitOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Task after task, with the whole forgetting matrix; with no recipe, the built-in quick start."""
    from hftcli import runners
    from hftcli.recipe.sections import ContinualSection
    from hftcli.reporting.lines import say
    from hftcli.reporting.progress import show_progress
    from hftcli.reporting.rounds import print_continual
    from hftcli.reporting.trackers import report_to_trackers
    from hftcli.tasks import find_sequence
    from hftcli.tasks.check import format_report

    place = Place(hostfile, slurm, submit, dry_run)
    options = {"model.path": model, "continual.tasks": tasks or None, "continual.order": order or None}
    recipe, given = join_given(named, recipe, options, overrides)
    if tasks and recipe is None and not any(override.startswith("data.root=") for override in given):
        find_sequence(ContinualSection(tasks=tasks))  # a name that is misspelt is no task of the user's own
    resolved = read_recipe(recipe or _find_task_recipe(tasks), given, output, num_processes, place, "continual")
    run = runners.prepare_continual(check_place(resolved, place))
    if (sequence := run.read_manifest().sequence) is not None:
        say(format_report(sequence))
    if place.dry_run or place.slurm:
        _print_launch(run, resolved, place)
        return
    with show_progress() as on_progress:
        matrix = runners.finish_continual(run, on_progress)
    print_continual(run, matrix)
    report_to_trackers(run)


def _find_task_recipe(tasks: str | None) -> str | None:
    """The shipped recipe that is called as the benchmark; None leaves the quick start's."""
    from hftcli.recipe.loading import list_recipes
    from hftcli.recipe.sections import QUICK_START

    return tasks if tasks != QUICK_START and tasks in {file.stem for file in list_recipes()} else None


def _run_single(recipe: "Recipe", place: Place) -> None:
    from hftcli import runners
    from hftcli.reporting.progress import show_progress
    from hftcli.reporting.rounds import print_run
    from hftcli.reporting.trackers import report_to_trackers

    recipe = check_place(recipe, place)
    if place.dry_run or place.slurm:
        _print_launch(runners.prepare_single(recipe)[0], recipe, place)
        return
    with show_progress() as on_progress:
        run = runners.run_single(recipe, on_progress)
    print_run(run)
    report_to_trackers(run)


def _print_launch(run: "Run", recipe: "Recipe", place: Place) -> None:
    """Show what a prepared run's rounds would do and what would run them, or write the batch script and queue it."""
    from hftcli import runners
    from hftcli.launching import slurm
    from hftcli.launching.command import resolve_launch

    launch = resolve_launch(recipe.launch)  # a round that is done keeps the launch that it had
    if place.dry_run:
        _foresee(run, recipe, launch)
    if place.slurm:
        script = slurm.write_script(run, recipe.objective, launch, recipe.checkpoint.is_on)
        if place.dry_run:
            print(f"# {script}\n{script.read_text(encoding='utf-8')}")
        elif place.submit:
            print(slurm.submit(script))
        else:
            print(f"sbatch {shlex.quote(str(script))}")
    if place.dry_run:
        for round_ in run.rounds:
            print(runners.describe_launch(round_))


def _foresee(run: "Run", recipe: "Recipe", launch: "LaunchSection") -> None:
    """Read the rows and whatever else can be known before there are weights."""
    from hftcli.launching.command import worker_environment

    os.environ.update(worker_environment(launch))  # as the worker sees it
    from hftcli.reporting.outlook import print_outlooks
    from hftcli.reporting.progress import show_counts
    from hftcli.training.outlook import foresee_run

    with show_counts() as on_progress:
        outlooks, findings = foresee_run(recipe, run, on_progress)
    print_outlooks(outlooks, {round_.name: round_.read_spec() for round_ in run.rounds}, findings)
    for finding in findings:
        if finding.status == "fault":
            raise InputError(f"{finding.check}: {finding.message}", finding.fix)
