"""What commands print besides the tables of rounds, plans and measures; and how tables are printed."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hftcli.doctor.doctor import Finding
from hftcli.runs.records import DataReport, MergeManifest, Source

NUM_FILES = 10  # of a folder that are named

Samples = Mapping[str, list[tuple[str, bool]]]  # by name, text in pieces, each with whether it is trained


def print_merge(manifest: MergeManifest, output: Path) -> None:
    """What a model was made of, and where it is."""
    console = Console()
    for role, identity in manifest.inputs.items():
        console.print(f"{role:<6} {identity.path}", highlight=False, soft_wrap=True)
    if manifest.plan is not None:
        plan = manifest.plan
        num_reset = plan.num_parameters - plan.num_trainable
        share = f"{num_reset / plan.num_parameters:.1%} of {plan.num_parameters:,} weights"
        console.print(f"reset  {share} are back at the base, plan {plan.short_fingerprint}", highlight=False, soft_wrap=True)
    console.print(f"model  {output}", highlight=False, soft_wrap=True)


def print_findings(findings: Sequence[Finding], as_json: bool) -> None:
    """What the doctor found, a line each, with its fix below."""
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    console = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "green", "warning": "yellow", "fault": "bold red"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        console.print(
            Text.assemble((f"{finding.status:8}", styles[finding.status]), f"{finding.check:{width}}  {finding.message}")
        )
        if finding.fix:
            console.print(Text(f"{'':8}{'':{width}}  fix: {finding.fix}"))


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
    console = Console()
    table = Table(show_header=False)
    for name, value in describe_data(summary).items():
        table.add_row(name, value)
    console.print(table)
    if len(summary.sources) > 1:
        print_sources(summary)
    marks = "trained in green" if console.color_system else "trained between ⟦ ⟧"
    for name, pieces in samples.items():
        console.print(f"first {name}, {marks}:", highlight=False)
        text = Text()
        for part, trained in pieces:
            text.append(part, style="bold green" if trained else "dim")
        console.print(text if console.color_system else "".join(f"⟦{t}⟧" if b else t for t, b in pieces), markup=False)


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
        return source.path
    more = f" and {len(source.files) - NUM_FILES:,} more" if len(source.files) > NUM_FILES else ""
    return f"{source.path}: {', '.join(source.files[:NUM_FILES])}{more}"


def print_sources(summary: DataReport) -> None:
    """What each source of a mixture gives to it."""
    table = make_number_table("source", "format", "rows", "sequences", "share", "tokens", "share", "trained")
    num_drawn = sum(source.num_sequences or 0 for source in summary.sources)
    for source in summary.sources:
        drawn, tokens, trained = source.num_sequences or 0, source.num_tokens or 0, source.num_trained_tokens or 0
        table.add_row(
            source.path, source.format, f"{source.num_rows:,}", f"{drawn:,}", f"{drawn / num_drawn:.1%}", f"{tokens:,}",
            f"{tokens / summary.num_tokens:.1%}", f"{trained / tokens:.1%}",
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
    """Print a table as wide as it is: a number that is cut to the console's width would be another number."""
    console = Console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=sys.maxsize), table).maximum)
    console.print(table)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def format_bytes(count: float) -> str:
    """A size with a unit of 1024: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"
