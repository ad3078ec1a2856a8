"""In bfloat16, on any device: float32 masters for what trains, and the memory that was planned."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hftcli import PACKAGE
from hftcli.runs.run import Round


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


@pytest.mark.slow
def test_ranks_sum_their_gradients_in_float32_as_one_process_does(hft, settings, small, tmp_path):
    """A step of AdamW with an epsilon that drowns its second moment is the gradient itself, summed over 64 micro-batches.

    With its optimizer on the host, one process computes in bfloat16 as DeepSpeed's ranks do, and sums in float32.
    """
    change = {
        "train.bf16": True, "model.dtype": "bfloat16", "train.max_steps": 1, "train.warmup_steps": 0,
        "train.learning_rate": 1000, "train.adam_epsilon": 1000, "train.max_grad_norm": 1e6, "train.global_batch_size": 64,
        "train.per_device_train_batch_size": 1, "eval.tasks": "[]",
    }  # fmt: skip
    ways = {"one": {"launch.offload": "optimizer"}}
    ways |= {f"stage {stage}": {"launch.num_processes": 2, "launch.zero_stage": stage} for stage in (1, 2, 3)}
    masters = {}
    for name, way in ways.items():
        hft("sft", "--output", tmp_path / name, *settings(small | change | way))
        masters[name] = load_file(Round(tmp_path / name / "rounds" / "00-sft").masters_path)
    start = load_file(Path(small["model.path"]) / "model.safetensors")
    one = {name: values - start[name].bfloat16().float() for name, values in masters.pop("one").items()}
    for found in masters.values():
        distance = sum((found[name] - start[name].bfloat16().float() - one[name]).square().sum() for name in one)
        # Summed in bfloat16, it is half a per cent and more.
        assert (distance / sum(update.square().sum() for update in one.values())).sqrt() < 1e-5


@pytest.mark.parametrize("asked", ["null", "true"])
def test_true_acts_on_every_device_and_null_leaves_it_to_the_device(hft, settings, tmp_path, asked):
    change = {"train.bf16": asked, "train.max_steps": 1, "train.global_batch_size": 2, "eval.tasks": "[]"}
    hft("sft", "--output", tmp_path / "run", *settings(change | {"train.per_device_train_batch_size": 2}))
    is_faster = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    is_faster |= not torch.cuda.is_available() and torch.cpu.get_capabilities().get("amx_bf16", False)
    expected = "bfloat16" if asked == "true" or is_faster else "float32"
    assert Round(tmp_path / "run" / "rounds" / "00-sft").read_result().precision == expected


@pytest.mark.slow
def test_deepspeed_may_not_round_what_an_adapter_is_merged_into(hft, settings, tmp_path):
    change = {
        "train.bf16": "true", "train.per_device_train_batch_size": 16, "model.dtype": "float32", "method.lora": "{}",
    }  # fmt: skip
    error = hft("sft", "--output", tmp_path / "run", "--num-processes", 2, *settings(change), code=2).stderr
    assert "DeepSpeed in bfloat16 holds it rounded: an adapter would be merged into other weights" in error
    assert "model.dtype: bfloat16" in error
