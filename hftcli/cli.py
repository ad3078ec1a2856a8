"""The commands: parse, call one runner, print. Results go to stdout; logs and progress to stderr.

Nothing heavy is imported before the command that needs it runs: `hft --help` stays instant, and torch is loaded only where a
command opens a model or its data in this process.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hftcli import __version__
from hftcli.errors import HftError, InputError

if TYPE_CHECKING:
    from hftcli.recipe import Objective, Recipe

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
ProcessesOption = Annotated[int | None, typer.Option("--num-processes", help="Processes on this machine.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Prepare and check, print the launch command, stop.")]
Dtype = Literal["float32", "bfloat16", "float16"]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """The `hft` command; an HftError becomes its message, its fix and its exit code."""
    show_traceback = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    try:
        app()
    except HftError as error:
        if show_traceback:
            raise
        print(f"hft: {error.message}", file=sys.stderr)
        if error.fix:
            print(f"     fix: {error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def sft(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Supervised fine-tuning; with no recipe, the built-in quick start."""
    _run_single(_load_recipe(recipe, overrides, output, num_processes, "sft"), dry_run)


@app.command()
def dpo(
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    num_processes: ProcessesOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Direct preference optimization; with no recipe, the built-in quick start."""
    _run_single(_load_recipe(recipe, overrides, output, num_processes, "dpo"), dry_run)


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
    dry_run: DryRunOption = False,
) -> None:
    """Task after task, with the whole forgetting matrix; with no recipe, the built-in quick start."""
    from hftcli import report, runners
    from hftcli.tasks.check import format_report

    given = [f"continual.tasks={json.dumps(tasks)}"] if tasks else []
    given += [f"continual.order={json.dumps(order)}"] if order else []
    resolved = _load_recipe(
        recipe or _find_task_recipe(tasks), [*given, *(overrides or ())], output, num_processes, "continual"
    )
    run = runners.prepare_continual(resolved)
    print(format_report(run.read_manifest().sequence))
    if dry_run:
        for round_ in run.rounds:
            print(runners.describe_launch(round_))
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
    as_json: JsonOption = False,
) -> None:
    """What trains, what is frozen, and the memory per device, beside full fine-tuning."""
    from hftcli import report, runners
    from hftcli.models import describe_model

    if model is not None:
        # What the quick start sets for its tiny model does not suit another one.
        plain = ["train.bf16=true", "launch.num_processes=null"] if recipe is None else []
        overrides = [f"model.path={json.dumps(model)}", *plain, *(overrides or ())]
    resolved = _load_recipe(recipe, overrides, None, num_processes)
    start = runners.resolve_start(resolved.model.path)
    described = describe_model(start.path)
    report.print_plan(runners.make_budget(resolved, start, described.model_type, described.parameters), as_json)


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

    FILE.jsonl holds {"question", "choices", "answer": index} or {"question", "answers"} on each line. Beside a base, the change
    of cross-entropy and KL(base || model) are measured on --text, or on samples of the base, and on --prompts.
    """
    from hftcli.evaluation import check_output, write_evaluation
    from hftcli.report import print_evaluation, show_counts
    from hftcli.runners import find_versions, resolve_subject

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
        evaluation, items = examine_model(examination, find_versions(), on_progress)
    print_evaluation(evaluation, as_json)
    if output:
        print(f"items  {write_evaluation(output, evaluation, items)}", file=sys.stderr)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A continual run's folder, or a matrix file.")],
    as_json: JsonOption = False,
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw the matrix into this .svg or .png file.")] = None,
) -> None:
    """The forgetting matrix and its metrics: what was learned, and what became of it.

    A matrix file is {"tasks": [...], "scores": [[...], ...]}: row 0 the base model, values in [0, 1] or null.
    """
    from hftcli.figures import check_figure_path, draw_matrix
    from hftcli.forgetting import read_matrix
    from hftcli.report import print_matrix

    matrix = read_matrix(path)
    if figure:
        check_figure_path(figure)
    print_matrix(matrix, as_json)
    if figure:
        draw_matrix(matrix, figure)
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


def _run_single(recipe: "Recipe", dry_run: bool) -> None:
    from hftcli import report, runners

    if dry_run:
        print(runners.describe_launch(runners.prepare_single(recipe)[1]))
        return
    with report.show_progress() as on_progress:
        run = runners.run_single(recipe, on_progress)
    report.print_run(run)
