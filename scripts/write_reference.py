"""Write the README's tables of recipe keys and run files from the docstrings in the code.

python scripts/write_reference.py            rewrites README.md
python scripts/write_reference.py --check    exits 1 where it is out of date
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import open_section
from hftcli.runs.records import RoundResult

README = Path(__file__).parent.parent / "README.md"


def describe_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and documentation of every field, sections opened up."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if section := open_section(field.annotation):
            yield from describe_keys(section, f"{key}.")
        else:
            default = "required" if field.default is PydanticUndefined else f"`{format_default(field.default)}`"
            yield key, default, " ".join((field.description or "").split())


def format_default(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[]" if value == () else str(value)


def make_tables() -> dict[str, str]:
    keys = "\n".join(f"| `{key}` | {default} | {text} |" for key, default, text in describe_keys(Recipe))
    fields = "\n".join(
        f"| `{name}` | {' '.join(field.description.split())} |" for name, field in RoundResult.model_fields.items()
    )
    return {
        "keys": f"| key | default | meaning |\n|---|---|---|\n{keys}",
        "result": f"| key of `result.json` | meaning |\n|---|---|\n{fields}",
    }


def main() -> None:
    text = fresh = README.read_text(encoding="utf-8")
    for name, table in make_tables().items():
        pattern = re.compile(f"(<!-- {name} -->\n\n).*?(\n\n<!-- /{name} -->)", re.DOTALL)
        fresh, count = pattern.subn(lambda match, table=table: match[1] + table + match[2], fresh)
        if count != 1:
            sys.exit(f"README.md must have the place <!-- {name} --> once, with empty lines around the table; it has {count}")
    if "--check" in sys.argv:
        sys.exit(0 if fresh == text else "README.md is out of date: python scripts/write_reference.py")
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
