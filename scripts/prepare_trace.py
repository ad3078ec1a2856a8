"""TRACE's official archive as the folder that `data.root` wants, checked.

    python scripts/prepare_trace.py TRACE-Benchmark.zip --output DIR [--size 5000]

Sizes are those of the release: 5000 (the paper's), 1000, 500, and Reasoning, whose answers are explained. Writes
DIR/<task>/{train,eval,test}.json byte for byte, and Lima beside them where the archive has it; prints what is wrong with them.
"""

import argparse
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path, PurePosixPath

from hftcli.errors import DataError, HftError
from hftcli.tasks.check import check_sequence, format_report
from hftcli.tasks.trace import ORDERS, REPLAY

ARCHIVE_SHA256 = "11152d50f8a093b1fc9c6c924ec207915d173b9e2d715396ec8f8a837e2668a8"
SPLITS = ("train", "eval", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--size", choices=("500", "1000", "5000", "Reasoning"), default="5000")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        prepare(arguments.archive, arguments.size, arguments.output)
    except HftError as error:
        print(f"error: {error.message}" + (f"\n  {error.fix}" if error.fix else ""), file=sys.stderr)
        sys.exit(error.exit_code)


def prepare(archive: Path, size: str, output: Path) -> None:
    """Raises: DataError: the archive is none, or lacks a task, or the output holds something already."""
    if not zipfile.is_zipfile(archive):
        raise DataError(
            f"{archive}: not a zip archive", "the release is TRACE-Benchmark.zip of some hundred MB; download it again"
        )
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output} is not empty", "give another --output, or empty it")
    if compute_sha256(archive) != ARCHIVE_SHA256:
        print(f"warning: {archive} is not the release of sha256 {ARCHIVE_SHA256}", file=sys.stderr)
    with zipfile.ZipFile(archive) as opened:
        members = find_members(opened, f"LLM-CL-Benchmark_{size}")
        missing = [f"{task}/{split}.json" for task in ORDERS["1"] for split in SPLITS if (task, split) not in members]
        if missing:
            raise DataError(f"{archive} has no LLM-CL-Benchmark_{size} with {', '.join(missing)}", "is it TRACE-Benchmark.zip?")
        for (task, split), member in members.items():
            extract(opened, member, output / task / f"{split}.json")
    print(format_report(check_sequence([f"trace/{task}" for task in ORDERS["1"]], str(output))))
    print(f"\ndata.root={output}")


def compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_members(archive: zipfile.ZipFile, folder: str) -> dict[tuple[str, str], zipfile.ZipInfo]:
    """By task and split. Where a file goes is decided by these names alone: a path in the archive leads nowhere."""
    wanted = {(folder, task, f"{split}.json"): (task, split) for task in (*ORDERS["1"], REPLAY) for split in SPLITS}
    found = {wanted.get(PurePosixPath(member.filename).parts[-3:]): member for member in archive.infolist()}
    return {key: member for key, member in found.items() if key}


def extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with archive.open(member) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
