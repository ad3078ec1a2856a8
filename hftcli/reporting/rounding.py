"""What the files of a run's rounds do not hold of their updates, in words."""

from collections.abc import Iterable, Iterator

from hftcli.runs.masters import STATES, MastersReport
from hftcli.runs.records import RoundResult

MUCH_DROPPED = 0.01  # of the norm of an update: less is not worth a line
NUM_NAMED = 3  # tensors of which most was dropped


def describe_masters(report: MastersReport) -> Iterator[str]:
    """Lines for the terminal: where a round began, where that is not plain, and what rounding dropped, where it is much."""
    if report.start != "none":
        yield f"start: {STATES[report.start]}"
    if report.dropped_fraction >= MUCH_DROPPED:
        kept = "; the float32 masters beside it keep all" if report.seal else ""
        yield (
            f"rounding: the checkpoint's data type drops {report.dropped_fraction:.1%} of the norm of the update, half or more "
            f"in {count_half(report)} tensors (most: {name_worst(report)}){kept}"
        )


def list_roundings(results: Iterable[tuple[str, RoundResult]]) -> list[tuple[str, ...]]:
    """Rows of a table: of each round whose file drops something, its name, where it began, and how much in which tensors."""
    return [
        (name, STATES[report.start], f"{report.dropped_fraction:.1%}", f"{count_half(report)}", name_worst(report))
        for name, report in ((name, result.masters) for name, result in results)
        if report is not None and report.dropped_norm
    ]


def count_half(report: MastersReport) -> int:
    """Tensors of whose update half or more was dropped."""
    return sum(share >= 0.5 for share in report.dropped.values())


def name_worst(report: MastersReport) -> str:
    """The tensors of whose update most was dropped, with the shares."""
    worst = sorted(report.dropped.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in worst[:NUM_NAMED])
