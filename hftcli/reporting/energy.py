"""Rounds that trained in parts of matrices, in words: what was earlier, and how much of its energy lies in what was closed."""

from collections.abc import Iterable

from rich.table import Table

from hftcli.reporting.terminal import print_whole
from hftcli.runs.earlier import EarlierInputs
from hftcli.runs.records import RoundResult
from hftcli.runs.run import Run

COLUMNS = ("round", "earlier sources", "energy in what was closed", "least", "change there")


def describe_earlier(earlier: EarlierInputs) -> str:
    """A line for the terminal."""
    least, share = find_least(earlier)
    return (
        f"earlier inputs: {average_closed(earlier):.1%} of the energy of {len(earlier.sources)} earlier "
        f"{'source lies' if len(earlier.sources) == 1 else 'sources lies'} in what was closed, least in {least} ({share:.1%})"
    )


def average_closed(earlier: EarlierInputs) -> float:
    """The share of energy in what is closed, each input counting the same."""
    return sum(earlier.closed_energy.values()) / len(earlier.closed_energy)


def find_least(earlier: EarlierInputs) -> tuple[str, float]:
    """The input of whose energy least is closed, and its share."""
    return min(earlier.closed_energy.items(), key=lambda item: item[1])


def list_energies(results: Iterable[tuple[str, RoundResult]]) -> list[tuple[str, ...]]:
    """Rows of a table, by `COLUMNS`: of each round that trained in directions or columns."""
    rows: list[tuple[str, ...]] = []
    for name, result in results:
        if result.earlier is None:
            continue
        least, share = find_least(result.earlier)
        change = max(result.verification.closed_change.values(), default=0.0)
        rows.append(
            (
                name,
                f"{len(result.earlier.sources)}",
                f"{average_closed(result.earlier):.1%}",
                f"{share:.1%}, {least}",
                f"{change:.0e}",
            )
        )
    return rows


def print_energies(run: Run) -> None:
    """The table, where a round of the run trained so."""
    rows = list_energies((round_.name, round_.read_result()) for round_ in run.rounds if round_.is_done)
    if not rows:
        return
    table = Table(*COLUMNS, title="how the input space fills", title_justify="left")
    for row in rows:
        table.add_row(*row)
    print_whole(table)
