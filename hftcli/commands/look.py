"""The commands that look: `hft plan`, `hft data`, `hft verify`, `hft report`, `hft doctor`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hftcli.commands.options import (
    HostfileOption,
    JsonOption,
    OutputOption,
    Place,
    ProcessesOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
    check_files,
    join_given,
    read_recipe,
)
from hftcli.errors import InputError

if TYPE_CHECKING:
    from hftcli.doctor.doctor import Finding
    from hftcli.freezing.budget import Budget
    from hftcli.models.description import ModelDescription
    from hftcli.recipe.recipe import Recipe
    from hftcli.runners import Start

app = typer.Typer()


@app.command()
def plan(
    named: RecipeArgument = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    model: Annotated[str | None, typer.Option("--model", help="A folder with a config.json, a run, or a hub id.")] = None,
    num_processes: ProcessesOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take two steps here and correct the estimate.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What trains, what is frozen, and the memory and compute per device, beside full fine-tuning."""
    from hftcli import runners
    from hftcli.freezing.roles import UnknownRoles
    from hftcli.models.description import describe_model
    from hftcli.reporting.plans import print_plan, print_proposal

    recipe, given = join_given(named, recipe, {"model.path": model}, overrides)
    resolved = read_recipe(recipe, given, num_processes=num_processes, needs_rows=False)
    start = runners.resolve_start(resolved.model.place)
    described = describe_model(start.path)
    try:
        budget = _plan_start(resolved, start, described)
    except UnknownRoles:
        print_proposal(described.model_type, described.parameters, as_json)
        raise
    checked = None
    if measure:
        refuse_unmeasured(resolved)
        from hftcli.training.probe import check_budget

        budget, checked = check_budget(resolved, start.path, budget)
    print_plan(budget, checked, resolved.train.bf16 is None, as_json)
    _show_next(recipe, resolved.objective, as_json)


def refuse_unmeasured(recipe: "Recipe") -> None:
    """Raises: InputError: `--measure` would take other steps than the recipe's: it takes AdamW's, here, and of the weights."""
    from hftcli.freezing.states import STATE_FORMS, find_form
    from hftcli.recipe.methods import ADAPTERS

    optim = recipe.train.extra.get("optim", "adamw_torch_fused")
    adapter = next((name for name in recipe.method.names if name in ADAPTERS), None)
    others = {
        "launch.offload: optimizer": recipe.launch.offload == "optimizer",
        f"method.{adapter}": adapter is not None,
        f"train.optim: {optim}": find_form(optim, recipe.train.extra.get("optim_args")) != STATE_FORMS["adamw_torch_fused"],
    }
    for key in (key for key, is_set in others.items() if is_set):
        raise InputError(
            f"--measure takes steps of AdamW on the device that train the weights themselves, and the recipe has {key}",
            "drop --measure: the estimate alone counts this",
        )


def _plan_start(
    recipe: "Recipe", start: "Start", described: "ModelDescription", is_faster_in_bfloat16: bool = True
) -> "Budget":  # fmt: skip
    """What the recipe's next round would train of a start, and its cost, with adapters of PEFT's where it has some."""
    from hftcli import runners
    from hftcli.models.reader import foresee_held

    held = foresee_held(recipe.model, start.path, (parameter.name for parameter in described.parameters))
    shape = described.model_type, described.parameters, described.num_heads
    budget = runners.plan_recipe(recipe, start, *shape, is_faster_in_bfloat16, held)
    if recipe.method.peft is None and recipe.method.ia3 is None:
        return budget
    from hftcli.methods.census import count_adapters  # PEFT takes a second to open

    return count_adapters(budget, recipe.method, start.path)


@app.command()
def data(
    rows: Annotated[str | None, typer.Argument(help="Rows to look at: a file, a folder or a hub id.")] = None,
    recipe: RecipeOption = None,
    model: Annotated[str | None, typer.Option("--model", help="The model whose tokens and template count.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the data are: format, counts, lengths, and a sample with its trained tokens in colour.

    A recipe with a section `dpo` has preference pairs, one with `continual` the rows of each task. Rows and a model need no
    recipe: the columns say what the rows are.
    """
    from hftcli import runners
    from hftcli.data.cache import default_cache
    from hftcli.data.checks import check_token_ids, check_tokenizer
    from hftcli.data.prepare import prepare_dataset, prepare_pairs, prepare_task
    from hftcli.data.rows import detect_objective
    from hftcli.data.samples import decode_samples, show_samples
    from hftcli.data.templates import set_chat_template
    from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer
    from hftcli.reporting.terminal import print_data, print_task_data
    from hftcli.tasks import find_sequence, load_task

    given = {"data.path": rows, "model.path": model}
    extra = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    resolved = read_recipe(recipe, [*extra, *(overrides or ())])
    is_bare = recipe is None and rows is not None
    objective = detect_objective(resolved.data) if is_bare else resolved.objective
    folder = fetch_checkpoint(runners.resolve_start(resolved.model.place).path)
    num_embeddings = describe_model(str(folder)).num_embeddings
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, num_embeddings)
    set_chat_template(tokenizer, resolved.model.chat_template)
    if resolved.continual is not None:
        section, found = resolved.data, {}
        for name in find_sequence(resolved.continual, section.root).tasks:
            task = load_task(name, section.root, "train", section.max_examples)
            dataset, summary = prepare_task(task, section, tokenizer, default_cache())
            found[name] = summary, decode_samples(dataset, tokenizer, 0)
        print_task_data(found, as_json)
        return
    if objective == "dpo":
        dataset, summary = prepare_pairs(resolved.data, tokenizer, default_cache())
    else:
        dataset, summary = prepare_dataset(resolved.data, resolved.train, tokenizer, default_cache())
    check_token_ids(summary, tokenizer, num_embeddings)
    print_data(summary, show_samples(dataset, summary, default_cache(), tokenizer), as_json)
    _show_next(recipe, "plan", as_json)


def _show_next(recipe: str | None, command: str, as_json: bool) -> None:
    """The command that goes on with a recipe of the user's own."""
    from hftcli.reporting.places import name_hft

    if recipe is not None and Path(recipe).is_file() and not as_json:
        print(f"next    {name_hft()} {command} {recipe}", file=sys.stderr)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A run's folder, or a round's.")], as_json: JsonOption = False) -> None:
    """Check that frozen parameters are bit-identical to the start and trained ones moved; exit 3 if not."""
    from hftcli.models.proof import verify_round
    from hftcli.reporting.rounds import print_verification
    from hftcli.runs.run import find_rounds

    found = {round_.name: verify_round(round_) for round_ in find_rounds(path)}
    print_verification(found, as_json)
    if not all(verification.passed for verification in found.values()):
        raise typer.Exit(3)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, or a matrix file.")],
    as_json: JsonOption = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the matrix, or what a run learned, into this .svg or .png file.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write the page; of several runs, one that leads to theirs.")
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the tables as LaTeX.")] = False,
    lost: Annotated[bool, typer.Option("--lost", help="Show the questions lost and won, with the answers.")] = False,
) -> None:
    """What a run learned and lost; of a continual run, its matrix and metrics; of several runs, a line each.

    A matrix file is {"tasks": [...], "scores": [[...], ...]}: row 0 the base model, values in [0, 1] or null.
    """
    from hftcli.reporting.latex import make_tables
    from hftcli.runs.run import Round

    check_files(figure=figure, html=page)
    for path in paths:
        if (round_ := Round(path)).spec_path.exists():
            raise InputError(f"{path} is a round, and a report is of its run", f"hft report {round_.run_folder}")
    if latex and (as_json or figure or page or lost):
        raise InputError("--latex prints tables and nothing else", "drop --json, --figure, --html and --lost, or --latex")
    if latex:
        print(make_tables(paths))
    elif len(paths) > 1:
        _report_several(paths, as_json, page, figure is not None or lost)
    else:
        _report_one(paths[0], as_json, figure, page, lost)


def _report_several(paths: list[Path], as_json: bool, page: Path | None, has_more: bool) -> None:
    from hftcli.reporting.index import list_lines, print_index, write_index

    if has_more:
        raise InputError("--figure and --lost are of one run", "name one, or see hft compare for several")
    print_index(list_lines(paths), as_json)
    if page:
        write_index(list_lines(paths, page), page)
        print(f"page    {page}", file=sys.stderr)


def _report_one(path: Path, as_json: bool, figure: Path | None, page: Path | None, lost: bool) -> None:
    from hftcli.comparing.forgetting import read_matrix
    from hftcli.reporting.answers import print_lost
    from hftcli.reporting.energy import print_energies
    from hftcli.reporting.figures import check_figure_path, draw_matrix, draw_run
    from hftcli.reporting.lines import say
    from hftcli.reporting.measures import print_matrix
    from hftcli.reporting.page import write_page
    from hftcli.reporting.places import show_place
    from hftcli.reporting.rounds import print_run, print_run_json
    from hftcli.runs.run import Run, find_rounds

    run = Run(path)
    is_single = run.recipe_path.exists() and not run.matrix_path.exists()
    if figure:
        check_figure_path(figure)
    if lost:
        find_rounds(path)
        print_lost(run, as_json)
    elif is_single:
        find_rounds(path)
        print_run_json(run) if as_json else print_run(run)
    else:
        matrix = read_matrix(path)
        unverified = run.unverified
        print_matrix(matrix, as_json, not unverified if run.recipe_path.exists() else None)
        if unverified and not as_json:
            say(f"NOT VERIFIED: {', '.join(round_.name for round_ in unverified)}; see hft verify {show_place(path)}")
        if run.recipe_path.exists() and not as_json:
            print_energies(run)
    if figure:
        draw_run(run, figure) if is_single else draw_matrix(read_matrix(path), figure)
        print(f"figure  {figure}", file=sys.stderr)
    if page:
        write_page(run, page)
        print(f"page    {page}", file=sys.stderr)


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
    from hftcli.reporting.terminal import print_findings

    is_run_given = recipe or overrides or output or hostfile or num_processes
    place = Place(hostfile)
    resolved = read_recipe(recipe, overrides, output, num_processes, place, needs_rows=False) if is_run_given else None
    is_model_given = recipe is not None or any(given.startswith(("model=", "model.path=")) for given in overrides or ())
    findings = _examine(resolved, is_model_given)
    print_findings(findings, as_json)
    if any(finding.status == "fault" for finding in findings):
        raise typer.Exit(2)


def _examine(recipe: "Recipe | None", is_model_given: bool) -> "list[Finding]":
    """Every check that can be made; one that fails does not keep the others from being made."""
    from hftcli import runners
    from hftcli.doctor.disk import foresee_disk
    from hftcli.doctor.doctor import (
        Finding,
        HostReport,
        check_devices,
        check_hosts,
        check_launcher,
        check_ops,
        check_packages,
        find_existing,
    )
    from hftcli.doctor.memory import check_host, check_memory, give_memory, share_memory
    from hftcli.launching.command import resolve_launch
    from hftcli.launching.hosts import read_hostfile

    findings = check_packages()
    try:
        from hftcli.doctor.machine import probe_machine
        from hftcli.models.description import describe_model

        probe = probe_machine()
    except (ImportError, OSError) as error:
        return [*findings, Finding("torch", "fault", f"does not load: {error}", "install hft and what it needs again")]
    findings += [*check_devices(probe, recipe), check_ops(probe)]
    if recipe is None:
        return findings
    try:
        resolved = resolve_launch(recipe.launch)
    except InputError as error:
        return [*findings, Finding("launch", "fault", error.message, error.fix)]
    findings += (launchers := check_launcher(resolved))
    reports: list[HostReport] = []
    if resolved.hostfile and all(finding.status == "ok" for finding in launchers):
        _, num_processes = resolved.shape
        found, reports = check_hosts(read_hostfile(resolved.hostfile), num_processes, find_existing(recipe.folder))
        findings += found
    if not is_model_given:
        return findings
    try:
        start = runners.resolve_start(recipe.model.place)
        described = describe_model(start.path)
        seen = recipe.model_copy(update={"train": give_memory(recipe.train, resolved, reports)})
        budget = _plan_start(seen, start, described, probe.is_faster_in_bfloat16)
    except InputError as error:
        return [*findings, Finding("model", "fault", error.message, error.fix)]
    try:
        num_rounds = runners.count_rounds(recipe)
    except InputError as error:
        return [*findings, Finding("tasks", "fault", error.message, error.fix)]
    rank_bytes = share_memory(resolved, reports)
    return [
        *findings,
        foresee_disk(recipe, Path(start.path), budget, resolved.num_ranks, num_rounds),
        check_memory(budget, rank_bytes),
        *filter(None, [check_host(budget, resolved, rank_bytes)]),
    ]
