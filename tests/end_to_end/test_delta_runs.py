"""Runs that keep deltas, `hft merge` and `hft reset` from the command line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hftcli.models.proof import verify_round
from hftcli.runs.run import Round


def round_of(run: Path) -> Round:
    return Round(run / "rounds" / "00-sft")


def test_a_round_leaves_a_delta_that_verifies(hft, settings, small, tmp_path):
    shown = hft("sft", "--output", tmp_path / "run", *settings(small | {"checkpoint.format": "delta"})).stdout
    round_ = round_of(tmp_path / "run")
    assert f"merge --delta {round_.checkpoint} --output FOLDER" in shown
    assert load_file(round_.checkpoint / "delta.safetensors").keys() == set(round_.read_plan().trained)
    assert round_.read_result().verification.passed
    assert verify_round(round_).passed


@pytest.fixture(scope="module")
def runs(hft, settings, small, tmp_path_factory) -> Path:
    """The same round kept in both forms."""
    folder = tmp_path_factory.mktemp("runs")
    for form in ("full", "delta"):
        hft("sft", "--output", folder / form, *settings(small | {"checkpoint.format": form}))
    return folder


@pytest.mark.slow
def test_a_delta_merges_into_the_full_checkpoint_and_verifies(hft, runs, shared, tmp_path):
    assert "verified: 22 of 22 frozen" in hft("verify", runs / "delta").stdout
    base = shared / "models" / "stories260K"
    hft("merge", "--base", base, "--delta", runs / "delta", "--output", tmp_path / "merged")
    full = round_of(runs / "full").checkpoint
    for file in full.iterdir():
        if file.name == "README.md":  # the card says which run it was
            continue
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes(), file.name
    manifest = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert manifest["inputs"]["base"]["path"] == str(base.resolve())
    assert "merge" in manifest["command"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{}, {"launch.num_processes": 2, "launch.zero_stage": 3, "train.per_device_train_batch_size": 4}],
    ids=["one process", "zero 3"],
)
def test_a_run_that_starts_from_a_delta_is_the_run_that_starts_from_the_full_model(
    hft, settings, small, runs, tmp_path, change
):
    for form in ("full", "delta"):
        start = {"model.path": runs / form, "checkpoint.format": form}
        hft("sft", "--output", tmp_path / form, *settings(small | change | start))
    hft("verify", tmp_path / "delta")
    one, two = (round_of(tmp_path / form) for form in ("full", "delta"))
    assert one.read_plan() == two.read_plan()
    assert [row["loss"] for row in one.read_metrics()] == [row["loss"] for row in two.read_metrics()]
    hft("merge", "--delta", tmp_path / "delta", "--output", tmp_path / "merged")
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (one.checkpoint / name).read_bytes()


@pytest.mark.slow
def test_plan_reads_a_delta(hft, runs):
    plans = [json.loads(hft("plan", "--model", runs / form, "--json").stdout) for form in ("full", "delta")]
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_interpolation_and_reset_from_the_command_line(hft, runs, shared, tmp_path):
    base, tuned = shared / "models" / "stories260K", runs / "delta"
    hft("merge", "--base", base, "--tuned", tuned, "--interpolate", 1, "--output", tmp_path / "one")
    weights = (round_of(runs / "full").checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == weights
    shown = hft("reset", "--base", base, "--tuned", tuned, "--set", "freeze.seed=7", "--output", tmp_path / "reset").stdout
    assert "are back at the base" in shown
    assert json.loads((tmp_path / "reset" / "merge.json").read_text())["plan"]["rule"]["seed"] == 7


def test_bad_input(hft, tmp_path):
    base = "tinyworld"
    arguments = {
        "hft merge takes --delta, or --base with --tuned": ("merge", "--base", base, "--output", tmp_path / "out"),
        "hft merge takes --interpolate or --sparsify": tuple(
            f"merge --base {base} --tuned {base} --interpolate 0.5 --sparsify 0.5 --output out".split()
        ),
        "less than or equal to 1": ("merge", "--base", base, "--tuned", base, "--interpolate", 2, "--output", "out"),
        "no other keys than those of freeze": ("reset", "--base", base, "--tuned", base, "--set", "x=1", "--output", "out"),
        "a reset draws once what goes back, and freeze.interpolate acts": tuple(
            f"reset --base {base} --tuned {base} --set freeze.interpolate=0.5 --output out".split()
        ),
    }
    for message, command in arguments.items():
        assert message in hft(*command, code=2).stderr
