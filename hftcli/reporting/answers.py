"""What a model said before and after, on the terminal and on the page."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from hftcli.comparing.answers import Answers, ChangedItem, Trait, describe_behaviour, list_changed, read_answers
from hftcli.comparing.statistics import NATS, POINTS
from hftcli.reporting.lines import open_console
from hftcli.reporting.terminal import make_number_table, print_measures, print_whole
from hftcli.runs.run import Run
from hftcli.tasks.general import SUFFIX

QUESTION, ANSWER = 600, 300  # characters that are shown; of a question its end
NUM_SHOWN = 10  # lost and won questions of a task on the page
BEHAVIOUR_TITLE = (
    "how the written answers look: length in characters, the others in points of all answers; change with its 95 % interval;\n"
    "refusals by their English openings; form kept: as the right answers have it; repeated text: runs of four words said again"
)


def print_lost(run: Run, as_json: bool) -> None:
    """Every question whose score fell, then those whose score rose, the most surprising first."""
    changed = list_changed(read_answers(run))
    lost, won = ([item for item in changed if item.is_lost is is_lost] for is_lost in (True, False))
    if as_json:
        print_measures({"lost": [asdict(item) for item in lost], "won": [asdict(item) for item in won]})
        return
    console = open_console()

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    for name, items in (("lost", lost), ("won", won)):
        say(f"{len(items)} questions {name}, those first whose right answer became most {'un' * (name == 'lost')}likely")
        for item in items:
            say(f"\n{describe_place(item)}\n{shorten_end(item.question)}")
            for heading, text in describe_item(item):
                say(f"  {heading:7} {text}")
        say("")


def describe_place(item: ChangedItem) -> str:
    """Which question it is, and how its score and its right answer's likelihood changed."""
    scores = " to ".join(POINTS.show(score) for score in item.scores)
    nats = "" if item.nats is None else f", right answer {NATS.show(item.nats, signed=True)} nats"
    return f"{shorten_name(item.task)}, question {item.index + 1}: {scores} points{nats}"


def describe_item(item: ChangedItem) -> list[tuple[str, str]]:
    """The right answers, and what was answered before and after, each on one line."""
    return [
        ("right", shorten(" | ".join(item.answers))),
        ("before", shorten(item.before)),
        ("after", shorten(item.after)),
    ]


def shorten_name(task: str) -> str:
    """A task's name, of a file without its folder."""
    return Path(task).name if task.endswith(SUFFIX) else task


def shorten(text: str | None) -> str:
    """The beginning of an answer on one line."""
    if text is None:
        return "(judged by likelihood)"
    line = text.strip().replace("\n", "\\n")
    return line if len(line) <= ANSWER else f"{line[:ANSWER]} ..."


def shorten_end(text: str) -> str:
    """The end of a question, where it asks."""
    if not text:
        return "(an earlier hft kept no text of the question)"
    return text if len(text) <= QUESTION else f"... {text[-QUESTION:]}"


@dataclass(frozen=True)
class Shown:
    """A changed question on the page."""

    place: str
    question: str
    lines: list[tuple[str, str]]


def list_shown(answers: Answers) -> list[tuple[str, str, list[Shown]]]:
    """By task, its most surprising lost and won questions, each with a heading."""
    sections = []
    for task, pairs in answers.items():
        changed = list_changed({task: pairs})
        for name, items in (
            ("lost", [item for item in changed if item.is_lost]),
            ("won", [i for i in changed if not i.is_lost]),
        ):
            shown = [Shown(describe_place(item), shorten_end(item.question), describe_item(item)) for item in items[:NUM_SHOWN]]
            if shown:
                sections.append((shorten_name(task), f"{len(items)} {name}", shown))
    return sections


def describe_traits(answers: Answers) -> list[tuple[str, ...]]:
    """Rows of a table: task, trait, before, after, change with its interval."""
    return [
        (shorten_name(task), trait.name, *_show_trait(trait))
        for task, pairs in answers.items()
        for trait in describe_behaviour(*pairs)
    ]


def _show_trait(trait: Trait) -> tuple[str, str, str]:
    def show(value: float, signed: bool = False) -> str:
        return POINTS.show(value, signed=signed) if trait.unit == "share" else f"{value:{'+' if signed else ''}.0f}"

    change = show(trait.change.mean, signed=True)
    if trait.change.low is not None and trait.change.high is not None:
        change += f" ({show(trait.change.low, signed=True)} to {show(trait.change.high, signed=True)})"
    return show(trait.before), show(trait.after), change


def print_behaviour(rows: Sequence[tuple[str, ...]]) -> None:
    """How the written answers look; nothing where none are."""
    if rows:
        table: Table = make_number_table("task", "answers", "before", "after", "change")
        table.title, table.title_justify = BEHAVIOUR_TITLE, "left"
        for row in rows:
            table.add_row(*map(Text, row))
        print_whole(table)
