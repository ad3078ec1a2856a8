"""Several runs beside one another: a line for each, on the terminal, as a page that leads to theirs, and as JSON."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.text import Text

from hftcli.recipe.loading import load_recipe
from hftcli.reporting.headline import OBJECTIVES, make_headline
from hftcli.reporting.lines import say
from hftcli.reporting.places import show_place
from hftcli.reporting.share import describe_share
from hftcli.reporting.terminal import make_number_table, print_json, print_whole
from hftcli.runs.files import write_text
from hftcli.runs.run import Run, find_rounds

TEMPLATE = "index.html.jinja"


@dataclass(frozen=True)
class Line:
    """A run in a line.

    Attributes:
        page: where its page is; empty where it has none.
        verified: whether every finished round left what was frozen as it was, and moved what it trained.
    """

    name: str
    objective: str
    share: str
    learning_rate: str
    learned: str
    forgot: str
    page: str
    verified: bool


def list_lines(folders: Sequence[Path], beside: Path | None = None) -> list[Line]:
    """Args: beside: the file that leads to the pages, from which their places are told.

    Raises:
        InputError: one is no run, or none of its rounds is finished.
    """
    lines = []
    for folder in folders:
        run, rounds = Run(folder), find_rounds(folder)
        recipe, headline = load_recipe(run.recipe_path, is_written=True), make_headline(run)
        page = ""
        if run.page_path.exists():
            page = os.path.relpath(run.page_path.resolve(), beside.resolve().parent) if beside else show_place(run.page_path)
        lines.append(
            Line(
                name=show_place(folder), objective=OBJECTIVES[recipe.objective],
                share=describe_share(rounds[-1].read_plan(), rounds[-1].read_result()),
                learning_rate=f"{recipe.train.learning_rate:g}",
                learned=headline.learned, forgot=headline.forgot, page=page, verified=not run.unverified,
            )
        )  # fmt: skip
    return lines


def print_index(lines: Sequence[Line], as_json: bool) -> None:
    """A row per run, and below it what it learned and forgot."""
    if as_json:
        print_json([asdict(line) for line in lines])
        return
    table = make_number_table("run", "objective", "trained", "learning rate")
    for line in lines:
        table.add_row(Text(line.name), Text(line.objective), line.share, line.learning_rate)
    print_whole(table)
    for line in lines:
        warning = "" if line.verified else f"\n  NOT VERIFIED: see hft verify {line.name}"
        say(f"{line.name}{warning}\n  learned  {line.learned}\n  forgot   {line.forgot}")


def write_index(lines: Sequence[Line], path: Path) -> None:
    """The page of several runs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, environment.get_template(TEMPLATE).render(rows=lines))
