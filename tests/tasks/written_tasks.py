"""Tasks written to folders, and sequences of them."""

import json
from pathlib import Path

from hftcli.recipe.sections import ContinualSection
from hftcli.tasks import find_sequence

INVENTED = [{"prompt": f"Say {word}.\nAnswer:", "answer": word} for word in ("fox", "hen", "mole")]


def write_rows(path: Path, rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_task(folder: Path, **splits: object) -> str:
    """A task's folder; its root."""
    for split, rows in ({"train": INVENTED, "test": INVENTED[:1]} | splits).items():
        write_rows(folder / f"{split}.json", rows)
    return str(folder.parent)


def find(tasks: str | tuple[str, ...], root: str | None = None, **settings: str):
    return find_sequence(ContinualSection(tasks=tasks, **settings), root)
