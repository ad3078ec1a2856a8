"""What identifies rows: their content, and nothing of how they were made or where they lie."""

import hashlib

import pyarrow
from datasets import Dataset

BATCH_SIZE = 10_000  # rows hashed at once


def hash_rows(rows: Dataset) -> str:
    """sha256 of what the rows hold: columns, types and values, in their order."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(BATCH_SIZE):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()
