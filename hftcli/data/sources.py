"""Where the rows of a source are: a file, a folder, a dataset that `datasets` saved, a snapshot of the hub, or the hub."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import FILES_TO_IGNORE

from hftcli import PACKAGE
from hftcli.data.fingerprints import hash_rows
from hftcli.data.readers import READERS, TEXT_READERS, count_rows, drop_nested_nulls, is_readable, read_file, read_saved
from hftcli.errors import DataError
from hftcli.recipe.sections import QUICK_START, DataSection, SourceSection
from hftcli.runs.records import Source

HUB_KEYS = {"name": "configuration", "revision": "revision"}
SAVED_MARKS = ("state.json", "dataset_dict.json")  # what save_to_disk leaves in a folder: of one split, of several
PATH_KEY, PLACE_KEY = re.compile(r"\bdata\.path\b"), re.compile(r"\bdata\.(name|split|revision)\b")  # in messages
NUM_LISTED = 5  # files that a message names
TYPES = ", ".join(READERS) + ", and of " + ", ".join(TEXT_READERS) + " also .gz, .bz2, .zst"


@dataclass(frozen=True)
class Place:
    """Where the rows of a source are.

    Attributes:
        name: what messages call it.
        files: the files, in order; none where it is a saved dataset or the hub.
        saved: the folder that save_to_disk wrote; None where it is none.
        section: of the recipe, that which says where it is.
    """

    source: SourceSection
    name: str
    files: tuple[Path, ...] = ()
    saved: Path | None = None
    section: str = "data"

    def read(self) -> Iterator[Any]:
        """Rows, and faults in place of those that do not read."""
        return chain.from_iterable(rows for _, rows in self.read_parts())

    def read_parts(self) -> Iterator[tuple[str, Iterator[Any]]]:
        """The rows of each file, with its name, or all of them, with that of the place; otherwise as `read`."""
        if self.files:
            yield from ((str(file), read_file(file)) for file in self.files)
        else:
            yield self.name, read_saved(self.saved) if self.saved else map(drop_nested_nulls, self._open_hub())

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
            return Source(path=self.name, fingerprint=self._identify_hub_dataset(), num_bytes=None)
        digests = [_hash_file(file) for file in files]
        fingerprint = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        num_bytes = sum(file.stat().st_size for file in files)
        names = tuple(os.path.relpath(file, self.name) for file in files) if len(files) > 1 else ()
        return Source(path=self.name, files=names, fingerprint=fingerprint, num_bytes=num_bytes)

    def _open_hub(self) -> Iterator[dict[str, Any]]:
        """Rows of a hub dataset: with `max_examples` they are streamed, otherwise the whole of it is fetched and mapped."""
        source, is_streamed = self.source, self.source.max_examples is not None
        try:
            options = {"split": source.split, "revision": source.revision, "streaming": is_streamed}
            yield from datasets.load_dataset(source.path, source.name, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise self._describe_missing(error) from None

    def _identify_hub_dataset(self) -> str:
        """A hash of the rows; where they are streamed, of what the hub says they are, which hashes of its files are part of."""
        source = self.source
        try:
            if source.max_examples is None:
                return hash_rows(datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision))
            builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise self._describe_missing(error) from None
        identity = [*Path(builder.cache_dir).parts[-4:], source.split]  # dataset, configuration, version, hash
        return hashlib.sha256("/".join(identity).encode()).hexdigest()

    def _describe_missing(self, error: Exception) -> DataError:
        return DataError(
            f"{self.section}.path {self.source.path}: no such file or folder, and the hub does not give it: "
            f"{_get_first_line(error)}",
            f"give a file, a folder, or a hub id with its {self.section}.name and {self.section}.split",
        )


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_places(data: DataSection) -> tuple[Place, ...]:
    """Where the rows of each source are; no row is read, and of the hub nothing is asked.

    Raises:
        DataError: a path can only mean a file or a folder, and there is none, or none that can be read.
    """
    sections = [f"data.sources.{number}" for number in range(len(data.sources))] or ["data"]
    return tuple(find_place(source, section) for source, section in zip(data.parts, sections, strict=True))


def name_path_alone(error: DataError, key: str) -> DataError:
    """What is wrong with a place of which `key` gives the path, and nothing says the split or the configuration.

    Args:
        error: as `find_place` and whoever reads the place raise it.
    """
    message = PLACE_KEY.sub(r"\1", PATH_KEY.sub(key, error.message))
    return DataError(message, "give a file" if PLACE_KEY.search(error.fix) else error.fix)


def find_sources(data: DataSection) -> tuple[Source, ...]:
    """What the rows come from, hashed, with no row read."""
    return tuple(place.describe() for place in find_places(data))


def describe_place(data: DataSection) -> str:
    """The files that hold the rows, or the hub ids."""
    return ", ".join(place.name for place in find_places(data))


def find_place(source: SourceSection, section: str = "data") -> Place:
    """Where the rows of one source are, which messages call by the section that says so; otherwise as `find_places`."""
    path = Path(os.path.expanduser(source.path))  # which leaves a `~` that is nobody's as it is
    if source.path.startswith(f"{QUICK_START}/"):  # a folder of the user's own by that name is ./tinyworld
        path = PACKAGE / path
    if path.is_dir():
        return _find_in_folder(source, path, section)
    if not path.exists():
        if not _looks_local(source.path, path):
            return Place(source, source.path, section=section)
        raise DataError(f"{section}.path {source.path}: no such file or folder", _suggest_neighbor(path))
    if not is_readable(path):
        raise DataError(f"{path} is of no type that hft reads", f"give one of: {TYPES}")
    for key, value in (("name", source.name), ("revision", source.revision)):
        if value is not None:
            raise DataError(f"{section}.{key} is {value}, a {HUB_KEYS[key]} of a hub dataset, but {path} is a file", "drop it")
    return Place(source, str(path), files=(path,), section=section)


def _find_in_folder(source: SourceSection, folder: Path, section: str) -> Place:
    if source.revision is not None:
        raise DataError(f"{section}.revision is {source.revision}, one of a hub dataset, but {folder} is a folder", "drop it")
    if any((folder / mark).is_file() for mark in SAVED_MARKS):
        return _find_saved(source, folder, section)
    files = sorted(file for file in folder.iterdir() if is_readable(file))
    chosen = [file for file in files if file.name.partition(".")[0] == source.split]
    if source.name is not None or len(chosen) != 1:
        chosen = _choose_files(source, folder, files, section)
    if unread := [file for file in chosen if not is_readable(file)]:
        raise DataError(f"{unread[0]} is of no type that hft reads", f"give one of: {TYPES}")
    return Place(source, str(chosen[0] if len(chosen) == 1 else folder), files=tuple(chosen), section=section)


def _choose_files(source: SourceSection, folder: Path, files: list[Path], section: str) -> list[Path]:
    """The files of a split, where that is no one file by its name: as `datasets` names them, and as a snapshot's card does.

    Args:
        files: the readable ones that lie in the folder itself.
    """
    splits = _ask_datasets(source, folder, section)
    if not splits and source.name is None and len(files) == 1:
        splits = {"train": files}  # as `datasets` names what has no other name
    if not splits:
        found = ", ".join(file.name for file in files) or f"none of a type that hft reads ({TYPES})"
        raise DataError(
            f"{folder}: not one file for {section}.split {source.split}, it holds: {found}",
            f"set {section}.split, or give a file",
        )
    if source.name is None and (left := _find_left(folder, splits)) and not _has_card(folder):
        listed = ", ".join(os.path.relpath(file, folder) for file in left[:NUM_LISTED])
        more = f" and {len(left) - NUM_LISTED} more" if len(left) > NUM_LISTED else ""
        raise DataError(
            f"{folder}: its splits ({', '.join(splits)}) leave out {listed}{more}, of another type or of no split's name",
            "give one file, list the files under data.sources, or take away what is not to be read",
        )
    if source.split not in splits:
        raise _describe_split(source, folder, splits, section)
    return splits[source.split]


def _describe_split(source: SourceSection, folder: Path, splits: Iterable[str], section: str) -> DataError:
    message = f"{folder}: there is no {section}.split {source.split}, it holds: {', '.join(splits)}"
    return DataError(message, f"set {section}.split")


def _find_saved(source: SourceSection, folder: Path, section: str) -> Place:
    if source.name is not None:
        raise DataError(
            f"{section}.name is {source.name}, a configuration of a hub dataset, but {folder} is one that `datasets` saved",
            "drop it",
        )
    if not (folder / "dataset_dict.json").is_file():
        state = _read_mark(folder / "state.json")
        split = state.get("_split")  # where it is known: of `train[:10%]+test`, two
        if split and source.split not in (names := [part.partition("[")[0] for part in split.split("+")]):
            raise _describe_split(source, folder, names, section)
        return Place(source, str(folder), saved=folder, section=section)
    splits = _read_mark(folder / "dataset_dict.json")["splits"]
    if source.split not in splits:
        raise _describe_split(source, folder, splits, section)
    return Place(source, str(folder / source.split), saved=folder / source.split, section=section)


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise DataError(f"{path}: not what save_to_disk writes, or damaged", "write or fetch it again") from None
    return found


def _ask_datasets(source: SourceSection, folder: Path, section: str) -> dict[str, list[Path]]:
    """The files of each split by the rules of `datasets`: the folder's card, or the names of files and of folders in it.

    Raises:
        DataError: there is no such configuration, or there are several, and none is named.
    """
    try:
        files = datasets.load_dataset_builder(str(folder.resolve()), source.name).config.data_files or {}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason, *more = str(error).strip().split("\n")
        if source.name is not None:
            raise DataError(f"{folder}: {section}.name {source.name}: {reason}", f"set {section}.name, or drop it") from None
        if reason.startswith("Config name is missing"):
            raise DataError(f"{folder}: {' '.join([reason, *more[:1]])}", f"set {section}.name") from None
        return {}
    return {str(split): [Path(file) for file in found] for split, found in files.items() if found}


def _find_left(folder: Path, splits: dict[str, list[Path]]) -> list[Path]:
    """Files of a folder that could hold rows and that `datasets` puts into no split."""
    taken = {file.resolve() for files in splits.values() for file in files}
    found = (file for file in folder.rglob("*") if is_readable(file) and file.is_file() and file.name not in FILES_TO_IGNORE)
    return sorted(
        file
        for file in found
        if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts) and file.resolve() not in taken
    )


def _has_card(folder: Path) -> bool:
    """Whether a snapshot's card says which files are its rows; others then are left out on purpose."""
    module = datasets.load.dataset_module_factory(str(folder.resolve()))
    return bool(module.builder_configs_parameters.metadata_configs)


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


def _get_first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
