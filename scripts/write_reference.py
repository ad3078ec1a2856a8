"""Write the tables of the READMEs that the code decides: commands, recipe keys, files of a run, metrics, families.

    python scripts/write_reference.py            rewrites the pages
    python scripts/write_reference.py --check    exits 1 where one is out of date

A table stands between `<!-- name -->` and `<!-- /name -->`, with empty lines around it.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from evidence import make_evidence_tables
from gpu.tables import make_gpu_tables
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hftcli.commands.cli import COMMANDS
from hftcli.comparing.forgetting import ForgettingMetrics
from hftcli.data.formats import FORMATS
from hftcli.freezing.roles import FAMILIES
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.section import open_section
from hftcli.runs.records import RoundResult
from hftcli.tasks import BENCHMARKS
from hftcli.tasks.folder import TaskSheet
from hftcli.tasks.general import FORMS

ROOT = Path(__file__).parent.parent
COLUMNS = ("key", "default", "meaning")
FORMAT_COLUMNS = ("format", "columns", "also taken")


def make_pages() -> dict[str, dict[str, str]]:
    """By page, what stands at its places."""
    return {
        "README.md": {
            "commands": make_table(("command", "does"), ((f"`hft {name}`", summary) for name, (_, summary) in COMMANDS.items()))
        },
        "recipes/README.md": {
            "formats": make_table(FORMAT_COLUMNS, list_formats("sft")),
            "pair-formats": make_table(FORMAT_COLUMNS, list_formats("dpo")),
            "benchmarks": make_table(("benchmark", "tasks", "rows"), list_benchmarks()),
            "methods": make_table(("`method:`", "does"), describe_fields(MethodSection)),
            "families": ", ".join(f"`{name}`" for name in FAMILIES) + ".",
            "sheet": make_table(COLUMNS, describe_keys(TaskSheet)),
            "metrics": make_table(("key", "meaning"), describe_fields(ForgettingMetrics)),
            "keys": "\n\n".join(describe_sections()),
        },
        "scripts/README.md": make_gpu_tables(make_table) | make_evidence_tables(make_table),
        "recipes/RUNS.md": {
            "forms": make_table(("form", "a line"), ((f"`{name}`", f"`{form.shape}`") for name, form in FORMS.items())),
            "result": make_table(("key", "meaning"), describe_fields(RoundResult)),
        },
    }


def list_formats(objective: Objective) -> Iterator[tuple[str, ...]]:
    for name, known in FORMATS.items():
        if known.objective == objective:
            yield tuple(", ".join(f"`{column}`" for column in columns) for columns in ((name,), known.columns, known.optional))


def list_benchmarks() -> Iterator[tuple[str, str, str]]:
    for name, benchmark in BENCHMARKS.items():
        yield f"`{name}`", ", ".join(benchmark.tasks), "`data.root`" if benchmark.source else "ship with hft"


def describe_sections() -> Iterator[str]:
    """A table of the keys outside of all sections; then a heading and a table for each section of a recipe."""
    own = {name: field for name, field in Recipe.model_fields.items() if not open_section(field.annotation)}
    yield make_table(COLUMNS, (describe_key(name, field) for name, field in own.items()))
    for name, field in Recipe.model_fields.items():
        if section := open_section(field.annotation):
            parts = [f"### `{name}`", describe_section(field, section), make_table(COLUMNS, describe_keys(section, f"{name}."))]
            yield "\n\n".join(part for part in parts if part)


def describe_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and documentation of every field, sections opened up."""
    for name, field in section.model_fields.items():
        inner = open_section(field.annotation)
        if inner is None or field.default in (None, ()):  # what may be left out, or holds several, is a key of its own
            yield describe_key(f"{prefix}{name}", field, inner)
        if inner is not None:
            yield from describe_keys(inner, f"{prefix}{name}.")


def describe_key(key: str, field: FieldInfo, section: type[BaseModel] | None = None) -> tuple[str, str, str]:
    default = "required" if field.default is PydanticUndefined else f"`{format_default(field.default)}`"
    return f"`{key}`", default, describe_section(field, section)


def describe_section(field: FieldInfo, section: type[BaseModel] | None) -> str:
    """What a field says of itself, or else the section that it holds."""
    return join_lines(field.description or (section.__doc__ if section else None) or "")


def describe_fields(section: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        yield f"`{name}`", join_lines(field.description)


def format_default(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {(): "[]", "": '""'}.get(value, str(value))


def join_lines(text: str) -> str:
    return " ".join(text.split())


def make_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["|".join(["", *(f" {cell} ".replace("|", r"\|") for cell in line), ""]) for line in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def fill_page(page: str, text: str, tables: dict[str, str]) -> str:
    """The page's text with what belongs at its places."""
    for name, table in tables.items():
        first, last = f"<!-- {name} -->\n\n", f"\n\n<!-- /{name} -->"
        if text.count(first) != 1 or text.partition(first)[2].count(last) != 1:
            sys.exit(f"{page} must have <!-- {name} --> and <!-- /{name} --> once each, with empty lines between them")
        head, _, rest = text.partition(first)
        text = f"{head}{first}{table}{last}{rest.partition(last)[2]}"
    return text


def main() -> None:
    for page, tables in make_pages().items():
        text = (ROOT / page).read_text(encoding="utf-8")
        fresh = fill_page(page, text, tables)
        if "--check" not in sys.argv:
            (ROOT / page).write_text(fresh, encoding="utf-8")
        elif fresh != text:
            sys.exit(f"{page} is out of date: python scripts/write_reference.py")


if __name__ == "__main__":
    main()
