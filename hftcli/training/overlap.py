"""Held-out rows that are trained on as well: what is measured on them says nothing of rows that were not."""

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, pairwise

from datasets import Dataset

from hftcli.methods.distill import HASHED_ROWS, hash_row

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
