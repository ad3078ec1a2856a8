"""Delta checkpoints: what a round trained, on top of the checkpoint that it started from.

A delta's folder has the configs and the tokenizer of a full checkpoint, the stored tensors under the names of the model's
parameters, and delta.json, which says to the byte what the base is. Of a tensor of which only some rows changed, as embeddings
do in those of the tokens that were seen, the file holds these rows and their numbers. The base may be a delta itself, so a
checkpoint is a stack: one full folder at the root, and any number of deltas. The weight file is not called as transformers
calls its own, so that nothing that does not know of deltas takes one for a model.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from hftcli.errors import ModelError
from hftcli.freezing.selection import FreezePlan
from hftcli.models.tensors import write_tensors
from hftcli.runs.files import read_model, write_model
from hftcli.runs.made import DELTA_NAME, CheckpointIdentity, DeltaRecord

WEIGHTS_NAME = "delta.safetensors"
ROWS_SUFFIX = "/rows"  # of the tensor with the numbers of the rows of another


@dataclass(frozen=True)
class Delta:
    """One delta's folder, and what its delta.json says."""

    folder: Path
    record: DeltaRecord

    @property
    def dtype(self) -> torch.dtype | None:
        """What the parameters below are converted to; None leaves them what they are."""
        return None if self.record.dtype is None else getattr(torch, self.record.dtype)


@dataclass(frozen=True)
class Stack:
    """A checkpoint as it is stored.

    Attributes:
        root: a full folder.
        deltas: what lies on it, oldest first; none where the checkpoint is full.
    """

    root: Path
    deltas: tuple[Delta, ...]

    @property
    def folder(self) -> Path:
        """Where the checkpoint's own files are."""
        return self.deltas[-1].folder if self.deltas else self.root


def open_stack(folder: Path, base: Path | None = None) -> Stack:
    """Find what a checkpoint stands on, and check that each base is the one that the delta on it was made on.

    A base that is not where delta.json says, in a run that was moved or copied, is looked for in the run as it is now.

    Args:
        base: taken for whichever base of the stack it is, instead of where delta.json says that one was.

    Raises:
        ModelError: a base is missing or has other bytes, or `base` is none of them.
        InputError: a delta.json is damaged.
    """
    deltas: list[Delta] = []
    is_used = False
    while (folder / DELTA_NAME).exists():
        delta = Delta(folder, read_model(folder / DELTA_NAME, DeltaRecord))
        deltas.insert(0, delta)
        if base is not None and not find_differences(delta.record.base, base):
            folder, is_used = base, True
            continue
        folder = Path(delta.record.base.path)
        if differences := find_differences(delta.record.base, folder):
            if not find_differences(delta.record.base, beside := locate_beside(delta)):
                folder = beside
                continue
            if base is not None and not is_used:
                folder, differences = base, find_differences(delta.record.base, base)
            _refuse_base(delta, folder, differences)
    if base is not None and not is_used:
        if not deltas:
            raise ModelError(
                f"{folder} is not a delta: it has no {DELTA_NAME}", "give a checkpoint of checkpoint.format: delta"
            )
        _refuse_base(deltas[0], base, find_differences(deltas[0].record.base, base))
    return Stack(folder, tuple(deltas))


def locate_beside(delta: Delta) -> Path:
    """Where a delta's base is if it is an earlier round of the same run, wherever that was moved or copied to."""
    base = Path(delta.record.base.path)
    return delta.folder.resolve().parent.parent / base.parent.name / base.name


def _refuse_base(delta: Delta, base: Path, differences: list[str]) -> None:
    raise ModelError(
        f"{base} is not the base that {delta.folder} was made on: {', '.join(differences)}",
        "bring the base back, or lay the delta over a copy of it: hft merge --base COPY --delta DELTA --output FOLDER",
    )


def find_differences(identity: CheckpointIdentity, folder: Path) -> list[str]:
    """How a folder is not the checkpoint of that identity, file by file; nothing where it is."""
    if not folder.is_dir():
        return ["there is no such folder"]
    found = hash_checkpoint(folder)
    missing = [f"{name} is missing" for name in identity.files if name not in found]
    altered = [f"{name} has other bytes" for name, digest in identity.files.items() if name in found and found[name] != digest]
    added = [f"{name} is not of it" for name in found if name not in identity.files]
    return missing + altered + added


def identify_checkpoint(folder: Path) -> CheckpointIdentity:
    return CheckpointIdentity(path=str(folder.resolve()), files=hash_checkpoint(folder))


def hash_checkpoint(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that make a model what it is, by name. That of a delta.json stands for all that lies below it."""
    files = [folder / "config.json", folder / DELTA_NAME, *sorted(folder.glob("*.safetensors"))]
    found = [file.resolve() for file in files if file.exists()]  # the hub's cache is made of links
    digests = [_hash_file(file, file.stat().st_size, file.stat().st_mtime_ns) for file in found]
    return dict(zip((file.name for file in files if file.exists()), digests, strict=True))


@cache
def _hash_file(file: Path, num_bytes: int, modified_ns: int) -> str:
    """Read once in a process, unless the file changes: a base is asked after by all who read a delta."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_delta(
    weights: dict[str, torch.Tensor],
    rows: dict[str, torch.Tensor],
    folder: Path,
    base: Path,
    plan: FreezePlan,
    dtype: torch.dtype | None,
) -> None:
    """Write parameters and what they stand on into a folder; delta.json comes last.

    Args:
        rows: for those of which only some rows are in `weights`, the numbers of these rows, int32 [R].
        dtype: what the parameters below are converted to; None leaves them what they are.
    """
    content = weights | {name + ROWS_SUFFIX: numbers for name, numbers in rows.items()}
    write_tensors(folder / WEIGHTS_NAME, content, {"format": "pt"})
    record = DeltaRecord(
        base=identify_checkpoint(base),
        fingerprint=plan.fingerprint,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        tensors=tuple(weights),
        rows=tuple(rows),
    )
    write_model(folder / DELTA_NAME, record)
