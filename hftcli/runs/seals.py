"""Size and sha256 of every file in a folder: taken when it is written, compared when it is read."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict

NUM_FLUSHED = 16  # files at once: a file system writes its journal once for all that wait for it


class FileSeal(BaseModel):
    """What a file was when it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_bytes: int
    """Size of the file."""
    sha256: str
    """Hash of its bytes."""


def list_files(folder: Path) -> list[str]:
    """Every file below a folder, relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def seal_file(path: Path) -> FileSeal:
    """Size and hash of a file as it is now."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileSeal(num_bytes=path.stat().st_size, sha256=digest)


def seal_files(folder: Path, names: Iterable[str]) -> dict[str, FileSeal]:
    """Seals of files of a folder, by name."""
    return {name: seal_file(folder / name) for name in names}


def flush_files(folder: Path, names: Iterable[str]) -> None:
    """Have the files' bytes, and the folder's own entries, on the disk and not only in the machine's memory."""
    with ThreadPoolExecutor(NUM_FLUSHED) as pool:
        list(pool.map(flush, [*(folder / name for name in names), folder]))  # what could not be written raises here


def flush(path: Path) -> None:
    """`flush_files` for one file, or for a folder's own entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path, seals: dict[str, FileSeal]) -> list[str]:
    """What is wrong with the sealed files of a folder, a line for each; sizes first, since they cost nothing to read."""
    damage = []
    for name, seal in seals.items():
        path = folder / name
        if not path.is_file():
            damage.append(f"{name} is missing")
        elif (size := path.stat().st_size) != seal.num_bytes:
            damage.append(f"{name} has {size:,} bytes instead of {seal.num_bytes:,}")
        elif seal_file(path) != seal:
            damage.append(f"{name} has other bytes than were written")
    return damage
