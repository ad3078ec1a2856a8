"""Where the rows of a source are: a file, a folder, a dataset that `datasets` saved, a snapshot of the hub, or the hub."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from hftcli import PACKAGE
from hftcli.data.fingerprints import hash_rows
from hftcli.data.readers import READERS, TEXT_READERS, count_rows, drop_nested_nulls, is_readable, read_file, read_saved
from hftcli.errors import DataError
from hftcli.recipe.sections import QUICK_START, DataSection, SourceSection
from hftcli.runs.records import Source

HUB_KEYS = {"name": "configuration", "revision": "revision"}
SAVED_MARKS = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a folder: of one split, of several
TYPES = ", ".join(READERS) + ", and of " + ", ".join(TEXT_READERS) + " also .gz, .bz2, .zst"


@dataclass(frozen=True)
class Place:
    """Where the rows of a source are.

    Attributes:
        name: what messages call it.
        files: the files, in order; none where it is a saved dataset or the hub.
        saved: the folder that save_to_disk wrote; None where it is none.
    """

    source: SourceSection
    name: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None

    def read(self) -> Iterator[Any]:
        """Rows, and faults in place of those that do not read; no more than `max_examples` are read."""
        if self.files:
            return chain.from_iterable(map(read_file, self.files))
        return read_saved(self.saved) if self.saved else map(drop_nested_nulls, _open_hub(self.source))

    def count_rows(self) -> int | None:
        """How many rows there are to read, where that is known before they are read."""
        limit = self.source.max_examples
        counts = [count for file in self.files if (count := count_rows(file)) is not None]
        if not counts or len(counts) < len(self.files):
            return limit
        return sum(counts) if limit is None else min(sum(counts), limit)

    def describe(self) -> Source:
        """What the rows come from, hashed, with no row read.

        Raises:
            DataError: the hub does not give it.
        """
        files = self.files or (sorted(self.saved.glob("*.arrow")) if self.saved else ())
        if not files:
            return Source(path=self.name, fingerprint=_identify_hub_dataset(self.source), num_bytes=None)
        digests = [_hash_file(file) for file in files]
        fingerprint = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        num_bytes = sum(file.stat().st_size for file in files)
        names = tuple(os.path.relpath(file, self.name) for file in files) if len(files) > 1 else ()
        return Source(path=self.name, files=names, fingerprint=fingerprint, num_bytes=num_bytes)


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_places(data: DataSection) -> tuple[Place, ...]:
    """Where the rows of each source are; no row is read, and of the hub nothing is asked.

    Raises:
        DataError: a path can only mean a file or a folder, and there is none, or none that can be read.
    """
    return tuple(find_place(source) for source in data.parts)


def find_sources(data: DataSection) -> tuple[Source, ...]:
    """What the rows come from, hashed, with no row read."""
    return tuple(place.describe() for place in find_places(data))


def describe_place(data: DataSection) -> str:
    """The files that hold the rows, or the hub ids."""
    return ", ".join(place.name for place in find_places(data))


def find_place(source: SourceSection) -> Place:
    """Where the rows of one source are; otherwise as `find_places`."""
    path = Path(source.path).expanduser()
    if source.path.startswith(f"{QUICK_START}/"):  # a folder of the user's own by that name is ./tinyworld
        path = PACKAGE / path
    if path.is_dir():
        return _find_in_folder(source, path)
    if not path.exists():
        if not _looks_local(source.path, path):
            return Place(source, source.path)
        raise DataError(f"data.path {source.path}: no such file or folder", _suggest_neighbor(path))
    if not is_readable(path):
        raise DataError(f"{path} is of no type that hft reads", f"give one of: {TYPES}")
    for key, value in (("name", source.name), ("revision", source.revision)):
        if value is not None:
            raise DataError(f"data.{key} is {value}, a {HUB_KEYS[key]} of a hub dataset, but {path} is a file", "drop it")
    return Place(source, str(path), files=(path,))


def _find_in_folder(source: SourceSection, folder: Path) -> Place:
    if source.revision is not None:
        raise DataError(f"data.revision is {source.revision}, one of a hub dataset, but {folder} is a folder", "drop it")
    if any((folder / mark).is_file() for mark in SAVED_MARKS):
        return _find_saved(source, folder)
    files = sorted(file for file in folder.iterdir() if is_readable(file))
    chosen = [file for file in files if file.name.partition(".")[0] == source.split]
    if source.name is not None or len(chosen) != 1:
        # A configuration, several files, or none: as `datasets` names them, and as a snapshot's card does.
        chosen = _ask_datasets(source, folder) or (files if len(files) == 1 and source.name is None else [])
    if not chosen:
        found = ", ".join(file.name for file in files) or f"none of a type that hft reads ({TYPES})"
        raise DataError(
            f"{folder}: not one file for data.split {source.split}, it holds: {found}", "set data.split, or give a file"
        )
    if unread := [file for file in chosen if not is_readable(file)]:
        raise DataError(f"{unread[0]} is of no type that hft reads", f"give one of: {TYPES}")
    return Place(source, str(chosen[0] if len(chosen) == 1 else folder), files=tuple(chosen))


def _find_saved(source: SourceSection, folder: Path) -> Place:
    if not (folder / "dataset_dict.json").is_file():
        return Place(source, str(folder), saved=folder)
    splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if source.split not in splits:
        raise DataError(f"{folder}: there is no data.split {source.split}, it holds: {', '.join(splits)}", "set data.split")
    return Place(source, str(folder / source.split), saved=folder / source.split)


def _ask_datasets(source: SourceSection, folder: Path) -> list[Path]:
    """The files of a split by the rules of `datasets`: the folder's card, or the names of files and of folders in it.

    Raises:
        DataError: there is no such configuration.
    """
    try:
        files = datasets.load_dataset_builder(str(folder.resolve()), source.name).config.data_files or {}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if source.name is None:
            return []
        raise DataError(f"{folder}: data.name {source.name}: {_get_first_line(error)}", "set data.name, or drop it") from None
    return [Path(file) for file in files.get(source.split, [])]


def _looks_local(given: str, path: Path) -> bool:
    """Whether a missing path was meant for this machine: a hub id is `name` or `owner/name`."""
    is_file_name = path.suffix[1:].isalpha()  # the suffix of `owner/name-v1.5` is no file's
    is_deep = len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    return given.startswith((".", "~")) or path.is_absolute() or is_file_name or is_deep


def _suggest_neighbor(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    guess = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / guess[0]}?" if guess else f"look in {path.parent}"


def _open_hub(source: SourceSection) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset: with `max_examples` they are streamed, otherwise the whole of it is fetched and mapped."""
    is_streamed = source.max_examples is not None
    try:
        options = {"split": source.split, "revision": source.revision, "streaming": is_streamed}
        yield from datasets.load_dataset(source.path, source.name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _describe_missing(source, error) from None


def _identify_hub_dataset(source: SourceSection) -> str:
    """A hash of the rows; where they are streamed, of what the hub says they are, which hashes of its files are part of."""
    try:
        if source.max_examples is None:
            return hash_rows(datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision))
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _describe_missing(source, error) from None
    identity = [*Path(builder.cache_dir).parts[-4:], source.split]  # dataset, configuration, version, hash
    return hashlib.sha256("/".join(identity).encode()).hexdigest()


def _describe_missing(source: SourceSection, error: Exception) -> DataError:
    return DataError(
        f"data.path {source.path}: no such file or folder, and the hub does not give it: {_get_first_line(error)}",
        "give a file, a folder, or a hub id with its data.name and data.split",
    )


def _get_first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
