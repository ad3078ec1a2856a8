"""Where a process computes."""

import json

import pytest
import torch

from hftcli.data.prepare import deal_rows
from hftcli.models.device import count_batch_tokens, find_device, is_mixed, name_precision
from hftcli.recipe.loading import load_recipe
from hftcli.runs.spec import RoundSpec


@pytest.mark.skipif(torch.cuda.is_available(), reason="the NVIDIA GPU comes first")
def test_the_gpu_of_a_mac_serves_one_process_that_does_not_hide_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [find_device(num_ranks).type for num_ranks in (None, 1, 2)] == ["mps", "mps", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device(1).type == "cpu"


def make_spec(bf16: bool | None, version: int = 3) -> RoundSpec:
    recipe = load_recipe(None, [f"train.bf16={json.dumps(bf16)}"])
    return RoundSpec(
        version=version, objective="sft", index=0, model=recipe.model, data=recipe.data, freeze=recipe.freeze,
        train=recipe.train, launch=recipe.launch,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "processor", "is_faster"),
    [
        (None, {"amx_bf16": True, "avx512_bf16": True}, True),
        (None, {"amx_bf16": False, "avx512_bf16": True}, False),
        (None, {}, False),
        (True, {}, True),
        (False, {"amx_bf16": True}, False),
    ],
    ids=["AMX", "AVX-512 alone", "another processor", "GPU with bfloat16", "GPU without"],
)
def test_null_alone_leaves_bfloat16_to_the_device(monkeypatch, gpu, processor, is_faster):
    """As an earlier form's true does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    # A GPU that only imitates bfloat16 says that it supports it, unless it is asked not to count that.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert [is_mixed(make_spec(asked)) for asked in (None, True, False)] == [is_faster, True, False]
    assert [is_mixed(make_spec(asked, version=2)) for asked in (True, False)] == [is_faster, False]
    assert name_precision(make_spec(None)) == ("bfloat16" if is_faster else "float32")


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_what_is_read_at_once_stays_in_a_processors_cache_and_fills_a_gpu(kind):
    """Rows of 64 tokens, each padded to 64: so many are in a batch."""
    num_tokens = count_batch_tokens(torch.device(kind))
    assert [len(batch) for batch in deal_rows([64] * 256, num_tokens, 1)] == ([8] * 32 if kind == "cpu" else [128] * 2)
