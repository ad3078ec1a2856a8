"""The commands that measure: `hft eval`, `hft compare`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hftcli.commands.options import (
    ChatOption,
    CodeOption,
    CutOption,
    Dtype,
    JsonOption,
    RecipeOption,
    SetOption,
    ShotsOption,
    StrictOption,
    check_place,
)
from hftcli.errors import InputError

app = typer.Typer()


@app.command("eval")
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
    chat: ChatOption = None,
    shots: ShotsOption = 0,
    max_new_tokens: CutOption = None,
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
    from hftcli.measuring.evaluation import check_output, write_evaluation
    from hftcli.recipe.asking import AskingSection
    from hftcli.reporting.measures import print_evaluation
    from hftcli.reporting.progress import show_counts
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
    from hftcli.measuring.scoring import Examination, examine_model

    asking = AskingSection(chat=chat, shots=shots, max_new_tokens=max_new_tokens, strict=strict, allow_code=allow_code)
    examination = Examination(
        model=subject.path, tasks=names, base=base, root=root or subject.root, max_examples=max_examples,
        max_length=max_length or subject.max_length, text=text, prompts=prompts, dtype=dtype, asking=asking,
    )  # fmt: skip
    with show_counts() as on_progress:
        evaluation, items = examine_model(examination, list_versions(), on_progress)
    print_evaluation(evaluation, as_json)
    if output:
        print(f"items  {write_evaluation(output, evaluation, items)}", file=sys.stderr)


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
    from hftcli import runners
    from hftcli.comparing.comparison import compare_runs
    from hftcli.comparing.grid import make_grid
    from hftcli.reporting.figures import check_figure_path, draw_frontier
    from hftcli.reporting.measures import print_comparison
    from hftcli.reporting.progress import show_progress

    if recipe is None and (vary or overrides or output):
        raise InputError("hft compare takes --vary, --set and --output with --recipe only", "name a recipe, or only runs")
    if figure:
        check_figure_path(figure)
    folders = list(runs or ())
    if recipe is not None:
        output = output or Path("runs") / f"compare-{Path(recipe).stem}"
        grid = make_grid(recipe, overrides or (), vary or (), seeds, output)
        with show_progress() as on_progress:
            for index, resolved in enumerate(grid, start=1):
                print(f"run {index} of {len(grid)}: {resolved.output}", file=sys.stderr)
                folders.append(runners.run_recipe(check_place(resolved), on_progress).folder)
        figure = figure or output / "frontier.svg"
    comparison = compare_runs(folders, learned or (), by)
    if figure:
        draw_frontier(comparison, figure)
    print_comparison(comparison, as_json)
    if figure:
        print(f"figure  {figure}", file=sys.stderr)
