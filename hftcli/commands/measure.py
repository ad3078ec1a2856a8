"""The commands that measure: `hft eval`, `hft compare`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hftcli.commands.options import (
    ChatOption,
    CodeOption,
    CutOption,
    Dtype,
    GenerateOption,
    JsonOption,
    ProcessesOption,
    RecipeOption,
    SetOption,
    ShotsOption,
    StrictOption,
    check_files,
    check_place,
    naming_options,
)
from hftcli.errors import InputError

if TYPE_CHECKING:
    from hftcli.comparing.comparison import Comparison
    from hftcli.comparing.grid import Planned

app = typer.Typer()
NUM_SEEDS = 3  # of a comparison
# What changes nothing of how tasks are asked.
IDLE = {"chat": None, "shots": 0, "max_new_tokens": None, "generate": True, "strict": False, "allow_code": False}


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option("--model", help="A folder with a config.json, a run, or a hub id.")],
    tasks: Annotated[
        str,
        typer.Option("--tasks", help="With commas between: tinyworld/facts, trace/FOMC, a folder, FILE.jsonl, harness:NAME."),
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
    num_processes: ProcessesOption = None,
    chat: ChatOption = None,
    shots: ShotsOption = 0,
    max_new_tokens: CutOption = None,
    generate: GenerateOption = True,
    allow_code: CodeOption = False,
    strict: StrictOption = False,
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
    from hftcli.launching.command import resolve_launch
    from hftcli.measuring.evaluation import write_evaluation
    from hftcli.recipe.asking import AskingSection
    from hftcli.recipe.sections import LaunchSection
    from hftcli.reporting.measures import print_evaluation
    from hftcli.reporting.progress import show_counts
    from hftcli.runners import resolve_subject
    from hftcli.runs.versions import list_versions

    subject, names = resolve_subject(model), tuple(name.strip() for name in tasks.split(",") if name.strip())
    base = resolve_subject(base).path if base else subject.base
    asking: dict[str, Any] = {"chat": chat, "shots": shots, "max_new_tokens": max_new_tokens, "generate": generate}
    asking |= {"strict": strict, "allow_code": allow_code}
    check_asked(base, names, bool(text or prompts), asking, max_length, output)
    num_ranks = resolve_launch(LaunchSection(num_processes=num_processes)).num_ranks
    from hftcli.measuring.scoring import Examination, examine_model

    examination = Examination(
        model=subject.path, tasks=names, base=base, root=root or subject.root, max_examples=max_examples,
        max_length=max_length or subject.max_length, text=text, prompts=prompts, dtype=dtype, asking=AskingSection(**asking),
    )  # fmt: skip
    with naming_options(), show_counts() as on_progress:
        evaluation, items = examine_model(examination, list_versions(), on_progress, num_ranks)
    print_evaluation(evaluation, as_json)
    if output:
        print(f"items  {write_evaluation(output, evaluation, items)}", file=sys.stderr)


def check_asked(
    base: str | None, tasks: tuple[str, ...], has_texts: bool, asking: dict[str, Any], max_length: int | None,
    output: Path | None,
) -> None:  # fmt: skip
    """What `hft eval` is asked for.

    Args:
        asking: how questions are to be asked, as `AskingSection` has it.

    Raises:
        InputError: there is nothing to measure or to ask, nothing to measure it against, or no place to write it to.
    """
    from hftcli.measuring.evaluation import PREFIX, check_output

    if output:
        check_output(output)
        check_files(output=output)
    if base is None and has_texts:
        raise InputError("--text and --prompts compare a model with its base", "give --base")
    if base is None and not tasks:
        raise InputError("there is nothing to measure", "give --tasks, or --base")
    given = {f"--{'no-' * (value is False)}{key.replace('_', '-')}" for key, value in asking.items() if value != IDLE[key]}
    if given and not tasks:
        raise InputError(f"{min(given)} says how tasks are asked, and none is", "name some with --tasks, or drop it")
    if given >= {"--no-generate", "--max-new-tokens"}:
        raise InputError("--max-new-tokens cuts what is written, and --no-generate writes nothing", "drop one of the two")
    if max_length is not None and base is None and all(name.startswith(PREFIX) for name in tasks):
        raise InputError(f"--max-length has no effect on {tasks[0]}: lm-evaluation-harness asks it in its own way", "drop it")


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of finished runs.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    vary: Annotated[
        list[str] | None, typer.Option("--vary", metavar="KEY=V1,V2,...", help="Run the recipe with each of these values.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Run each setting with so many seeds.", show_default=str(NUM_SEEDS))
    ] = None,
    tune_seeds: Annotated[
        int, typer.Option("--tune-seeds", min=0, help="Choose each method's settings on so many seeds, and report others.")
    ] = 0,
    tune_tasks: Annotated[
        str, typer.Option("--tune-tasks", metavar="TASK,...", help="Choose them on other tasks, which are learned instead.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the runs of --recipe, their figure and their page.")
    ] = None,
    learned: Annotated[
        list[str] | None, typer.Option("--learned", metavar="TASK", help="A task that measures what was learned.")
    ] = None,
    by: Annotated[
        Literal["score", "nll"], typer.Option("--by", help="Gains and losses of scores, or of the likelihood of right answers.")
    ] = "score",
    figure: Annotated[Path | None, typer.Option("--figure", help="Draw learning against forgetting: .svg or .png.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write the comparison as a page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Learning against forgetting: methods at equal learning, over learning rates and seeds.

    Takes finished runs, or a recipe with what to vary: then runs what is missing, and goes on where it stopped. With
    --tune-seeds, the settings under `train` and `method` are chosen for each method on the first seeds, and only what was
    chosen runs and is reported on the others (the protocol of arXiv 2403.09066).
    """
    from hftcli.comparing.comparison import compare_runs
    from hftcli.reporting.figures import check_figure_path
    from hftcli.reporting.measures import print_comparison

    check_files(figure=figure, html=page)
    if recipe is None and (vary or overrides or output or tune_seeds or seeds):
        raise InputError(
            "hft compare takes --vary, --set, --seeds, --tune-seeds and --output with --recipe only",
            "name a recipe, or only runs",
        )
    others = [name.strip() for name in tune_tasks.split(",") if name.strip()]
    if others and not tune_seeds:
        raise InputError("--tune-tasks says where settings are chosen, and none are", "give --tune-seeds")
    if figure:
        check_figure_path(figure)
    folders, tuning = list(runs or ()), ""
    if recipe is not None:
        output = output or Path("runs") / f"compare-{Path(recipe).stem}"
        plan = Plan(recipe, overrides or [], vary or [], seeds or NUM_SEEDS, tune_seeds, others, output)
        found, tuning = run_plan(plan, learned or [], by)
        folders += found
        figure, page = figure or output / "frontier.svg", page or output / "comparison.html"
    comparison = compare_runs(folders, learned or (), by, merges_settings=tune_seeds > 0)
    print_comparison(comparison, as_json, tuning)
    _show_pictures(comparison, tuning, figure, page)


def _show_pictures(comparison: "Comparison", tuning: str, figure: Path | None, page: Path | None) -> None:
    from hftcli.reporting.figures import draw_frontier
    from hftcli.reporting.versus import write_comparison

    if figure:
        draw_frontier(comparison, figure)
        print(f"figure  {figure}", file=sys.stderr)
    if page:
        write_comparison(comparison, tuning, page)
        print(f"page    {page}", file=sys.stderr)


@dataclass(frozen=True)
class Plan:
    """What `hft compare` runs.

    Attributes:
        tune_seeds: how many seeds choose the settings; with 0 none are chosen.
        tune_tasks: what is learned where they are chosen; with none, the recipe's own.
    """

    recipe: Path | str
    overrides: list[str]
    vary: list[str]
    seeds: int
    tune_seeds: int
    tune_tasks: list[str]
    output: Path


def run_plan(plan: Plan, learned: list[str], by: Literal["score", "nll"]) -> tuple[list[Path], str]:
    """Run what is missing, the grid on which settings are chosen first.

    Returns:
        The folders of the runs to report, and how their settings were chosen.
    """
    from hftcli.comparing.comparison import compare_runs
    from hftcli.comparing.grid import aim_at, choose_settings, make_grid
    from hftcli.reporting.measures import describe_choice

    first = plan.tune_seeds + 1
    grid = make_grid(plan.recipe, plan.overrides, plan.vary, range(first, first + plan.seeds), plan.output)
    if not plan.tune_seeds:
        return run_grid(grid), ""
    overrides = aim_at(plan.recipe, plan.overrides, plan.tune_tasks) if plan.tune_tasks else plan.overrides
    tried = make_grid(plan.recipe, overrides, plan.vary, range(1, first), plan.output / "tune")
    comparison = compare_runs(run_grid(tried), learned, by, merges_settings=True)
    chosen = choose_settings(tried, comparison)
    return run_grid([planned for planned in grid if planned.settings in chosen]), describe_choice(comparison, plan.tune_seeds)


def run_grid(grid: "list[Planned]") -> list[Path]:
    """Run what is missing of a grid, and give the folders of all of it."""
    from hftcli import runners
    from hftcli.reporting.progress import show_progress
    from hftcli.reporting.trackers import report_to_trackers

    folders = []
    with show_progress() as on_progress:
        for index, planned in enumerate(grid, start=1):
            print(f"run {index} of {len(grid)}: {planned.recipe.output}", file=sys.stderr)
            run = runners.run_recipe(check_place(planned.recipe), on_progress)
            report_to_trackers(run)
            folders.append(run.folder)
    return folders
