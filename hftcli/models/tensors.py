"""Safetensors files to the byte: which tensors they hold, of which data type, and where; read and written without a conversion.

A data type goes by the name that the files give it: F32, BF16, F16, BOOL, ...
"""

import json
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from hftcli.errors import ModelError

FILE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "50GB"  # transformers' own
CHUNK_BYTES = 1 << 24  # compared at once

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
# The library's order of data types, narrower first: a file has its wider tensors before the others, so that all are aligned.
ORDER = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",
    "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip

Form = tuple[str, tuple[int, ...], int]  # data type, shape and number of bytes of a tensor in a file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it, its values unread.

    Attributes:
        dtype: the file's name of its data type.
        begin: place of its first byte in the file.
        num_bytes: how many bytes from there are its own.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    num_bytes: int

    @property
    def form(self) -> Form:
        """All of it but its place and its values."""
        return self.dtype, self.shape, self.num_bytes

    def read(self) -> torch.Tensor:
        """The tensor, in the data type of the file."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)

    def read_bytes(self) -> np.ndarray:
        """The tensor's bytes, mapped from the disk."""
        if not self.num_bytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", self.begin, (self.num_bytes,))


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What transformers loads of a full checkpoint, by name: of `model.safetensors`, or of the files that the index names.

    Raises:
        ModelError: neither is there, or a file is missing or damaged.
    """
    if (folder / FILE_NAME).exists():
        return list_file(folder / FILE_NAME)
    try:
        weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has neither {FILE_NAME} nor {INDEX_NAME}", "save it with transformers' save_pretrained"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{folder / INDEX_NAME} is damaged: it has no weight_map") from None
    files = [folder / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX_NAME} names", "fetch the checkpoint again")
    found = {name: stored for file in files for name, stored in list_file(file).items()}
    if lost := sorted(set(weight_map) - set(found)):
        raise ModelError(f"{folder} lacks {len(lost)} tensors that {INDEX_NAME} names, the first is {lost[0]}")
    return found


def list_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        ModelError: it is not safetensors, or is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (struct.error, ValueError, MemoryError):
        raise ModelError(f"{file} is damaged: its header does not read") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != expected:
        raise ModelError(f"{file} is damaged: it has {file.stat().st_size:,} bytes, and its header says {expected:,}")
    return {
        name: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def get_form(tensor: torch.Tensor) -> Form:
    """What a tensor is in a file."""
    return CODES[tensor.dtype], tuple(tensor.shape), tensor.nbytes


def get_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes: equal floats can differ in them (0.0 and -0.0), and equal bytes compare unequal as floats (NaN)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def has_same_bytes(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether bytes are the same, read a chunk at a time."""
    starts = range(0, len(one), CHUNK_BYTES)
    return len(one) == len(two) and all(
        np.array_equal(one[start : start + CHUNK_BYTES], two[start : start + CHUNK_BYTES]) for start in starts
    )


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file as the library does, to the byte, but readable by whom the user's umask lets read, which its 0600 is not."""
    with file.open("wb") as stream:
        places = write_header(stream, {name: get_form(tensor) for name, tensor in tensors.items()}, metadata)
        for name, place in places.items():
            stream.seek(place)
            stream.write(get_bytes(tensors[name]).data)


def write_shards(
    folder: Path,
    forms: Mapping[str, Form],
    groups: Iterable[Mapping[str, np.ndarray]],
    num_parameters: int,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a model's files as `save_pretrained` splits and orders them, without ever holding more than one group of tensors.

    Args:
        forms: of every tensor.
        groups: the tensors' bytes by name, each tensor once.
        num_parameters: what the index says of the model.
        max_shard_size: bytes of a file, as huggingface_hub writes sizes.
    """
    sizes = {name: torch.empty(num_bytes, dtype=torch.uint8, device="meta") for name, (_, _, num_bytes) in forms.items()}
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with ExitStack() as streams:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for file, names in split.filename_to_tensors.items():
            stream = streams.enter_context((folder / file).open("wb"))
            begins = write_header(stream, {name: forms[name] for name in names}, {"format": "pt"})
            places |= {name: (stream, begin) for name, begin in begins.items()}
        for group in groups:
            for name, content in group.items():
                opened, begin = places.pop(name)
                opened.seek(begin)
                opened.write(content.data)
    if places:
        raise RuntimeError(f"{folder}: {min(places)} was not written")
    if split.is_sharded:
        metadata = {"total_parameters": num_parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_header(stream: BinaryIO, forms: Mapping[str, Form], metadata: Mapping[str, str] | None = None) -> dict[str, int]:
    """Write the start of a safetensors file: eight bytes with the header's length, and the header, padded to eight bytes.

    Returns:
        The place of each tensor's bytes in the file, in the file's order.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    place = {dtype: -place for place, dtype in enumerate(ORDER)}
    for name in sorted(forms, key=lambda name: (place.get(forms[name][0], 1), name)):  # a type that is not known comes last
        dtype, shape, num_bytes = forms[name]
        begins[name], end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}
