"""Models made out of the weights of other models: a delta over its base, the mean of two, the largest changes, Half-Reset.

Tensors are read, computed and written one at a time, so that a model of any size takes the memory of its largest parameter.
The files have the tensors of the tuned model's, under their names and in their data types, what is no parameter's among them,
split and ordered as `save_pretrained` does it.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from transformers.utils import CHAT_TEMPLATE_DIR

from hftcli import __version__
from hftcli.errors import InputError, ModelError
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.models.deltas import hash_checkpoint, identify_checkpoint
from hftcli.models.description import describe_model
from hftcli.models.reader import CheckpointReader, cast_tensors, list_forms
from hftcli.models.tensors import CODES, MAX_SHARD_SIZE, write_shards
from hftcli.runs.files import read_model, write_model
from hftcli.runs.history import HISTORY_NAME, History
from hftcli.runs.made import DELTA_NAME, MERGE_NAME, CheckpointIdentity, MergeManifest

Read = Callable[[str], dict[str, np.ndarray]]  # the bytes of a parameter's tensors, by its name


def merge_delta(delta: Path, output: Path, base: Path | None = None) -> MergeManifest:
    """Write the full folder of a delta checkpoint.

    Args:
        base: the delta's base, or one further down, where it is no longer at the place that the delta names.

    Raises:
        ModelError: `delta` is no delta, or a base is not the one that it was made on.
        InputError: there is something at `output`.
    """
    if not (delta / DELTA_NAME).exists():
        raise ModelError(f"{delta} is not a delta: it has no {DELTA_NAME}", "give a checkpoint of checkpoint.format: delta")
    with create_folder(output) as folder:
        reader = CheckpointReader(delta, _list_names(delta), base)
        direct = reader.stack.deltas[-2].folder if len(reader.stack.deltas) > 1 else reader.stack.root
        copy_configs(delta, folder)
        write_weights(reader, reader.read_tensors, folder)
        inputs = {"base": identify_checkpoint(direct), "delta": identify_checkpoint(delta)}
        return _write_manifest(folder, "delta", inputs)


def interpolate_models(base: Path, tuned: Path, weight: float, output: Path) -> MergeManifest:
    """Write (1 - weight) base + weight tuned, computed in float32 and rounded to the data types of the tuned model's tensors.

    At 0 and 1 the result has the bits of the one model (as these data types hold them) and of the other.

    Args:
        weight: share of the tuned model, in [0, 1]; arXiv 2109.01903 calls it alpha.

    Raises:
        ModelError: the two have other parameters.
        InputError: there is something at `output`.
    """

    def read(name: str) -> dict[str, np.ndarray]:
        if weight == 1:
            return second.read_tensors(name)
        old = first.read(name)
        values = old if weight == 0 else torch.lerp(old.float(), second.read(name).float(), weight)
        return cast_tensors(second.layout, name, values, second.dtypes)

    with create_folder(output) as folder:
        first, second = _open_pair(base, tuned)
        copy_configs(tuned, folder)
        forget_masters(folder)
        write_weights(second, read, folder)
        inputs = {"base": identify_checkpoint(base), "tuned": identify_checkpoint(tuned)}
        return _write_manifest(folder, "interpolation", inputs, weight=weight)


def sparsify_model(base: Path, tuned: Path, density: float, output: Path) -> MergeManifest:
    """Write a tuned model of which the largest changes are kept, and every other weight is the base's, bit for bit.

    It is diff pruning's projection by magnitude (arXiv 2012.07463) without its training: of all weights of the model together,
    those whose difference to the base is largest, computed in float32; of equal ones the former, in the order of the files.

    Args:
        density: share of all weights that may differ from the base, in [0, 1]. At 0 and 1 the result is the base and the tuned
            model, bit for bit.

    Raises:
        ModelError: the two have other parameters, or other data types.
        InputError: there is something at `output`.
    """
    num_kept = 0

    def read(name: str) -> dict[str, np.ndarray]:
        nonlocal num_kept, num_ties
        bits = measure_change(first, second, name)
        is_kept, is_tie = bits > threshold, (bits == threshold)
        is_kept |= is_tie & (is_tie.flatten().cumsum(0).view_as(is_tie) <= num_ties)
        num_ties = max(num_ties - int(is_tie.sum()), 0)
        num_kept += int((is_kept & (bits > 0)).sum())
        return cast_tensors(second.layout, name, torch.where(is_kept, second.read(name), first.read(name)), second.dtypes)

    with create_folder(output) as folder:
        first, second = _open_pair(base, tuned)
        _check_types(first, second)
        threshold, num_ties, num_weights = find_threshold(first, second, Fraction(str(density)))
        copy_configs(tuned, folder)
        forget_masters(folder)
        write_weights(second, read, folder)
        inputs = {"base": identify_checkpoint(base), "tuned": identify_checkpoint(tuned)}
        return _write_manifest(folder, "sparsification", inputs, density=density, num_kept=num_kept, num_weights=num_weights)


def measure_change(base: CheckpointReader, tuned: CheckpointReader, name: str) -> torch.Tensor:
    """How far each weight of a parameter moved, as the bits of float32, which order as the numbers do."""
    return (tuned.read(name).float() - base.read(name).float()).abs().view(torch.int32)


def find_threshold(base: CheckpointReader, tuned: CheckpointReader, density: Fraction) -> tuple[int, int, int]:
    """Which changes are among the largest: the bits above which all are, how many with these bits are too; and all weights.

    By counting, first by the upper half of the bits and then, where the border runs, by the lower half: no list of all changes
    is ever held.
    """
    upper, lower = torch.zeros(2**15, dtype=torch.int64), torch.zeros(2**16, dtype=torch.int64)
    for name in tuned.layout.places:
        upper += torch.bincount(measure_change(base, tuned, name).flatten() >> 16, minlength=len(upper))
    num_weights = int(upper.sum())
    place, left = _find_border(upper, int(density * num_weights + Fraction(1, 2)))
    for name in tuned.layout.places:
        bits = measure_change(base, tuned, name).flatten()
        lower += torch.bincount(bits[bits >> 16 == place] & 0xFFFF, minlength=len(lower))
    last, left = _find_border(lower, left)
    return (place << 16) + last, left, num_weights


def _find_border(counts: torch.Tensor, number: int) -> tuple[int, int]:
    """From the top down, the bin in which a number of things is reached, and how many of that bin it takes."""
    above = counts.flip(0).cumsum(0).flip(0)  # in each bin and all above it
    place = int((above >= number).nonzero().max())
    return place, number - int(above[place] - counts[place])


def reset_half(base: Path, tuned: Path, rule: FreezeRule, output: Path) -> MergeManifest:
    """Write a tuned model with one half back at its base, byte for byte: Half-Reset, section 2 of arXiv 2404.18466.

    Each tensor has the data type that it has in the model that it comes from.

    Args:
        rule: draws the half as for round 0: what the plan freezes goes back, what it trains stays as it was tuned.

    Raises:
        ModelError: the two have other parameters, or the family is not in the table.
        InputError: there is something at `output`, the rule does not go by whole matrices, or nothing that it takes back had
            moved.
    """
    if rule.divides:
        raise InputError(f"a reset takes whole matrices back, and freeze.grain is {rule.grain_name}", "drop it")
    if rule.rank != "random":
        raise InputError(f"a reset draws what goes back, and freeze.rank is {rule.rank}", "drop it")
    for key in rule.additions:
        raise InputError(f"a reset draws once what goes back, and {key} acts while a round trains, or at its end", "drop it")
    description = describe_model(str(tuned))
    plan = make_plan(assign_roles(description.model_type, description.parameters, rule.roles), rule, 0)
    reset = set(plan.frozen)

    moved: set[str] = set()

    def read(name: str) -> dict[str, np.ndarray]:
        now = second.read_tensors(name)
        if name not in reset:
            return now
        old = _move_tensors(first, second, name)
        if any(old[place].tobytes() != now[place].tobytes() for place in now):
            moved.add(name)
        return old

    with create_folder(output) as folder:
        first, second = _open_pair(base, tuned)
        dtypes = second.dtypes | {place: dtype for name in reset for place, dtype in _move_dtypes(first, second, name).items()}
        copy_configs(tuned, folder)
        forget_masters(folder)
        write_weights(second, read, folder, dtypes)
        if not moved:
            raise InputError(
                f"none of the {len(reset)} parameters that go back has moved: {tuned} froze just these, or is the base",
                f"draw another half: --set freeze.seed={rule.seed + 1}",
            )
        inputs = {"base": identify_checkpoint(base), "tuned": identify_checkpoint(tuned)}
        return _write_manifest(folder, "reset", inputs, plan=plan, num_moved=len(moved))


def _open_pair(base: Path, tuned: Path) -> tuple[CheckpointReader, CheckpointReader]:
    """Raises: ModelError: the two models have other parameters."""
    shapes = [{value.name: value.shape for value in describe_model(str(folder)).parameters} for folder in (base, tuned)]
    if odd := [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]:
        found = [shape.get(odd[0], "missing") for shape in shapes]
        raise ModelError(
            f"{base} and {tuned} are not two states of one model: {len(odd)} parameters differ, the first is {odd[0]}: "
            f"{found[0]} and {found[1]}",
            "give the model that the tuned one was tuned from",
        )
    names = tuple(shapes[0])
    readers = CheckpointReader(base, names), CheckpointReader(tuned, names)
    for reader in readers:
        reader.layout.check_copies()
    return readers


def _check_types(base: CheckpointReader, tuned: CheckpointReader) -> None:
    """Raises: ModelError: a parameter has other data types in the one model than in the other."""
    for name in tuned.layout.places:
        found = [{reader.dtypes[place] for place in reader.layout.places[name]} for reader in (base, tuned)]
        if found[0] != found[1]:
            old, new = (", ".join(sorted(dtypes)) for dtypes in found)
            raise ModelError(
                f"{name} is {old} in {base.stack.root} and {new} in the tuned model, so that no weight can go back bit for bit",
                "give the base in the tuned model's data type, or tune with model.dtype null",
            )


def _move_tensors(source: CheckpointReader, target: CheckpointReader, name: str) -> dict[str, np.ndarray]:
    """The bytes of a parameter's tensors in one model, by their names in the other's files, which may be of an older form."""
    found, places = source.read_tensors(name), target.layout.places[name]
    if found.keys() == set(places):
        return found
    if not source.layout.is_split(name) and not target.layout.is_split(name):
        return dict.fromkeys(places, next(iter(found.values())))
    return cast_tensors(target.layout, name, source.read(name), _move_dtypes(source, target, name))


def _move_dtypes(source: CheckpointReader, target: CheckpointReader, name: str) -> dict[str, str]:
    """The data types that go with them."""
    places = target.layout.places[name]
    found = {place: source.dtypes[place] for place in source.layout.places[name]}
    if found.keys() == set(places):
        return found
    dtypes = set(found.values())
    return dict.fromkeys(places, dtypes.pop() if len(dtypes) == 1 else CODES[torch.float32])


def _list_names(folder: Path) -> tuple[str, ...]:
    return tuple(parameter.name for parameter in describe_model(str(folder)).parameters)


@contextmanager
def create_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `output` when it is whole and removed when it fails.

    Raises:
        InputError: there is something at `output`.
    """
    if output.exists():
        raise InputError(f"--output {output} is already there", "give a name that is free; nothing is written over")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.hft-{uuid4().hex[:8]}")  # not tempfile's, which nobody else may read
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def copy_configs(source: Path, target: Path) -> None:
    """What a checkpoint's folder holds besides weights: configs, tokenizer, chat templates."""
    for file in sorted(source.iterdir()):
        is_about_weights = file.name in (DELTA_NAME, MERGE_NAME) or file.name.endswith(".index.json")
        if file.suffix in (".json", ".model", ".jinja", ".txt") and not is_about_weights:
            shutil.copyfile(file, target / file.name)
    if (source / CHAT_TEMPLATE_DIR).is_dir():  # the templates that have a name, such as tool_use
        shutil.copytree(source / CHAT_TEMPLATE_DIR, target / CHAT_TEMPLATE_DIR)


def forget_masters(folder: Path) -> None:
    """Take out of a checkpoint's history the masters of another one's weights."""
    path = folder / HISTORY_NAME
    if path.exists():
        write_model(path, read_model(path, History).model_copy(update={"masters": None}))


def write_weights(
    like: CheckpointReader,
    read: Read,
    folder: Path,
    dtypes: dict[str, str] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a model's weights without ever holding more than one of them.

    Args:
        like: a checkpoint in the layout that is written; its tensors that are no parameter's come along.
        read: gives the bytes of a parameter's tensors.
        dtypes: of the tensors; None takes those of `like`.
        max_shard_size: bytes of a file, as huggingface_hub writes sizes.
    """
    parameters = (read(name) for name in like.layout.places)
    extras = ({place: like.read_extra(place)} for place in like.layout.extras)
    forms = list_forms(like, dtypes or like.dtypes)
    write_shards(folder, forms, chain(parameters, extras), like.layout.num_parameters, max_shard_size)


def _write_manifest(
    folder: Path,
    kind: str,
    inputs: dict[str, CheckpointIdentity],
    **made: Any,
) -> MergeManifest:
    manifest = MergeManifest(
        kind=kind,
        command=tuple(sys.argv),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hft_version=__version__,
        inputs=inputs,
        files=hash_checkpoint(folder),
        **made,
    )
    write_model(folder / MERGE_NAME, manifest)
    return manifest
