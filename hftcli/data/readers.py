"""Rows out of files: JSON, JSONL, CSV and TSV, each also compressed, Parquet and Arrow.

A reader gives the rows of a file one after another, and in place of a row that does not read the fault, so that the rows after
it are still seen. A fault that leaves no more rows to read is raised.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow
import pyarrow.parquet

from hftcli.errors import DataError
from hftcli.tasks.keys import DoubledKey, describe_doubled, take_pairs

Row = dict[str, Any]
Reader = Callable[[Path], Iterator[Row | DataError]]

BATCH_SIZE = 1000  # rows of a Parquet file in memory at once
WHITE_SPACE = frozenset(" \t\n\r")  # as JSON has it
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


DECODER = json.JSONDecoder(object_pairs_hook=take_pairs)
LENIENT_DECODER = json.JSONDecoder()


def read_json(file: Path) -> Iterator[Row | DataError]:
    """Rows of a JSON array, or of one object on each line.

    Read with the standard library, so that a fault has a line and a column may hold values of several types.
    """
    with _open_text(file) as stream:
        lines = ((number, line) for number, line in enumerate(stream, start=1) if not line.isspace())
        first = next(lines, None)
        if first is None:
            return
        if first[1].lstrip().startswith("["):
            # Blank lines stand for those that are skipped, so that a fault has its line.
            yield from _read_array("\n" * (first[0] - 1) + first[1] + stream.read(), file)
            return
        for number, line in chain([first], lines):
            yield _parse_line(line, f"{file}:{number}")


def _parse_line(line: str, place: str) -> Row | DataError:
    try:
        return DECODER.decode(line)
    except json.JSONDecodeError as error:
        return DataError(f"{place}: not JSON: {error.msg} at column {error.colno}")
    except DoubledKey as error:
        return describe_doubled(place, error)


def _read_array(text: str, file: Path) -> Iterator[Row | DataError]:
    try:
        position = _skip_space(text, text.index("[") + 1)
        while text[position : position + 1] != "]":
            try:
                row, position = DECODER.raw_decode(text, position)
                yield row
            except DoubledKey as error:
                yield describe_doubled(f"{file}:{text.count(chr(10), 0, position) + 1}", error)
                _, position = LENIENT_DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
                if text[position : position + 1] == "]":
                    raise json.JSONDecodeError("Expecting value", text, position)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, position + 1)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in WHITE_SPACE:
        position += 1
    return position


def read_csv(file: Path) -> Iterator[Row | DataError]:
    """Rows whose cells commas part."""
    return _read_cells(file, ",")


def read_tsv(file: Path) -> Iterator[Row | DataError]:
    """Rows whose cells tabs part."""
    return _read_cells(file, "\t")


def _read_cells(file: Path, delimiter: str) -> Iterator[Row | DataError]:
    """Rows whose cells are text as it stands: no guess makes a number of `007`, or nothing of `NA`."""
    csv.field_size_limit(sys.maxsize)
    with _open_text(file) as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        columns = reader.fieldnames or []
        if doubled := [name for name in columns if columns.count(name) > 1]:
            raise DataError(f"{file}:1: the column {doubled[0]!r} stands twice", "rename one of the two")
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{file}:{reader.line_num}: not CSV: {error}") from None
            if row is None:
                return
            if None in row:
                reason = f"{file}:{reader.line_num}: there are more cells than the {len(columns)} columns"
                yield DataError(reason, "put cells with a delimiter in quotes")
            else:
                yield row


def read_parquet(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file, whose checksums are tried where it has them."""
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            yield from _take_batches(opened.iter_batches(BATCH_SIZE))
    except (pyarrow.ArrowException, OSError) as error:
        raise _describe_damage(file, "Parquet", error) from None


def read_arrow(file: Path) -> Iterator[Row]:
    """Rows of Arrow's stream format, in which `datasets` keeps its files, or of its file format."""
    try:
        with pyarrow.memory_map(str(file)) as source:
            try:
                opened = pyarrow.ipc.open_stream(source)
                batches = iter(opened)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            yield from _take_batches(batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise _describe_damage(file, "Arrow", error) from None


def _take_batches(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Row]:
    for batch in batches:
        nested = [field.name for field in batch.schema if pyarrow.types.is_nested(field.type)]
        for start in range(0, batch.num_rows, BATCH_SIZE):
            for row in batch.slice(start, BATCH_SIZE).to_pylist():
                yield {**row, **{name: drop_nulls(row[name]) for name in nested}}


def drop_nulls(value: Any) -> Any:
    """A nested value without what is null in it: a table gives every object all keys of the column."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def read_saved(folder: Path) -> Iterator[Row]:
    """Rows of a folder that `datasets` wrote with save_to_disk."""
    try:
        yield from map(drop_nested_nulls, datasets.load_from_disk(str(folder)))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise _describe_damage(folder, "save_to_disk", error) from None


def drop_nested_nulls(row: Row) -> Row:
    """A row without what is null within its nested values."""
    return {name: drop_nulls(value) if isinstance(value, list | dict) else value for name, value in row.items()}


def _describe_damage(file: Path, kind: str, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{file}: does not read: {error.strerror}")
    reason = " ".join(str(error).split()).rstrip(".")
    return DataError(f"{file}: not a {kind} file, or a damaged one: {reason}", "write or fetch it again")


@contextmanager
def _open_text(file: Path) -> Iterator[TextIO]:
    try:
        try:
            with _open_bytes(file) as stream:
                yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError:
            raise _find_undecodable(file) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise _describe_damage(file, COMPRESSIONS.get(file.suffix, "readable"), error) from None


@contextmanager
def _open_bytes(file: Path) -> Iterator[io.BufferedReader]:
    if file.suffix in COMPRESSIONS:
        with pyarrow.input_stream(str(file), compression=COMPRESSIONS[file.suffix]) as stream:
            yield io.BufferedReader(stream)
    else:
        with file.open("rb") as opened:
            yield opened


def _find_undecodable(file: Path) -> DataError:
    """The line that is no UTF-8: a decoder counts from where its last piece of the file began."""
    with _open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return DataError(f"{file}:{number}: not UTF-8: {error.reason} at byte {error.start + 1} of the line")
    raise AssertionError(f"{file} is UTF-8")


def count_rows(file: Path) -> int | None:
    """Rows of a file, blank lines counted, where that is known without reading them."""
    if file.suffix == ".jsonl":
        with file.open("rb") as stream:
            pieces = iter(lambda: stream.read(1 << 20), b"")
            num_rows, last = 0, b"\n"
            for piece in pieces:
                num_rows, last = num_rows + piece.count(b"\n"), piece[-1:]
            return num_rows + (last != b"\n")
    if file.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _describe_damage(file, "Parquet", error) from None
    return None


def find_type(file: Path) -> str:
    """The suffix that says how a file is written; a compression is no type."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def is_readable(file: Path) -> bool:
    """Whether the name says a type that is read."""
    return find_type(file) in (TEXT_READERS if file.suffix in COMPRESSIONS else READERS)


def read_file(file: Path) -> Iterator[Row | DataError]:
    """The rows of a file of any type."""
    return READERS[find_type(file)](file)


TEXT_READERS: dict[str, Reader] = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".tsv": read_tsv}
READERS: dict[str, Reader] = {**TEXT_READERS, ".parquet": read_parquet, ".arrow": read_arrow}
