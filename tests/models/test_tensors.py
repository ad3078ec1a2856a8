"""Safetensors files to the byte: written as the library writes them, and read as transformers chooses them."""

import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hftcli import PACKAGE
from hftcli.errors import ModelError
from hftcli.models.proof import is_same
from hftcli.models.tensors import get_bytes, list_tensors, write_tensors

TENSORS = {
    "b": torch.ones(3, 5, dtype=torch.bfloat16), "a": torch.ones(2), "é": torch.ones(1, dtype=torch.float16),
    "c": torch.tensor(1.0), "d": torch.ones(2, dtype=torch.bfloat16), "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool),
    "rows": torch.arange(3, dtype=torch.int32), "places": torch.arange(3), "bytes": torch.arange(3, dtype=torch.uint8),
    "empty": torch.ones(0, 4), "wide": torch.ones(2, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_the_library_s_own_to_the_byte_with_data_types_mixed(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "theirs", metadata)
    write_tensors(tmp_path / "ours", TENSORS, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "file", TENSORS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_no_file_is_written_by_what_makes_it_readable_by_its_owner_alone():
    """The library's own writer does, and so does a temporary file; a folder for a moment is nobody else's anyway."""
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(sources) > 100
    for path, source in sources.items():
        assert not re.search(r"\bsave_file\b|\btempfile\.(?!TemporaryDirectory)|\bmkstemp\b|0o[67]00", source), path


@pytest.fixture
def sharded(tmp_path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


def test_the_files_are_those_that_transformers_loads(sharded):
    """What lies beside them, such as the weights in another program's form, is none of the model's."""
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, sharded / "consolidated.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    found = list_tensors(sharded)
    assert found.keys() == loaded.keys()
    assert all(torch.equal(stored.read(), loaded[name]) for name, stored in found.items())
    assert all(np.array_equal(stored.read_bytes(), get_bytes(loaded[name])) for name, stored in found.items())
    save_file(dict(loaded), sharded / "model.safetensors", {"format": "pt"})
    assert {stored.file.name for stored in list_tensors(sharded).values()} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder, shard: shard.unlink(), r"lacks model-0000\d-of-0000\d.safetensors, which model.safetensors.index.json"),
        (lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-1]), "is damaged: it has"),
        (lambda folder, shard: drop_one(shard), "lacks 1 tensors that model.safetensors.index.json names"),
        (lambda folder, shard: (folder / "model.safetensors.index.json").write_text("{}"), "is damaged: it has no weight_map"),
        (lambda folder, shard: (folder / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
    ],
)
def test_shards_that_are_not_whole_are_named(sharded, harm, message):
    harm(sharded, min(sharded.glob("model-*.safetensors")))
    with pytest.raises(ModelError, match=message):
        list_tensors(sharded)


def drop_one(shard: Path) -> None:
    save_file(dict(list(load_file(shard).items())[1:]), shard, {"format": "pt"})


def make_values() -> torch.Tensor:
    """Every float16 and bfloat16, halves between neighbours, and random bits."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = [bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()]
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    halves = (random & -65536 | 0x8000).view(torch.float32)
    return torch.cat([*every, random.view(torch.float32), halves, 1e-7 * torch.rand(10_000, generator=generator)])


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_conversion_is_checked_by_the_bits(source, target):
    """Computed twice, by torch and without it: the same for every value, and one bit more or less is seen."""
    codes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    old = make_values().to(source)
    new = old.float().to(target)
    assert is_same(get_bytes(old), codes[source], get_bytes(new), codes[target])
    place = int((~old.isnan() & ~new.isnan()).nonzero()[100])
    harmed = get_bytes(new).copy()
    harmed[place * new.itemsize] ^= 1
    assert not is_same(get_bytes(old), codes[source], harmed, codes[target])


def test_the_header_is_the_size_that_it_says(tmp_path):
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    whole = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert length % 8 == 0
    assert json.loads(whole[8 : 8 + length])["a"]["dtype"] == "F32"
