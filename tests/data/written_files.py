"""What the tests of files of rows share: the rows, in every type of file."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset

ROWS = [{"question": f"q{index} é", "answer": f"a{index}"} for index in range(23)]


def write_file(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows in the type that the name asks for."""
    kind = path.name.partition(".")[2]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "arrow":
        Dataset.from_list(rows).save_to_disk(path.parent / "saving")
        next((path.parent / "saving").glob("*.arrow")).rename(path)
    elif kind == "ipc.arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(str(path), table.schema) as stream:
            stream.write_table(table)
    elif kind == "jsonl":
        path.write_text(lines)
    else:
        with pyarrow.output_stream(
            str(path), compression={"gz": "gzip", "bz2": "bz2", "zst": "zstd"}[path.suffix[1:]]
        ) as stream:
            stream.write(lines.encode())
    return path


def read(rows: list[Any]) -> list[list[str]]:
    return [[message["content"] for message in row["messages"]] for row in rows]


EXPECTED = [[row["question"], row["answer"]] for row in ROWS]
