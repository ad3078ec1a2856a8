"""What commands print besides the tables of rounds, plans and measures; and how tables are printed."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hftcli.doctor.doctor import Finding
from hftcli.reporting.lines import fold, open_console, say
from hftcli.reporting.places import show_place, show_places
from hftcli.runs.made import MergeManifest
from hftcli.runs.records import DataReport, Source

JSON_UNITS = {"score": "a share, 0 to 1; tables show it in points, times 100", "nll": "nats per token"}
NUM_FILES = 10  # of a folder that are named

Samples = Mapping[str, list[tuple[str, bool]]]  # by name, text in pieces, each with whether it is trained


def print_merge(manifest: MergeManifest, output: Path) -> None:
    """What a model was made of, and where it is."""
    for role, identity in manifest.inputs.items():
        say(f"{role:<6} {show_place(identity.path)}")
    if manifest.num_kept is not None and manifest.num_weights:
        share = f"{manifest.num_kept / manifest.num_weights:.2%} of {manifest.num_weights:,} weights"
        say(f"kept   {share} differ from the base, the largest changes")
    if manifest.plan is not None:
        plan = manifest.plan
        num_reset = plan.num_parameters - plan.num_trainable
        share = f"{num_reset / plan.num_parameters:.1%} of {plan.num_parameters:,} weights"
        say(f"reset  {share} are back at the base, plan {plan.short_fingerprint}")
        if manifest.num_moved is not None:
            say(f"moved  {manifest.num_moved} of the {len(plan.frozen)} parameters that went back had moved")
    say(f"model  {show_place(output)}")


def print_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """What the doctor found, a line each, with its fix below."""
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        text = fold(f"{finding.status:8}{finding.check:{width}}  {finding.message}", sys.stdout)
        shown = Text.assemble((text[:8], styles[finding.status]), show_places(text[8:]))
        open_console(highlight=False, soft_wrap=True).print(shown)
        if finding.fix:
            say(f"{'':8}{'':{width}}  fix: {finding.fix}")


def print_task_data(found: Mapping[str, tuple[DataReport, Samples]], as_json: bool) -> None:
    """What `print_data` shows, of each task."""
    if as_json:
        print_json({name: _describe_data(*parts) for name, parts in found.items()})
        return
    for name, (summary, samples) in found.items():
        print(name)
        print_data(summary, samples, as_json)


def _describe_data(summary: DataReport, samples: Samples) -> dict[str, Any]:
    shown = {name: [{"text": t, "trained": b} for t, b in pieces] for name, pieces in samples.items()}
    return {**summary.model_dump(mode="json"), **shown}


def print_data(summary: DataReport, samples: Samples, as_json: bool) -> None:
    """Counts, lengths, and one sequence, or one pair's two, with the trained tokens in colour."""
    if as_json:
        print_json(_describe_data(summary, samples))
        return
    console = open_console()
    table = Table(show_header=False)
    for name, value in describe_data(summary).items():
        table.add_row(name, value)
    console.print(table)
    if len(summary.sources) > 1:
        print_sources(summary)
    marks = "trained in green" if console.color_system else "trained between ⟦ ⟧"
    for name, pieces in samples.items():
        say(f"first {name}, {marks}:")
        text = Text()
        for part, trained in pieces:
            text.append(part, style="bold green" if trained else "dim")
        console.print(text if console.color_system else "".join(f"⟦{t}⟧" if b else t for t, b in pieces))


def describe_data(summary: DataReport) -> dict[str, str]:
    """Counts and lengths, and what is worth a second look where there is something."""
    share = summary.num_trained_tokens / summary.num_tokens
    rows = f"{summary.num_rows:,}; used {summary.num_used:,}, dropped {summary.num_dropped:,}, cut {summary.num_truncated:,}"
    rows += f", made the same by the cut {summary.num_identical:,}" if summary.num_identical else ""
    special = ", ".join(f"{token} in {count:,}" for token, count in summary.special_tokens.items())
    notes = {
        "bad rows": f"{summary.num_bad:,}, left out; the first: {summary.bad_rows[0]}" if summary.num_bad else "",
        "not used": ", ".join(summary.unused_columns),
        "stood twice": ", ".join(f"{name} in {count:,} rows" for name, count in summary.doubled.items()),
        "special tokens": special and f"in the text of {summary.num_special:,} rows: {special} (data.special_tokens_in_text)",
    }
    return {
        "read": "\n".join(map(describe_source, summary.sources)),
        "format": summary.format,
        "rows": rows,
        **{name: note for name, note in notes.items() if note},
        "sequences": f"{summary.num_sequences:,}",
        "tokens": f"{summary.num_tokens:,}; trained {summary.num_trained_tokens:,} ({share:.1%})",
        "row lengths": ", ".join(f"{name} {value:,}" for name, value in summary.length_percentiles.items()),
        "cache key": summary.key[:12],
    }


def describe_source(source: Source) -> str:
    """Where rows came from; of a folder, which of its files."""
    if not source.files:
        return show_place(source.path)
    more = f" and {len(source.files) - NUM_FILES:,} more" if len(source.files) > NUM_FILES else ""
    return f"{show_place(source.path)}: {', '.join(source.files[:NUM_FILES])}{more}"


def print_sources(summary: DataReport) -> None:
    """What each source of a mixture gives to it."""
    table = make_number_table("source", "format", "rows", "sequences", "share", "tokens", "share", "trained")
    num_drawn = sum(source.num_sequences or 0 for source in summary.sources)
    for source in summary.sources:
        drawn, tokens, trained = source.num_sequences or 0, source.num_tokens or 0, source.num_trained_tokens or 0
        table.add_row(
            show_place(source.path), source.format, f"{source.num_rows:,}", f"{drawn:,}", f"{drawn / num_drawn:.1%}",
            f"{tokens:,}", f"{tokens / summary.num_tokens:.1%}", f"{trained / tokens:.1%}",
        )  # fmt: skip
    print_whole(table)


def make_number_table(first: str, *headings: object) -> Table:
    """A table whose first column names the row, and whose others are numbers, on the right."""
    table = Table()
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(str(heading), justify="right", no_wrap=True)
    return table


def print_whole(table: Table) -> None:
    """Print a table as wide as it is: a number that is cut to the console's width would be another number.

    On a terminal that is too narrow, its columns come in several tables, each with the first of them.
    """
    console = open_console()
    needed = Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum
    if not console.is_terminal or needed <= console.width:
        console.width = max(console.width, needed)
        console.print(table)
        return
    if table.title:
        say(str(table.title))
    for part in divide_table(table, console.width):
        console.print(part)


def divide_table(table: Table, width: int) -> list[Table]:
    """A table's columns in as many tables as the width asks for, each begun with the first column."""
    cells = [[cell if isinstance(cell, Text) else Text(str(cell)) for cell in column.cells] for column in table.columns]
    widths = [
        3 + max(text.cell_len for text in (Text(str(column.header)), *texts))
        for column, texts in zip(table.columns, cells, strict=True)
    ]
    groups: list[list[int]] = [[]]
    for place in range(1, len(widths)):
        taken = 1 + widths[0] + sum(widths[held] for held in groups[-1])
        if groups[-1] and taken + widths[place] > width:
            groups.append([])
        groups[-1].append(place)
    parts = []
    for group in groups:
        part = Table()
        for place in (0, *group):
            column = table.columns[place]
            part.add_column(column.header, justify=column.justify, style=column.style, no_wrap=place > 0, overflow="fold")
        for row in zip(*(cells[place] for place in (0, *group)), strict=True):
            part.add_row(*row)
        parts.append(part)
    return parts


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_measures(value: Mapping[str, Any]) -> None:
    """Print scores and likelihoods for other programs, and in which units they are: tables show points, JSON has shares."""
    print_json({**value, "units": JSON_UNITS})


def format_bytes(count: float) -> str:
    """A size with a unit of 1024: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
