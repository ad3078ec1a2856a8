"""The commands: parse, call one runner, print. Results go to stdout; logs and progress to stderr.

Nothing heavy is imported before the command that needs it runs: `hft --help` stays instant, and torch is loaded only where a
command opens a model or its data in this process.
"""

import atexit
import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hftcli import __version__
from hftcli.errors import HftError, InputError, explain_os_error
from hftcli.launching.signals import ignore_signals, stop_at_signals

if TYPE_CHECKING:
    from hftcli.doctor import Finding
    from hftcli.recipe import Objective, Recipe
    from hftcli.run import Run

app = typer.Typer(
    help="Fine-tune language models without making them forget, and see what they forgot.",
    epilog="Any command takes --traceback: show where in the code an error came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@app.command()
def sft(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    hostfile: HostfileOption = None,
    slurm: SlurmOption = False,
    submit: SubmitOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Supervised fine-tuning; with no recipe, the built-in quick start."""
    extra = [*(overrides or ()), *_place_run(hostfile, slurm, submit, dry_run)]
    _run_single(_load_recipe(recipe, extra, output, num_processes, "sft"), dry_run, slurm, submit)


@app.command()
def dpo(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    hostfile: HostfileOption = None,
    slurm: SlurmOption = False,
    submit: SubmitOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Direct preference optimization; with no recipe, the built-in quick start."""
    extra = [*(overrides or ()), *_place_run(hostfile, slurm, submit, dry_run)]
    _run_single(_load_recipe(recipe, extra, output, num_processes, "dpo"), dry_run, slurm, submit)


@app.command()
def continual(
    recipe: RecipeOption = None,
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
    from hftcli import report, runners
    from hftcli.tasks.check import format_report

    given = [f"continual.tasks={json.dumps(tasks)}"] if tasks else []
    given += [f"continual.order={json.dumps(order)}"] if order else []
    given += [*(overrides or ()), *_place_run(hostfile, slurm, submit, dry_run)]
    resolved = _load_recipe(recipe or _find_task_recipe(tasks), given, output, num_processes, "continual")
    run = runners.prepare_continual(_check_place(resolved, dry_run, slurm))
    print(format_report(run.read_manifest().sequence))
    if dry_run or slurm:
        _print_launch(run, "continual", dry_run, slurm, submit)
        return
    with report.show_progress() as on_progress:
        matrix = runners.finish_continual(run, on_progress)
    report.print_continual(run, matrix)


def _find_task_recipe(tasks: str | None) -> str | None:
    """The shipped recipe that is called as the benchmark; None leaves the quick start's."""
    from hftcli.recipe import QUICK_START, list_recipes

    return tasks if tasks != QUICK_START and tasks in {file.stem for file in list_recipes()} else None


@app.command()
def plan(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    model: Annotated[str | None, typer.Option("--model", help="A folder with a config.json, a run, or a hub id.")] = None,
    num_processes: ProcessesOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take two steps here and correct the estimate.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What trains, what is frozen, and the memory and compute per device, beside full fine-tuning."""
    from hftcli import report, runners
    from hftcli.models import describe_model

    if model is not None:
        # What the quick start sets for its tiny model does not suit another one.
        plain = ["train.bf16=true", "launch.num_processes=null"] if recipe is None else []
        overrides = [f"model.path={json.dumps(model)}", *plain, *(overrides or ())]
    resolved = _load_recipe(recipe, overrides, None, num_processes)
    start = runners.resolve_start(resolved.model.path)
    described = describe_model(start.path)
    budget = runners.plan_recipe(resolved, start, described.model_type, described.parameters, described.num_heads)
    checked = None
    if measure:
        from hftcli.probe import check_budget

        budget, checked = check_budget(resolved, start.path, budget)
    report.print_plan(budget, checked, as_json)


@app.command()
def data(recipe: RecipeOption = None, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """What the data are: format, counts, lengths, and a sample with its trained tokens in colour.

    A recipe with a section `dpo` has preference pairs.
    """
    from hftcli import report, runners
    from hftcli.chat import set_chat_template
    from hftcli.data import decode_samples, default_cache, prepare_dataset, prepare_pairs
    from hftcli.models import fetch_checkpoint, load_tokenizer

    resolved = _load_recipe(recipe, overrides, None, None)
    tokenizer = load_tokenizer(fetch_checkpoint(runners.resolve_start(resolved.model.path).path))
    set_chat_template(tokenizer, resolved.model.chat_template)
    if resolved.objective == "sft":
        dataset, summary = prepare_dataset(resolved.data, resolved.train, tokenizer, default_cache())
    else:
        dataset, summary = prepare_pairs(resolved.data, tokenizer, default_cache())
    report.print_data(summary, decode_samples(dataset, tokenizer, 0), as_json)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A run's folder, or a round's.")], as_json: JsonOption = False) -> None:
    """Check that frozen parameters are bit-identical to the start and trained ones moved; exit 3 if not."""
    from hftcli import report
    from hftcli.models import verify_round
    from hftcli.run import find_rounds

    found = {round_.name: verify_round(round_) for round_ in find_rounds(path)}
    report.print_verification(found, as_json)
    if not all(verification.passed for verification in found.values()):
        raise typer.Exit(3)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Option("--model", help="A folder with a config.json, a run, or a hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks", help="Tasks, with commas between: tinyworld/facts, trace/FOMC, a folder, FILE.jsonl, harness:NAME."
        ),
    ] = "",
    root: Annotated[str | None, typer.Option("--root", help="Folder of the tasks' rows; a run knows its own.")] = None,
    max_examples: Annotated[int | None, typer.Option("--max-examples", min=1, help="The first so many rows of each.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=8, help="Tokens of a question with its answer.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="What the model was trained from; a run knows its own.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help='Base text, {"text": "..."} on each line.')] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help='A task, or a file of {"prompt": "...", "answer": "..."}.')
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Data type to compute in.")] = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", help="FILE.json; the items go to FILE.items.jsonl beside it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on tasks, and measure how far it has moved from its base.

    FILE.jsonl holds {"question", "choices", "answer": index} or {"question", "answers"} on each line. A base is asked the same
    questions, which shows what was lost and won; beside it the change of cross-entropy and KL(base || model) are measured on
    --text, or on samples of the base, and on --prompts.
    """
    from hftcli.evaluation import check_output, write_evaluation
    from hftcli.report import print_evaluation, show_counts
    from hftcli.runners import list_versions, resolve_subject

    subject = resolve_subject(model)
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    base = resolve_subject(base).path if base else subject.base
    if base is None and (text or prompts):
        raise InputError("--text and --prompts compare a model with its base", "give --base")
    if base is None and not names:
        raise InputError("there is nothing to measure", "give --tasks, or --base")
    if output:
        check_output(output)

    from hftcli.scoring import Examination, examine_model

    examination = Examination(
        model=subject.path, tasks=names, base=base, root=root or subject.root, max_examples=max_examples,
        max_length=max_length or subject.max_length, text=text, prompts=prompts, dtype=dtype,
    )  # fmt: skip
    with show_counts() as on_progress:
        evaluation, items = examine_model(examination, list_versions(), on_progress)
    print_evaluation(evaluation, as_json)
    if output:
        print(f"items  {write_evaluation(output, evaluation, items)}", file=sys.stderr)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a matrix file.")],
    as_json: JsonOption = False,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the matrix into this .svg or .png file.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write the run's page into this file.")] = None,
) -> None:
    """What a run learned and lost; of a continual run, the forgetting matrix and its metrics.

    A matrix file is {"tasks": [...], "scores": [[...], ...]}: row 0 the base model, values in [0, 1] or null.
    """
    from hftcli.figures import check_figure_path, draw_matrix
    from hftcli.forgetting import read_matrix
    from hftcli.page import write_page
    from hftcli.report import print_matrix, print_run, print_run_json
    from hftcli.run import Run, find_rounds

    run = Run(path)
    is_single = run.recipe_path.exists() and not run.matrix_path.exists()
    if figure:
        check_figure_path(figure)
        if is_single:
            raise InputError(f"{path} has no forgetting matrix to draw", "give --html: its figures are on its page")
    if is_single:
        find_rounds(path)
        print_run_json(run) if as_json else print_run(run)
    else:
        matrix = read_matrix(path)
        print_matrix(matrix, as_json)
        if figure:
            draw_matrix(matrix, figure)
            print(f"figure  {figure}", file=sys.stderr)
    if page:
        write_page(run, page)
        print(f"page    {page}", file=sys.stderr)


@app.command()
def merge(
    output: Annotated[Path, typer.Option("--output", help="Folder to write; must not be there.")],
    base: Annotated[str | None, typer.Option("--base", help="The base: a folder, a run, or a hub id.")] = None,
    delta: Annotated[str | None, typer.Option("--delta", help="A delta checkpoint, or a run that ends in one.")] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="A model tuned from the base.")] = None,
    weight: Annotated[
        float | None, typer.Option("--interpolate", min=0, max=1, metavar="A", help="Write (1 - A) base + A tuned.")
    ] = None,
) -> None:
    """A full model out of a delta checkpoint, or the weighted mean of a model and its base.

    A delta knows its base; --base says where it is now, if it was moved.
    """
    is_mean = base is not None and tuned is not None and weight is not None
    if (delta is None) != is_mean or (delta is not None and (tuned, weight) != (None, None)):
        raise InputError(
            "hft merge takes --delta, or --base with --tuned and --interpolate",
            "hft merge --base BASE --delta DELTA --output FOLDER, or "
            "hft merge --base BASE --tuned TUNED --interpolate 0.5 --output FOLDER",
        )
    from hftcli import arithmetic, report, runners

    if is_mean:
        manifest = arithmetic.interpolate_models(_fetch(base), _fetch(tuned), weight, output)
    else:
        # Not fetched as a model is: the base may be found only through --base.
        folder = Path(runners.resolve_start(delta).path)
        manifest = arithmetic.merge_delta(folder, output, _fetch(base) if base is not None else None)
    report.print_merge(manifest, output)


@app.command()
def reset(
    base: Annotated[str, typer.Option("--base", help="The model that was tuned: a folder, a run, or a hub id.")],
    tuned: Annotated[str, typer.Option("--tuned", help="The tuned model: a folder, a run, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write; must not be there.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="freeze.KEY=VALUE", help="Draw the half by another rule: what it freezes goes back."),
    ] = None,
) -> None:
    """Half-Reset: a tuned model with a random half of its weight matrices back at the base, bit for bit."""
    for override in overrides or ():
        if not override.startswith("freeze."):
            raise InputError(f"--set {override}: a reset has no other keys than those of freeze", "--set freeze.seed=7")
    from hftcli import arithmetic, report
    from hftcli.recipe import load_recipe

    rule = load_recipe(None, overrides or ()).freeze  # the quick start has the paper's rule
    report.print_merge(arithmetic.reset_half(_fetch(base), _fetch(tuned), rule, output), output)


@app.command()
def doctor(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    hostfile: HostfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, the hosts of a hostfile, and what of a recipe will not fit; exit 2 at a fault."""
    from hftcli import report

    extra = [*(overrides or ()), *_place_run(hostfile)]
    resolved = _load_recipe(recipe, extra, output, num_processes) if recipe or extra or num_processes else None
    findings = _examine(resolved, is_model_given=recipe is not None)
    report.print_findings(findings, as_json)
    if any(finding.status == "fault" for finding in findings):
        raise typer.Exit(2)


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    vary: Annotated[
        list[str] | None, typer.Option("--vary", metavar="KEY=V1,V2,...", help="Run the recipe with each of these values.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Run each setting with so many seeds.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the runs of --recipe, and of their figure.")
    ] = None,
    learned: Annotated[
        list[str] | None, typer.Option("--learned", metavar="TASK", help="A task that measures what was learned.")
    ] = None,
    by: Annotated[
        Literal["score", "nll"], typer.Option("--by", help="Gains and losses of scores, or of the likelihood of right answers.")
    ] = "score",
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw learning against forgetting: .svg or .png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Learning against forgetting: methods at equal learning, over learning rates and seeds.

    Takes finished runs, or a recipe with what to vary: then runs what is missing, and goes on where it stopped.
    """
    from hftcli import report, runners
    from hftcli.comparison import compare_runs, make_grid
    from hftcli.figures import check_figure_path, draw_frontier

    if recipe is None and (vary or overrides or output):
        raise InputError("hft compare takes --vary, --set and --output with --recipe only", "name a recipe, or only runs")
    if figure:
        check_figure_path(figure)
    folders = list(runs or ())
    if recipe is not None:
        output = output or Path("runs") / f"compare-{Path(recipe).stem}"
        grid = make_grid(recipe, overrides or (), vary or (), seeds, output)
        with report.show_progress() as on_progress:
            for index, resolved in enumerate(grid, start=1):
                print(f"run {index} of {len(grid)}: {resolved.output}", file=sys.stderr)
                folders.append(runners.run_recipe(_check_place(resolved, False, False), on_progress).folder)
        figure = figure or output / "frontier.svg"
    comparison = compare_runs(folders, learned or (), by)
    if figure:
        draw_frontier(comparison, figure)
    report.print_comparison(comparison, as_json)
    if figure:
        print(f"figure  {figure}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _load_recipe(
    recipe: str | None,
    overrides: list[str] | None,
    output: Path | None,
    num_processes: int | None,
    objective: "Objective | None" = None,
) -> "Recipe":
    from hftcli.recipe import load_recipe

    extra = [f"output={json.dumps(str(output))}"] if output else []
    extra += [f"launch.num_processes={num_processes}"] if num_processes else []
    return load_recipe(recipe, [*(overrides or ()), *extra], objective)


def _fetch(path: str) -> Path:
    """The folder of a model that the command line names."""
    from hftcli.models import fetch_checkpoint
    from hftcli.runners import resolve_start

    return fetch_checkpoint(resolve_start(path).path)


def _place_run(hostfile: Path | None, slurm: bool = False, submit: bool = False, dry_run: bool = False) -> list[str]:
    """Where a run is to be, as overrides of its recipe."""
    if submit and (dry_run or not slurm):
        raise InputError("--submit queues the script that --slurm writes", "give it with --slurm, and without --dry-run")
    return [f"launch.hostfile={json.dumps(str(hostfile))}"] if hostfile else []


def _check_place(recipe: "Recipe", dry_run: bool, use_slurm: bool) -> "Recipe":
    """The recipe with Slurm's section where it is asked for; without an allocation, nothing is begun that needs one."""
    from hftcli.launching import slurm

    if use_slurm:
        return slurm.add_section(recipe)
    if not dry_run:
        slurm.check_allocation(recipe.launch, os.environ)
    return recipe


def _run_single(recipe: "Recipe", dry_run: bool, use_slurm: bool, submit: bool) -> None:
    from hftcli import report, runners

    recipe = _check_place(recipe, dry_run, use_slurm)
    if dry_run or use_slurm:
        _print_launch(runners.prepare_single(recipe)[0], recipe.objective, dry_run, use_slurm, submit)
        return
    with report.show_progress() as on_progress:
        run = runners.run_single(recipe, on_progress)
    report.print_run(run)


def _print_launch(run: "Run", command: str, dry_run: bool, use_slurm: bool, submit: bool) -> None:
    """Show what would run a prepared run's rounds, or write the batch script and queue it."""
    from hftcli import runners
    from hftcli.launching import slurm

    if use_slurm:
        script = slurm.write_script(run, command, run.rounds[0].read_spec().launch)
        if dry_run:
            print(f"# {script}\n{script.read_text(encoding='utf-8')}")
        elif submit:
            print(slurm.submit(script))
        else:
            print(f"sbatch {shlex.quote(str(script))}")
    if dry_run:
        for round_ in run.rounds:
            print(runners.describe_launch(round_))


def _examine(recipe: "Recipe | None", is_model_given: bool) -> "list[Finding]":
    """Every check that can be made; one that fails does not keep the others from being made."""
    from hftcli import doctor, runners
    from hftcli.doctor import Finding
    from hftcli.launching.command import resolve_launch
    from hftcli.launching.hosts import read_hostfile

    findings = doctor.check_packages()
    try:
        from hftcli.machine import probe_machine
        from hftcli.models import describe_model

        probe = probe_machine()
    except (ImportError, OSError) as error:
        return [*findings, Finding("torch", "fault", f"does not load: {error}", "install hft and what it needs again")]
    findings += [*doctor.check_devices(probe, recipe), doctor.check_ops(probe)]
    if recipe is None:
        return findings
    try:
        resolved = resolve_launch(recipe.launch)
    except InputError as error:
        return [*findings, Finding("launch", "fault", error.message, error.fix)]
    findings += (launchers := doctor.check_launcher(resolved))
    reports = []
    if resolved.hostfile and all(finding.status == "ok" for finding in launchers):
        folder = doctor.find_existing(Path(recipe.output))
        found, reports = doctor.check_hosts(read_hostfile(resolved.hostfile), resolved.num_processes, folder)
        findings += found
    if not is_model_given:
        return findings
    try:
        start = runners.resolve_start(recipe.model.path)
        described = describe_model(start.path)
        budget = runners.plan_recipe(recipe, start, described.model_type, described.parameters, described.num_heads)
    except InputError as error:
        return [*findings, Finding("model", "fault", error.message, error.fix)]
    try:
        num_rounds = runners.count_rounds(recipe)
    except InputError as error:
        return [*findings, Finding("tasks", "fault", error.message, error.fix)]
    return [
        *findings,
        doctor.check_disk(recipe, Path(start.path), budget.plan, resolved.num_ranks, num_rounds),
        doctor.check_memory(budget, doctor.share_memory(resolved, reports)),
    ]
