"""Models made out of the weights of other models: a delta laid over its base, the mean of two models, Half-Reset.

Tensors are read, computed and written one at a time, so that a model of any size takes the memory of its largest tensor; only
families whose files have another layout than their modules are read whole, by transformers. The files are those that
`save_pretrained` writes, to the byte: same layout, same shards, same index.
"""

import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from hftcli import __version__
from hftcli.errors import InputError, ModelError
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezePlan, FreezeRule, make_plan
from hftcli.models.deltas import hash_checkpoint, identify_checkpoint
from hftcli.models.description import SAFETENSORS_DTYPES, describe_model
from hftcli.models.proof import CheckpointReader
from hftcli.runs.files import write_model
from hftcli.runs.records import DELTA_NAME, MERGE_NAME, CheckpointIdentity, MergeManifest

MAX_SHARD_SIZE = "50GB"  # transformers' own
DTYPE_NAMES = {getattr(torch, name): code for code, name in SAFETENSORS_DTYPES.items()}

Read = Callable[[str], torch.Tensor]  # a parameter's values by its name


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
        write_weights(reader, reader.read, folder)
        inputs = {"base": identify_checkpoint(direct), "delta": identify_checkpoint(delta)}
        return _write_manifest(folder, "delta", inputs)


def interpolate_models(base: Path, tuned: Path, weight: float, output: Path) -> MergeManifest:
    """Write (1 - weight) base + weight tuned, computed in float32 and rounded to the tuned model's data type.

    At 0 and 1 the result has the bits of the one model (as that data type holds them) and of the other.

    Args:
        weight: share of the tuned model, in [0, 1]; arXiv 2109.01903 calls it alpha.

    Raises:
        ModelError: the two have other parameters.
        InputError: there is something at `output`.
    """

    def read(name: str) -> torch.Tensor:
        values = second.read(name)
        if weight == 1:
            return values
        if weight == 0:
            return first.read(name).to(values.dtype)
        return torch.lerp(first.read(name).float(), values.float(), weight).to(values.dtype)

    with create_folder(output) as folder:
        first, second = _open_pair(base, tuned)
        copy_configs(tuned, folder)
        write_weights(second, read, folder)
        inputs = {"base": identify_checkpoint(base), "tuned": identify_checkpoint(tuned)}
        return _write_manifest(folder, "interpolation", inputs, weight=weight)


def reset_half(base: Path, tuned: Path, rule: FreezeRule, output: Path) -> MergeManifest:
    """Write a tuned model with one half back at its base: Half-Reset, section 2 of arXiv 2404.18466.

    Args:
        rule: draws the half as for round 0: what the plan freezes goes back, what it trains stays as it was tuned.

    Raises:
        ModelError: the two have other parameters, or the family is not in the table.
        InputError: there is something at `output`.
    """
    description = describe_model(str(tuned))
    plan = make_plan(assign_roles(description.model_type, description.parameters), rule, 0)
    reset = set(plan.frozen)

    def read(name: str) -> torch.Tensor:
        values = second.read(name)
        return first.read(name).to(values.dtype) if name in reset else values

    with create_folder(output) as folder:
        first, second = _open_pair(base, tuned)
        copy_configs(tuned, folder)
        write_weights(second, read, folder)
        inputs = {"base": identify_checkpoint(base), "tuned": identify_checkpoint(tuned)}
        return _write_manifest(folder, "reset", inputs, plan=plan)


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
    return CheckpointReader(base, names), CheckpointReader(tuned, names)


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
    temporary = output.with_name(f".{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def copy_configs(source: Path, target: Path) -> None:
    """What a checkpoint's folder holds besides weights: configs, tokenizer, chat template."""
    for file in sorted(source.iterdir()):
        is_about_weights = file.name in (DELTA_NAME, MERGE_NAME) or file.name.endswith(".index.json")
        if file.suffix in (".json", ".model", ".jinja", ".txt") and not is_about_weights:
            shutil.copyfile(file, target / file.name)


def write_weights(like: CheckpointReader, read: Read, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write a model's weights as `save_pretrained` does, without ever holding more than one of them.

    Args:
        like: a checkpoint with the same parameters, shapes and data types; the layout of its files is kept.
        read: gives the values.
        max_shard_size: bytes of a file, as huggingface_hub writes sizes.
    """
    config = AutoConfig.from_pretrained(like.stack.folder)
    model = AutoModelForCausalLM.from_pretrained(like.stack.root, config=config, device_map="meta")
    described = {name: torch.empty_like(like.read(name), device="meta") for name, _ in model.named_parameters()}
    stored = revert_weight_conversion(model, described)
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with ExitStack() as streams:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for file, names in split.filename_to_tensors.items():
            stream = streams.enter_context((folder / file).open("wb"))
            offsets = write_header(stream, {name: stored[name] for name in names})
            places |= {name: (stream, offset) for name, offset in offsets.items()}
        for name in described:
            for stored_name, values in revert_weight_conversion(model, {name: read(name)}).items():
                stream, offset = places.pop(stored_name)
                stream.seek(offset)
                stream.write(values.contiguous().view(-1).view(torch.uint8).numpy())
    if places:
        raise ModelError(
            f"{like.stack.folder}: {min(places)} is made of several parameters in the files, which hft cannot write"
        )
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_header(stream: BinaryIO, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write the start of a safetensors file: eight bytes with the header's length, and the header.

    As the library has it: wider data types first, then by name, so that every tensor is aligned; padded to eight bytes.

    Returns:
        The place of each tensor's bytes in the file.
    """
    order = sorted(tensors, key=lambda name: (-ORDER.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in order:
        begins[name], end = end, end + tensors[name].nbytes
        dtype, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}


# The library's order of data types, narrower first.
ORDER = (torch.float16, torch.bfloat16, torch.float32)


def _write_manifest(
    folder: Path,
    kind: str,
    inputs: dict[str, CheckpointIdentity],
    weight: float | None = None,
    plan: FreezePlan | None = None,
) -> MergeManifest:
    manifest = MergeManifest(
        kind=kind,
        command=tuple(sys.argv),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hft_version=__version__,
        inputs=inputs,
        weight=weight,
        plan=plan,
        files=hash_checkpoint(folder),
    )
    write_model(folder / MERGE_NAME, manifest)
    return manifest
