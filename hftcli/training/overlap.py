"""Held-out rows that are trained on, and questions that were named to be kept: they say nothing of rows that were not."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path

from datasets import Dataset

from hftcli.methods.distill import HASHED_ROWS, hash_row
from hftcli.tasks import is_task, locate_rows

COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")  # that make a row: the first, or of a pair the others


def count_shared(held_out: Dataset, trained: Dataset) -> int:
    """How many of the held-out rows, or pairs, have the tokens of one that is trained on, which may be packed."""
    counts = Counter(hash_rows(held_out))
    return sum(counts[row] for row in {row for row in hash_rows(trained) if row in counts})


def hash_rows(rows: Dataset) -> Iterator[bytes]:
    """A hash of the tokens of each row, of packed ones too."""
    columns = [name for name in COLUMNS if name in rows.column_names]
    packed = ["seq_lengths"] if "seq_lengths" in rows.column_names else []
    for batch in rows.select_columns(columns + packed).with_format("arrow").iter(HASHED_ROWS):
        parts = [batch[name].to_numpy() for name in columns]
        if packed:
            for ids, lengths in zip(parts[0], batch["seq_lengths"].to_pylist(), strict=True):
                yield from (hash_row(ids[start:stop]) for start, stop in pairwise(accumulate(lengths, initial=0)))
        else:
            yield from (b"".join(map(hash_row, row)) for row in zip(*parts, strict=True))


def list_named(path: str, asked: Iterable[str], root: str | None) -> tuple[str, ...]:
    """Of the tasks that are asked, those whose test rows are what a key of `freeze` names.

    Args:
        path: of rows, or a task.
        root: `data.root`.
    """
    return tuple(name for name in asked if name == path or _shares_file(path, name, root))


def _shares_file(path: str, name: str, root: str | None) -> bool:
    """Whether rows are of the file that a task asks from; two tasks of benchmarks are two, be they of one file."""
    if is_task(path) and is_task(name):
        return False
    named, asked = locate_rows(path, root, "test") if is_task(path) else Path(path), locate_rows(name, root, "test")
    return named is not None and asked is not None and named.resolve() == asked.resolve()
