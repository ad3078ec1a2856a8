"""A checkpoint's tensors as its files have them, read by nothing but this; and starts with tensors of several data types."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RawTensor = tuple[str, tuple[int, ...], bytes]  # data type, shape, bytes


def read_raw(folder: Path, pattern: str = "*.safetensors") -> dict[str, RawTensor]:
    """Every tensor of a folder's files by name."""
    found = {}
    for file in sorted(folder.glob(pattern)):
        whole = file.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        for name, entry in json.loads(whole[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], tuple(entry["shape"]), whole[begin:end])
    return found


def find_place(file: Path, name: str) -> int:
    """Where a tensor's bytes begin in its file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return 8 + length + json.loads(stream.read(length))[name]["data_offsets"][0]


def flip_bit(file: Path, name: str) -> None:
    """Change the lowest bit of a tensor's first byte."""
    place = find_place(file, name)
    with file.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def mix_types(folder: Path) -> None:
    """Give the tensors of a checkpoint bfloat16, float32 and float16 by turns, with values that no other of these holds."""
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(1)
    weights = load_file(file)
    turns = (torch.bfloat16, torch.float32, torch.float16)
    for index, (name, values) in enumerate(sorted(weights.items())):
        fine = values.float() + 0.01 * torch.rand(values.shape, generator=generator)
        weights[name] = fine.to(turns[index % 3]) if values.is_floating_point() else values
    save_file(weights, file, {"format": "pt"})
