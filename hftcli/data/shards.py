"""Tokens on disk: written batch by batch as they are made, in files of a bounded size, and read memory-mapped."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from trl import pack_dataset

from hftcli.data.tokens import IGNORED, Columns

SHARD_TOKENS = 1 << 26  # token ids in one file: a quarter of a gibibyte
PACKED_NAME, MIXED_NAME = "packed.arrow", "mixed.arrow"


class ShardWriter:
    """Writes rows of token ids into files of a folder, one file after another."""

    def __init__(self, folder: Path, features: datasets.Features):
        self.folder = folder
        self.features = features
        self.num_shards = self.num_rows = 0
        self.writer: ArrowWriter | None = None
        self.num_tokens = 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, columns: Columns) -> None:
        """Write rows; each column is a list of their token ids."""
        if not columns[next(iter(columns))]:
            return
        if self.writer is None or self.num_tokens > SHARD_TOKENS:
            self.close()
            self.writer = ArrowWriter(features=self.features, path=str(self.folder / f"tokens-{self.num_shards:05d}.arrow"))
            self.num_shards, self.num_tokens = self.num_shards + 1, 0
        arrays = {name: make_array(rows) for name, rows in columns.items()}
        table = pyarrow.table(arrays)
        self.writer.write_table(table)
        self.num_rows += table.num_rows
        self.num_tokens += sum(len(array.values) for array in arrays.values())

    def close(self) -> None:
        """Finish the last file."""
        if self.writer is not None:
            self.writer.finalize()


def make_array(rows: list[list[int] | np.ndarray]) -> pyarrow.ListArray:
    """Rows of token ids, each a list or an array."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(offsets, np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]))


def open_shards(folder: Path) -> Dataset:
    """The rows of a folder's files, mapped from disk, without what `datasets` may have written beside them."""
    files = [file for file in sorted(folder.glob("*.arrow")) if not file.name.startswith("cache-")]
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in files])


def pack_shards(tokens: Dataset, max_length: int, folder: Path) -> None:
    """Lay rows side by side into sequences of `max_length` tokens, on disk; `seq_lengths` tells them apart."""
    pack_dataset(tokens, max_length, "bfd", {"cache_file_name": str(folder / PACKED_NAME)})


def keep_rows(tokens: Dataset, folder: Path) -> None:
    """Write chosen rows, in their order, into a file of their own."""
    tokens.flatten_indices(cache_file_name=str(folder / MIXED_NAME))


def count_tokens(tokens: Dataset) -> tuple[int, int]:
    """Token ids of all sequences, and those among them that are trained: of a pair's two, those of the answers."""
    num_tokens = num_trained = 0
    for table in tokens.with_format("arrow").iter(1000):
        lengths = {
            name: pyarrow.compute.sum(pyarrow.compute.list_value_length(table[name])).as_py() for name in table.column_names
        }
        if "labels" in lengths:
            num_tokens += lengths["labels"]
            labels = pyarrow.compute.list_flatten(table["labels"])
            num_trained += pyarrow.compute.sum(pyarrow.compute.not_equal(labels, IGNORED)).as_py()
        else:
            num_tokens += 2 * lengths["prompt_ids"] + lengths["chosen_ids"] + lengths["rejected_ids"]
            num_trained += lengths["chosen_ids"] + lengths["rejected_ids"]
    return num_tokens, num_trained


def find_largest(tokens: Dataset) -> int:
    """The largest token id."""
    largest = 0
    for table in tokens.with_format("arrow").iter(1000):
        for name in table.column_names:
            if name.endswith("_ids"):
                found: Any = pyarrow.compute.max(pyarrow.compute.list_flatten(table[name])).as_py()
                largest = max(largest, found or 0)
    return largest
