"""`train.fit: auto` and the frozen prefix from the command line to the checkpoint."""

import json
from pathlib import Path

import pytest

from hftcli.runs.files import read_model
from hftcli.runs.records import Manifest
from hftcli.runs.run import Round


def losses(run: Path, objective: str) -> list[float]:
    return [row["loss"] for row in Round(run / "rounds" / f"00-{objective}").read_metrics()]


@pytest.mark.slow
def test_the_fit_is_in_the_manifest_and_changes_no_loss(hft, settings, small, tmp_path):
    """In a memory that carries one row with some checkpointing, the losses are those of the whole batch at once."""
    hft("sft", "--output", tmp_path / "plain", *settings(small))
    fitted = {**small, "train.fit": "auto", "train.memory_bytes": 7_000_000}
    shown = hft("sft", "--output", tmp_path / "fitted", *settings(fitted)).stdout
    fit = read_model(tmp_path / "fitted" / "manifest.json", Manifest).rounds["00-sft"].fit
    assert fit.checkpoint_every is not None
    assert fit.needed_bytes <= fit.memory_bytes == 7_000_000
    assert f"fit: micro-batch {fit.per_device_train_batch_size}, " in shown
    assert losses(tmp_path / "fitted", "sft") == pytest.approx(losses(tmp_path / "plain", "sft"), abs=1e-4)
    hft("sft", "--output", tmp_path / "none", *settings({**fitted, "train.memory_bytes": 1000}), code=2)


@pytest.mark.slow
def test_computing_the_logits_again_changes_no_loss(hft, settings, small, tmp_path):
    found = {}
    for kernel in ("plain", "chunked"):
        hft("sft", "--output", tmp_path / kernel, *settings({**small, "train.loss_kernel": kernel, "train.bf16": "false"}))
        assert Round(tmp_path / kernel / "rounds" / "00-sft").read_result().loss_kernel == kernel
        found[kernel] = losses(tmp_path / kernel, "sft")
    assert found["plain"] == pytest.approx(found["chunked"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["shared", "full"])
def test_checkpointing_some_layers_changes_no_loss_of_pairs(hft, settings, tmp_path, reference):
    """TRL sets checkpointing up anew whenever it has asked a reference."""
    pairs = {"train.max_steps": 3, "train.global_batch_size": 4, "train.per_device_train_batch_size": 4, "reference": reference}
    pairs |= {"eval.tasks": "[]", "eval.held_out.path": "null", "train.logging_steps": 1}
    hft("dpo", "--output", tmp_path / "plain", *settings(pairs))
    some = {"train.activation_checkpointing": "true", "train.activation_checkpointing_kwargs": "{every_n_layers: 2}"}
    hft("dpo", "--output", tmp_path / "some", *settings({**pairs, **some}))
    assert losses(tmp_path / "some", "dpo") == pytest.approx(losses(tmp_path / "plain", "dpo"), abs=1e-6)


@pytest.mark.slow
def test_a_frozen_prefix_trains_and_verifies(hft, settings, small, tmp_path):
    prefix = {**small, "freeze.frozen_prefix": 0.4, "freeze.head": "freeze", "train.activation_checkpointing": "true"}
    hft("sft", "--output", tmp_path / "run", *settings(prefix))
    plan = Round(tmp_path / "run" / "rounds" / "00-sft").read_plan()
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.", "model.embed_tokens")) for name in plan.trained)
    assert losses(tmp_path / "run", "sft")[-1] < losses(tmp_path / "run", "sft")[0]
    hft("verify", tmp_path / "run")


@pytest.mark.slow
def test_plan_measures_itself(hft, settings, small):
    measured = json.loads(hft("plan", "--measure", "--json", *settings(small)).stdout)
    assert measured["measured"]["optimizer_bytes"] == measured["memory"]["half"]["optimizer_bytes"]
    assert "kept after the forward pass" in hft("plan", "--measure", *settings(small)).stdout
