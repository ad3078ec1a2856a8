"""What moved: a round's checkpoint compared with its start, by the bytes and the data types that the files have.

Nothing is converted for the comparison, with one exception that is said: where `model.dtype` asks for another data type than
the start stores, the start counts as converted once, and what that gives is computed here by the bits, without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hftcli.errors import ModelError
from hftcli.freezing.selection import FreezePlan
from hftcli.models.closure import EPSILONS, Leak, measure_leak
from hftcli.models.description import fetch_checkpoint
from hftcli.models.division import read_bases
from hftcli.models.masters import RoundingLoss, open_masters
from hftcli.models.narrow_adapter import find_rankless, find_reading
from hftcli.models.reader import CheckpointReader, Start, convert
from hftcli.models.tensors import CHUNK_BYTES, get_bytes, has_same_bytes
from hftcli.runs.run import Round, find_checkpoint_damage
from hftcli.runs.seals import seal_file
from hftcli.runs.verification import Verification

WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def measure_updates(masters: Mapping[str, torch.Tensor], start: Start) -> RoundingLoss:
    """How far each trained parameter moved, and what of that the checkpoint's data types drop."""
    loss = RoundingLoss({}, {})
    for name, values in masters.items():
        loss.add(name, start.read_master(name), start.read(name), values, start.round(name, values))
    return loss


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints to be compared.

    Attributes:
        expected: by tensor of the start's files, the data type that it should have.
        places: by tensor of the start's files, its name in the checkpoint's; None where they lack it.
    """

    before: CheckpointReader
    after: CheckpointReader
    expected: dict[str, str]
    places: dict[str, str | None]

    def find_changed(self, names: tuple[str, ...]) -> list[str]:
        """Parameters of which a tensor has other bytes than the start's, or another data type than it should."""
        return [name for name in names if not self._is_same(self.before.read_tensors(name), self.after.read_tensors(name))]

    def find_changed_extras(self) -> list[str]:
        """Tensors that are no parameter's and have other bytes, or another data type."""
        kept = [place for place in self.before.layout.extras if self.places[place] is not None]
        return [
            place
            for place in kept
            if not self._is_same({place: self.before.read_extra(place)}, {place: self.after.read_extra(place)})
        ]

    def find_retyped(self) -> list[str]:
        """Tensors that are in another data type than they should be, and in which."""
        found = {place: self.after.dtypes[other] for place, other in self.places.items() if other is not None}
        return [
            f"{place} ({dtype}, not {self.expected[place]})" for place, dtype in found.items() if dtype != self.expected[place]
        ]

    def _is_same(self, old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> bool:
        for place, content in old.items():
            other = self.places[place]
            if other is None:
                continue  # lost, which is said elsewhere
            held, expected = self.before.dtypes[place], self.expected[place]
            if self.after.dtypes[other] != expected or not is_same(content, held, new[other], expected):
                return False
        return True


def verify_checkpoint(
    start: Path,
    checkpoint: Path,
    plan: FreezePlan,
    updates: Mapping[str, float],
    dtype: str | None = None,
    moved_in_memory: tuple[str, ...] = (),
    bases: Path | None = None,
    adapter: Path | None = None,
    entries: Path | None = None,
) -> Verification:
    """Compare a round's checkpoint with its start, bit for bit: frozen parameters are the same, trained ones are not.

    Args:
        updates: largest change of each trained parameter in float32; tells a tensor that moved by less than a 16-bit
            checkpoint can hold from one that did not move.
        dtype: `model.dtype`: the start counts as converted to it.
        moved_in_memory: what was found when training ended.
        bases: the file with the plan's directions, where it has some.
        adapter: the folder with the adapters that trained in place of the weights, where there are some.
        entries: the file with the entries that trained at the end, where these changed.
    """
    names = (*plan.trained, *plan.frozen)
    before, after = CheckpointReader(start, names), CheckpointReader(checkpoint, names)
    converted = dict.fromkeys(before.layout.owners, STORED_AS[dtype]) if dtype else {}
    compared = Comparison(before, after, before.dtypes | converted, pair_places(before, after))
    moved = set(compared.find_changed(plan.trained))
    still = [name for name in plan.trained if name not in moved]
    num_masters, unlike_masters = compare_masters(after, checkpoint)
    chosen = read_choices(plan, bases, entries) if plan.parts and bases is not None else {}
    leaks = find_leaks(compared, plan, chosen)
    reading = find_reading(adapter, plan.directions, chosen) if adapter is not None and plan.directions else {}
    rankless = find_rankless(adapter) if adapter is not None and still else set()
    return Verification(
        num_frozen=len(plan.frozen),
        num_trained=len(plan.trained),
        num_extras=len(before.layout.extras),
        violations=tuple(compared.find_changed(plan.frozen)),
        changed_extras=tuple(compared.find_changed_extras()),
        retyped=tuple(compared.find_retyped()),
        lost=tuple(place for place, other in compared.places.items() if other is None),
        moved_in_memory=moved_in_memory,
        unmoved=tuple(name for name in still if updates.get(name, 0.0) == 0.0 and name not in rankless),
        rankless=tuple(sorted(rankless)),
        below_resolution=tuple(name for name in still if updates.get(name, 0.0) > 0.0),
        closed_change={name: leak.fraction for name, leak in leaks.items()},
        closed_reading={name: leak.fraction for name, leak in reading.items()},
        leaked=tuple(
            f"{name} ({leak.num_rows} rows, {leak.num_weights} weights)"
            for name, leak in (leaks | reading).items()
            if not leak.is_rounding
        ),
        **compare_columns(compared, plan, chosen),
        **compare_entries(compared, plan, chosen),
        converted_to=dtype if compared.expected != before.dtypes else None,
        num_masters=num_masters,
        unlike_masters=unlike_masters,
    )


def compare_masters(after: CheckpointReader, checkpoint: Path) -> tuple[int, tuple[str, ...]]:
    """How many float32 masters lie beside a checkpoint, and which of its parameters are not their rounding, bit for bit."""
    masters = open_masters(checkpoint).tensors
    unlike = []
    for name, master in masters.items():
        parts = after.layout.split(name, master.read())
        held = after.read_tensors(name)
        if not all(is_same(get_bytes(part), "F32", held[place], after.dtypes[place]) for place, part in parts.items()):
            unlike.append(name)
    return len(masters), tuple(unlike)


def verify_round(round_: Round) -> Verification:
    """`verify_checkpoint` for a finished round, from its files; where these are damaged and cannot be compared, their damage.

    Raises:
        InputError: another of the files is missing or damaged.
    """
    spec, result, plan = round_.read_spec(), round_.read_result(), round_.read_plan()
    damaged = tuple(find_checkpoint_damage(round_.checkpoint))
    damaged_parts = tuple(find_part_damage(round_, plan, result.entries))
    nothing = Verification(
        num_frozen=0, num_trained=0, violations=(), unmoved=(), damaged=damaged, damaged_parts=damaged_parts,
        moved_in_memory=result.verification.moved_in_memory,
    )  # fmt: skip
    if damaged_parts:
        return nothing
    try:
        verification = verify_checkpoint(
            fetch_checkpoint(round_.find_start()), round_.checkpoint, plan, result.updates, spec.model.dtype,
            result.verification.moved_in_memory, round_.bases_path, round_.adapter if spec.method.adapter else None,
            round_.entries_path if result.entries else None,
        )  # fmt: skip
        unlike = (*verification.unlike_masters, *open_masters(round_.checkpoint).find_damage())
    except Exception:
        if damaged:  # which may raise anything
            return nothing
        raise
    return verification.model_copy(update={"damaged": damaged, "unlike_masters": unlike})


def find_part_damage(round_: Round, plan: FreezePlan, entries: str | None) -> list[str]:
    """What is wrong with the files of the parts in which matrices train, a line for each.

    Args:
        entries: hash of the file with the entries that trained at the end, where these changed.
    """
    damage = []
    for path, expected in ((round_.bases_path, plan.bases if plan.parts else None), (round_.entries_path, entries)):
        name = path.relative_to(round_.folder)
        if expected is not None and not path.exists():
            damage.append(f"{name} is missing")
        elif expected is not None and seal_file(path).sha256 != expected:
            damage.append(f"{name} has other bytes than were written")
    return damage


def read_choices(plan: FreezePlan, bases: Path, entries: Path | None = None) -> dict[str, torch.Tensor]:
    """The directions, columns or entries of a plan.

    Args:
        entries: see `verify_checkpoint`.

    Raises:
        ModelError: the file is missing, or is not that of the plan.
    """
    if not bases.exists() or seal_file(bases).sha256 != plan.bases:
        raise ModelError(
            f"{bases} does not hold the parts of matrices of plan {plan.short_fingerprint}: nothing can be said of "
            "what moved in the others",
            "restore the file",
        )
    return read_bases(entries or bases)


def find_leaks(compared: Comparison, plan: FreezePlan, chosen: Mapping[str, torch.Tensor]) -> dict[str, Leak]:
    """What of the change of every matrix that trains in directions lies in the closed ones."""
    found = {}
    for name, part in (plan.directions or {}).items():
        places = compared.before.layout.places[name]
        held, expected = compared.before.dtypes[places[0]], compared.expected[places[0]]
        before, after = (reader.read(name).double().numpy() for reader in (compared.before, compared.after))
        found[name] = measure_leak(before, after, chosen[part.choice].double().numpy(), _find_coarser(held, expected), expected)
    return found


def compare_columns(compared: Comparison, plan: FreezePlan, chosen: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """How many frozen columns there are in matrices that train in the others, and of which matrices some have other bits."""
    num_compared, moved = 0, []
    for name, part in (plan.columns or {}).items():
        closed = np.setdiff1d(np.arange(part.num_inputs), chosen[part.choice].numpy())
        num_compared += len(closed)
        place = compared.before.layout.places[name][0]
        held, expected = compared.before.dtypes[place], compared.expected[place]
        if compared.after.dtypes[compared.after.layout.places[name][0]] != expected:
            continue  # which is said elsewhere
        before, after = (reader.read(name) for reader in (compared.before, compared.after))

        def has_moved(columns: np.ndarray) -> bool:
            old, new = (get_bytes(values[:, columns]) for values in (before, after))  # noqa: B023  called here
            return not is_same(old, held, new, expected)  # noqa: B023

        if has_moved(closed):
            number = sum(has_moved(closed[place : place + 1]) for place in range(len(closed)))
            moved.append(f"{name} ({number} of {len(closed)} frozen columns)")
    return {"num_frozen_columns": num_compared, "moved_columns": tuple(moved)}


def compare_entries(compared: Comparison, plan: FreezePlan, chosen: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """How many frozen entries there are in matrices that train in others, and of which matrices some have other bits.

    Raises:
        ModelError: the file with the entries has others than the plan's number of them.
    """
    num_compared, moved = 0, []
    for name, part in (plan.entries or {}).items():
        is_closed = np.ones(part.num_outputs * part.num_inputs, dtype=bool)
        is_closed[chosen[part.choice].numpy()] = False
        num_closed = int(is_closed.sum())
        if num_closed != len(is_closed) - part.num_entries:
            raise ModelError(f"the file with the entries has {len(is_closed) - num_closed} of {name}, not {part.num_entries}")
        num_compared += num_closed
        place = compared.before.layout.places[name][0]
        held, expected = compared.before.dtypes[place], compared.expected[place]
        if compared.after.dtypes[compared.after.layout.places[name][0]] != expected:
            continue  # which is said elsewhere
        before, after = (
            get_bytes(reader.read(name)).reshape(len(is_closed), -1)[is_closed].ravel()
            for reader in (compared.before, compared.after)
        )
        if not is_same(before, held, after, expected):
            moved.append(f"{name} ({count_unlike(before, held, after, expected)} of {num_closed:,} frozen entries)")
    return {"num_frozen_entries": num_compared, "moved_entries": tuple(moved)}


def count_unlike(old: np.ndarray, old_dtype: str, new: np.ndarray, new_dtype: str) -> int:
    """How many numbers are not the old ones, bit for bit, once these are converted."""
    if old_dtype == new_dtype:
        shape = (-1, WIDTHS[old_dtype])
        return int((old.reshape(shape) != new.reshape(shape)).any(1).sum())
    values = widen(old, old_dtype)
    bits = narrow_to_bits(values, new_dtype)
    return int(((bits != new.view(bits.dtype)) & ~(np.isnan(values) & np.isnan(widen(new, new_dtype)))).sum())


def _find_coarser(held: str, expected: str) -> str:
    """Where a start counts as converted, by how much it may be another: as the data type with fewer places."""
    return max(held, expected, key=EPSILONS.__getitem__)


def pair_places(before: CheckpointReader, after: CheckpointReader) -> dict[str, str | None]:
    """By tensor of the start's files, its name in the checkpoint's; None where they lack it.

    A parameter that is one tensor may go by another name there, as transformers gives new ones to those of older forms.
    """
    pairs: dict[str, str | None] = {place: place if place in after.stored else None for place in before.stored}
    for name, places in before.layout.places.items():
        others = after.layout.places[name]
        if not before.layout.is_split(name) and not after.layout.is_split(name):
            pairs |= {place: others[0] for place in places if pairs[place] is None}
    return pairs


def is_same(old: np.ndarray, old_dtype: str, new: np.ndarray, new_dtype: str) -> bool:
    """Whether bytes are the same; where the data types differ, once the old ones are converted."""
    if old_dtype != new_dtype:
        return _is_converted(old, old_dtype, new, new_dtype)
    return has_same_bytes(old, new)


def _is_converted(old: np.ndarray, old_dtype: str, new: np.ndarray, new_dtype: str) -> bool:
    """Whether the new values are the old ones, rounded to nearest, ties to even; that a value is none (NaN) has many forms."""
    width, new_width = WIDTHS[old_dtype], WIDTHS[new_dtype]
    if len(old) // width != len(new) // new_width:
        return False
    for first in range(0, len(old) // width, CHUNK_BYTES):
        last = first + CHUNK_BYTES
        values = widen(old[first * width : last * width], old_dtype)
        expected_bits, found = narrow_to_bits(values, new_dtype), new[first * new_width : last * new_width]
        is_same_bits = expected_bits == found.view(expected_bits.dtype)
        if not np.all(is_same_bits | (np.isnan(values) & np.isnan(widen(found, new_dtype)))):
            return False
    return True


def widen(content: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a data type as float32."""
    if dtype == "BF16":
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return content.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def narrow_to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of float32 values in a data type, rounded to nearest, ties to even."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def find_changed_rows(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Numbers [R] of the rows whose bits differ in the data type of the new tensor; a vector changes as a whole."""
    old = convert(old, new.dtype)
    if old.shape == new.shape and new.ndim > 1:
        return (_view_bits(new) != _view_bits(old)).flatten(1).any(1).nonzero().squeeze(1)
    return torch.arange(0 if has_same_bits(new, old) else len(new))


def has_same_bits(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether two tensors are of one data type and shape and have the same bits."""
    return old.dtype == new.dtype and old.shape == new.shape and torch.equal(_view_bits(old), _view_bits(new))


def _view_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)
