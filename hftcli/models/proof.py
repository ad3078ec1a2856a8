"""What moved: tensors of checkpoints read by name, full or delta, and compared with the start byte for byte."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
)

from hftcli.errors import ModelError
from hftcli.freezing.selection import FreezePlan
from hftcli.models.deltas import ROWS_SUFFIX, open_stack
from hftcli.models.description import fetch_checkpoint, read_header
from hftcli.runs.records import Verification
from hftcli.runs.run import Round, find_checkpoint_damage


class CheckpointReader:
    """Tensors of a checkpoint, full or delta, by parameter name, one at a time.

    Args:
        base: for a delta: see `open_stack`.

    Raises:
        ModelError: a file is damaged, a parameter is in none, or a delta's base is not the one that it was made on.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], base: Path | None = None):
        self.stack = open_stack(folder, base)
        self.layers = [_map_tensors(self.stack.root), *(_map_tensors(delta.folder) for delta in self.stack.deltas)]
        for delta, layer in zip(self.stack.deltas, self.layers[1:], strict=True):
            expected = {*delta.record.tensors, *(name + ROWS_SUFFIX for name in delta.record.rows)}
            if odd := sorted(set(layer) ^ expected):
                raise ModelError(f"{delta.folder} is damaged: its delta.json and its weights differ in {odd[0]}")
        self.model = None
        if any(all(name not in layer for layer in self.layers) for name in names):
            # A family whose files have another layout than its modules, such as experts fused on loading.
            root = self.stack.root
            self.model, loading = AutoModelForCausalLM.from_pretrained(root, dtype="auto", output_loading_info=True)
            if missing := sorted(set(names) & set(loading["missing_keys"])):
                raise ModelError(f"{root} lacks {len(missing)} parameters, the first is {missing[0]}")

    def read(self, name: str) -> torch.Tensor:
        return self._read_at(name, len(self.stack.deltas))

    def _read_at(self, name: str, place: int) -> torch.Tensor:
        """A parameter as it is with that many deltas on the root."""
        if place == 0:
            return self.model.get_parameter(name).detach() if self.model is not None else self._read_stored(name, 0)
        delta = self.stack.deltas[place - 1]
        if name in delta.record.rows:
            values = self._read_at(name, place - 1).to(delta.dtype, copy=True)
            values[self._read_stored(name + ROWS_SUFFIX, place)] = self._read_stored(name, place)
            return values
        if name in delta.record.tensors:
            return self._read_stored(name, place)
        return self._read_at(name, place - 1).to(delta.dtype)

    def _read_stored(self, name: str, place: int) -> torch.Tensor:
        with safe_open(self.layers[place][name], framework="pt") as file:
            return file.get_tensor(name)


def _map_tensors(folder: Path) -> dict[str, Path]:
    return {name: file for file in sorted(folder.glob("*.safetensors")) for name in read_header(file)}


def measure_updates(weights: dict[str, torch.Tensor], start: Path, dtype: torch.dtype, plan: FreezePlan) -> dict[str, float]:
    """Largest absolute change of each trained parameter since the start, in float32."""
    reader = CheckpointReader(start, plan.trained)
    return {name: (weights[name].float() - reader.read(name).to(dtype).float()).abs().max().item() for name in plan.trained}


def verify_checkpoint(start: Path, checkpoint: Path, plan: FreezePlan, updates: dict[str, float]) -> Verification:
    """Compare a round's checkpoint with its start, bit for bit: frozen parameters are the same, trained ones are not.

    The start counts as loaded, in the checkpoint's data type.

    Args:
        updates: largest change of each trained parameter in float32; tells a tensor that moved by less than a 16-bit
            checkpoint can hold from one that did not move.
    """
    names = (*plan.trained, *plan.frozen)
    before, after = CheckpointReader(start, names), CheckpointReader(checkpoint, names)

    violations = tuple(name for name in plan.frozen if not _is_same(after.read(name), before.read(name)))
    still = [name for name in plan.trained if _is_same(after.read(name), before.read(name))]
    return Verification(
        num_frozen=len(plan.frozen),
        num_trained=len(plan.trained),
        violations=violations,
        unmoved=tuple(name for name in still if updates.get(name, 0.0) == 0.0),
        below_resolution=tuple(name for name in still if updates.get(name, 0.0) > 0.0),
    )


def verify_round(round_: Round) -> Verification:
    """`verify_checkpoint` for a finished round, from its files.

    Raises:
        InputError: one of the files is missing or damaged.
    """
    start = fetch_checkpoint(round_.read_spec().model.path)
    verification = verify_checkpoint(start, round_.checkpoint, round_.read_plan(), round_.read_result().updates)
    return verification.model_copy(update={"damaged": tuple(find_checkpoint_damage(round_.checkpoint))})


def find_changed_rows(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Numbers [R] of the rows whose bits differ in the data type of the new tensor; a vector changes as a whole."""
    if old.shape == new.shape and new.ndim > 1:
        return (_read_bits(new) != _read_bits(old.to(new.dtype))).flatten(1).any(1).nonzero().squeeze(1)
    return torch.arange(0 if _is_same(new, old) else len(new))


def _is_same(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether two tensors have the same bits in the data type of the new one."""
    return old.shape == new.shape and torch.equal(_read_bits(old.to(new.dtype)), _read_bits(new))


def _read_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: equal floats can differ in bits (0.0 and -0.0), and equal bits compare unequal (NaN)."""
    return tensor.detach().contiguous().view(torch.uint8)
