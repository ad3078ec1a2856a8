"""Where the device has bfloat16: compute in it, float32 masters for what trains, and the memory that was planned."""

import pytest
import torch
from safetensors.torch import load_file

from hftcli import PACKAGE
from hftcli.models.device import has_bfloat16
from hftcli.runs.run import Round

pytestmark = pytest.mark.skipif(not has_bfloat16(), reason="neither a GPU nor this processor has bfloat16")


@pytest.mark.parametrize(
    ("share", "dtype"),
    [
        pytest.param(0.5, "bfloat16", marks=pytest.mark.slow),
        (0.5, "float32"),
        pytest.param(1.0, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_round_in_bfloat16_keeps_the_frozen_half_and_moves_the_other(hft, settings, tmp_path, share, dtype):
    change = {
        "train.bf16": "true",
        "train.max_steps": 5,
        "eval.tasks": "[]",
        "model.dtype": dtype,
        "freeze.trainable_fraction": share,
    }
    hft("sft", "--output", tmp_path / "run", *settings(change))
    result = Round(tmp_path / "run" / "rounds" / "00-sft").read_result()
    assert result.precision == "bfloat16"
    assert result.verification.passed
    assert all(update > 0 for update in result.updates.values())
    plan = Round(tmp_path / "run" / "rounds" / "00-sft").read_plan()
    assert result.gradient_bytes == 4 * plan.num_trainable
    assert result.optimizer_bytes == 8 * plan.num_trainable


@pytest.mark.slow
def test_deepspeed_may_hold_a_float32_start_in_bfloat16_and_rounds_none_of_it_in_the_file(hft, settings, tmp_path):
    change = {
        "train.bf16": "true", "train.per_device_train_batch_size": 16, "model.dtype": "float32", "train.max_steps": 3,
        "eval.tasks": "[]",
    }  # fmt: skip
    hft("sft", "--output", tmp_path / "run", "--num-processes", 2, *settings(change))
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    before, after = (load_file(folder / "model.safetensors") for folder in (PACKAGE / "tinyworld" / "model", round_.checkpoint))
    for name in round_.read_plan().frozen:
        assert after[name].dtype == torch.float32
        assert torch.equal(before[name].float(), after[name])
    assert round_.read_result().verification.passed


def test_deepspeed_may_not_round_what_an_adapter_is_merged_into(hft, settings, tmp_path):
    change = {
        "train.bf16": "true", "train.per_device_train_batch_size": 16, "model.dtype": "float32", "method.lora": "{}",
    }  # fmt: skip
    error = hft("sft", "--output", tmp_path / "run", "--num-processes", 2, *settings(change), code=2).stderr
    assert "DeepSpeed in bfloat16 holds it rounded: an adapter would be merged into other weights" in error
    assert "model.dtype: bfloat16" in error
