"""`launch.offload: optimizer` from the command line: the same losses, nothing lost in a stop, refused where it cannot be."""

import math

import pytest
import torch
from end_to_end.running import assert_same
from safetensors.torch import load_file

from hftcli.runs.run import Round


def train(hft, settings, run, values) -> Round:
    hft("sft", "--output", run, *settings(values))
    return Round(run / "rounds" / "00-sft")


def read_losses(round_: Round) -> list[float]:
    return [row["loss"] for row in round_.read_metrics()]


@pytest.mark.parametrize("share", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_one_process_trains_as_without(hft, settings, small, tmp_path, share):
    """In float32, where the weights on the device are not rounded: two micro-batches a step, the gradient clipped."""
    values = small | {"train.bf16": "false", "train.per_device_train_batch_size": 4, "freeze.trainable_fraction": share}
    values |= {"train.max_grad_norm": 0.1}
    plain = train(hft, settings, tmp_path / "plain", values)
    offloaded = train(hft, settings, tmp_path / "offloaded", values | {"launch.offload": "optimizer"})
    assert read_losses(offloaded) == pytest.approx(read_losses(plain), abs=1e-6)
    norms = [[row["grad_norm"] for row in round_.read_metrics()] for round_ in (offloaded, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    one, other = (load_file(round_.checkpoint / "model.safetensors") for round_ in (offloaded, plain))
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=0, atol=1e-6)
    result = offloaded.read_result()
    num_trained = offloaded.read_plan().num_trainable
    assert (result.optimizer_bytes, result.gradient_bytes) == (8 * num_trained, 0)
    assert result.host_bytes == (16 + 4) * num_trained
    hft("verify", tmp_path / "offloaded")


@pytest.mark.parametrize("reference", ["full", "precompute"])
def test_the_reference_is_what_the_policy_starts_from(hft, settings, tmp_path, reference):
    """In bfloat16, of a start in float32: before the first step no answer is likelier than it was, to the last bit."""
    values = {"train.max_steps": 1, "train.global_batch_size": 4, "train.per_device_train_batch_size": 4, "eval.tasks": "[]"}
    values |= {"reference": reference, "eval.held_out.path": "null", "train.bf16": "true", "launch.offload": "optimizer"}
    values |= {"train.logging_steps": 1}
    hft("dpo", "--output", tmp_path / "run", *settings(values))
    assert read_losses(Round(tmp_path / "run" / "rounds" / "00-dpo")) == pytest.approx([math.log(2)], abs=1e-6)


@pytest.mark.slow
def test_pairs_train_as_without(hft, settings, tmp_path):
    """The shared reference is laid into the weights on the device, and the masters are not touched."""
    values = {"train.max_steps": 3, "train.global_batch_size": 4, "train.per_device_train_batch_size": 4, "eval.tasks": "[]"}
    values |= {"reference": "shared", "eval.held_out.path": "null", "train.logging_steps": 1, "train.bf16": "false"}
    found = []
    for offload in ("none", "optimizer"):
        hft("dpo", "--output", tmp_path / offload, *settings(values | {"launch.offload": offload}))
        found.append(read_losses(Round(tmp_path / offload / "rounds" / "00-dpo")))
    assert found[1] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.slow
def test_a_stop_loses_nothing(hft, settings, start, short, tmp_path):
    """In bfloat16: the masters come back, not their rounding."""
    values = short | {"launch.offload": "optimizer"}
    undisturbed = train(hft, settings, tmp_path / "undisturbed", values)
    running = start(tmp_path / "run", values)
    running.wait_for("training", 6)
    running.front.terminate()
    running.end(75)
    running = start(tmp_path / "run", values)
    running.end(0)
    assert running.round.read_result().resumed_from is not None
    assert_same(running.round, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_under_deepspeed_train_as_without(hft, settings, small, tmp_path, stage):
    values = small | {"train.bf16": "false", "launch.num_processes": 2, "launch.zero_stage": stage}
    values |= {"train.per_device_train_batch_size": 2}
    plain = train(hft, settings, tmp_path / "plain", values)
    offloaded = train(hft, settings, tmp_path / "offloaded", values | {"launch.offload": "optimizer"})
    assert read_losses(offloaded) == pytest.approx(read_losses(plain), abs=1e-6)
    hft("verify", tmp_path / "offloaded")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"launch.num_processes": 2, "launch.zero_stage": 1}, "needs launch.zero_stage 2 or 3, and it is 1"),
        ({"method.lora": "{}"}, "method.lora works on gradients and weights on the device"),
        ({"train.optim": "adafactor"}, "launch.offload keeps AdamW's state on the host"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_in_front(hft, settings, small, tmp_path, given, said):
    run = tmp_path / "run"
    done = hft("sft", "--output", run, "--dry-run", *settings(small | given | {"launch.offload": "optimizer"}), code=2)
    assert said in done.stderr
    assert not run.exists()
