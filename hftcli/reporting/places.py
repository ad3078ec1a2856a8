"""How places on the disk are shown: to their owner from where they stand, to others by their names alone."""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hftcli import PACKAGE
from hftcli.recipe.sections import QUICK_START

# A path from the root of the disk, up to its last part; not that of an address, or of a name with a stroke in it.
FOLDERS = re.compile(r"(?<![\w:/.~-])(?:~|[A-Z]:)?/(?:[^\s/'\"`,;:()]+/)+(?=[^\s/'\"`,;:()])")


def name_hft() -> str:
    """How hft is called from here: by its name where the shell finds it, otherwise as it was called now."""
    if shutil.which("hft") is not None:
        return "hft"
    called = Path(sys.argv[0])
    return show_place(called) if called.name == "hft" else "python -m hftcli"


def show_place(path: Path | str) -> str:
    """A path as one types it here: relative where it lies below the working folder."""
    place = Path(path)
    if not place.is_absolute():
        return str(path)
    if place == PACKAGE / QUICK_START / "model":
        return QUICK_START
    here = Path.cwd()
    return str(place.relative_to(here)) if place.is_relative_to(here) and place != here else str(path)


def show_places(text: str) -> str:
    """A line with the paths below the working folder as one types them here."""
    here = f"{Path.cwd()}{os.sep}"
    return text.replace(here, "") if len(here) > 1 else text


def hide_folders(text: str, known: Iterable[str] = ()) -> str:
    """A text for others: of each path from the root of the disk its last part, since the folders say whose it is.

    Args:
        known: paths that may stand in it, whatever blanks and brackets they have.
    """
    for path in sorted(filter(os.path.isabs, known), key=len, reverse=True):
        folded = re.compile(r"\s+".join(map(re.escape, path.split(" "))))  # as YAML breaks lines
        text = Path(path).name.join(folded.split(text))
    return FOLDERS.sub("", text)


def list_texts(value: Any) -> Iterator[str]:
    """All texts in lists and dicts, each of which may be a path."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from list_texts(part)
