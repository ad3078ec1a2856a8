"""Lines of text: on a terminal they break between words and go on below where their text began; elsewhere they stay whole.

A terminal by itself would break them in the middle of a word or a number.
"""

import re
import shutil
import sys
import textwrap
from typing import Any, TextIO

from rich.console import Console

LABEL = re.compile(r"\s*(?:hft: |fix: |# +)?(?:\S+\s{2,}){0,2}")  # before the text: `model   `, `#   rows    `, `hft: `
MOST_INDENT = 0.4  # of the width


def open_console(**options: Any) -> Console:
    """A console that shows text as it stands: `[INST]` in a row or a name is no markup, and `:x:` no sign."""
    return Console(markup=False, emoji=False, **options)


def say(text: str) -> None:
    """Print lines on stdout."""
    print(fold(text, sys.stdout))


def fold(text: str, stream: TextIO) -> str:
    """Lines as a stream shows them best."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_fold_line(line, width) for line in text.split("\n"))


def _fold_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    label = LABEL.match(line)
    assert label is not None  # it may be empty
    indent = label.end() if label.end() <= MOST_INDENT * width else 2
    return textwrap.fill(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True,
        replace_whitespace=False, expand_tabs=False,
    )  # fmt: skip
