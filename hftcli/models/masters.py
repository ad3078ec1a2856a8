"""The float32 masters beside a checkpoint, of which its 16-bit weights are the rounding.

    ROUND/checkpoint/           the weights, rounded once
    ROUND/masters.safetensors   float32, under the parameters' names

They are of every parameter that trained in the round or in one before it and that the files store in fewer bits. A later round
begins from them, so that what a file cannot hold is not lost between two rounds. The checkpoint's history has their size and
hash, so that a copy of the checkpoint alone is known to have had them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hftcli.errors import ModelError
from hftcli.models.tensors import Form, StoredTensor, get_bytes, get_form, list_file, write_header
from hftcli.runs.history import read_history
from hftcli.runs.run import Round
from hftcli.runs.seals import FileSeal, find_damage, flush_files, seal_file


@dataclass(frozen=True)
class CarriedMasters:
    """The masters of a checkpoint.

    Attributes:
        state: `none`, it never had any; `here`; `missing`, it had, and they are not beside it; `other`, the file there is
            damaged, or of another checkpoint.
        path: where they are or would be.
        tensors: by parameter.
        seal: what the file was when it was written.
    """

    state: Literal["none", "here", "missing", "other"]
    path: Path
    tensors: dict[str, StoredTensor]
    seal: FileSeal | None

    def find_damage(self) -> list[str]:
        """What is wrong with the file, a line for each; nothing where there is none."""
        if self.seal is None or self.state == "missing":
            return []
        return find_damage(self.path.parent, {self.path.name: self.seal})


def open_masters(checkpoint: Path) -> CarriedMasters:
    """The masters beside a checkpoint."""
    path, seal = Round(checkpoint.resolve().parent).masters_path, read_history(checkpoint).masters
    if seal is None or not path.exists():
        return CarriedMasters("none" if seal is None else "missing", path, {}, seal)
    try:
        is_whole = path.stat().st_size == seal.num_bytes
        return CarriedMasters("here" if is_whole else "other", path, list_file(path) if is_whole else {}, seal)
    except ModelError:
        return CarriedMasters("other", path, {}, seal)


def write_masters(path: Path, masters: Mapping[str, torch.Tensor], carried: Mapping[str, StoredTensor]) -> FileSeal | None:
    """Write masters, whole or not at all, and on the disk before the checkpoint that needs them.

    Args:
        masters: of the round, in float32.
        carried: those of earlier rounds that did not train in this one, as their file has them.

    Returns:
        The file's seal; None where there is nothing to write.
    """
    if not masters and not carried:
        path.unlink(missing_ok=True)  # of an earlier attempt at the round
        return None
    forms: dict[str, Form] = {name: get_form(values) for name, values in masters.items()}
    forms |= {name: stored.form for name, stored in carried.items()}
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as stream:
        for name, place in write_header(stream, forms, {"format": "pt"}).items():
            stream.seek(place)
            content: np.ndarray = get_bytes(masters[name]) if name in masters else carried[name].read_bytes()
            stream.write(content.data)
    flush_files(path.parent, [temporary.name])
    temporary.replace(path)
    return seal_file(path)


@dataclass
class RoundingLoss:
    """What a checkpoint's data types drop of a round's update, added up parameter by parameter.

    Attributes:
        updates: largest absolute change of each parameter since the round began, in float32.
        dropped: the share of its update's norm that rounding dropped, by parameter.
        update_square, dropped_square: sums over all weights.
    """

    updates: dict[str, float]
    dropped: dict[str, float]
    update_square: float = 0.0
    dropped_square: float = 0.0

    @property
    def norms(self) -> tuple[float, float]:
        """Of the update, and of what was dropped of it."""
        return math.sqrt(self.update_square), math.sqrt(self.dropped_square)

    def add(self, name: str, began: torch.Tensor, stored: torch.Tensor, master: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in a parameter.

        Args:
            began: what the round began from.
            stored: what the start's files hold, which is what `began` rounds to.
            master: what the round ended with, in float32.
            rounded: what the checkpoint's files hold.
        """
        self.updates[name] = (master - began.float()).abs().max().item()
        update = (master - stored.float()).double().square().sum().item()
        dropped = (master - rounded.float()).double().square().sum().item()
        self.update_square += update
        self.dropped_square += dropped
        if dropped:
            self.dropped[name] = math.sqrt(dropped / update)
