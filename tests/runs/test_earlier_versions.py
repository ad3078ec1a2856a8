"""A run of an earlier version is read, reported, verified, measured and resumed: those in `version_1/`, by `write_runs.py`."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hftcli.models.proof import verify_round
from hftcli.runs.run import Round, Run

VERSION_1 = Path(__file__).parent / "version_1"
ROOT = "/ROOT"


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> Path:
    """What was left, in a folder where its paths are right."""
    root = tmp_path_factory.mktemp("left") / "version_1"
    shutil.copytree(VERSION_1, root)
    for path in root.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            path.write_text(path.read_text().replace(ROOT, str(root)))
    for path in root.rglob("step.json"):
        seal_again(path)
    return root


def seal_again(path: Path) -> None:
    """Give step.json the hash of what stands in it now: of its text with an empty hash."""
    manifest = json.loads(path.read_text()) | {"digest": ""}
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, indent=2).encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=2) + "\n")


def hash_weights(run: Path) -> str:
    return hashlib.sha256((run / "rounds" / "00-sft" / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "num_rounds"), [("sft", 1), ("continual", 2)])
def test_a_finished_run_is_read(left, name, num_rounds):
    run = Run(left / name)
    assert run.read_manifest().version == 1
    assert list(run.read_manifest().rounds) == [round_.name for round_ in run.rounds]
    assert len(run.rounds) == num_rounds
    for round_ in run.rounds:
        assert round_.read_spec().index == run.rounds.index(round_)
        assert round_.read_result().verification.passed
        assert round_.read_plan().fingerprint == round_.read_result().fingerprint
        assert round_.read_scores().after
        assert round_.read_metrics()[-1]["step"] == round_.read_result().num_steps


@pytest.mark.parametrize("name", ["sft", "continual"])
def test_a_finished_run_is_reported(hft, left, tmp_path, name):
    hft("report", left / name, "--html", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_finished_run_is_verified(hft, left):
    assert all(verify_round(round_).passed for round_ in Run(left / "sft").rounds)
    found = json.loads(hft("verify", left / "continual", "--json").stdout)
    assert found["num_frozen"] == 18
    assert not found["violations"] + found["unmoved"] + found["damaged"]


def test_a_round_of_a_run_that_was_moved_is_verified():
    """Its start is named by a path where nothing is; the round that wrote it is beside it."""
    last = Run(VERSION_1 / "continual").rounds[-1]
    assert last.read_spec().model.path == f"{ROOT}/continual/rounds/00-colours/checkpoint"
    assert verify_round(last).passed


def test_a_finished_run_is_measured(hft, left, tmp_path):
    """Its scores now are those that it had."""
    hft("eval", "--model", left / "sft", "--tasks", "tinyworld/newcomers", "--max-examples", 2, "--output", tmp_path / "e.json")
    (score,) = json.loads((tmp_path / "e.json").read_text())["tasks"].values()
    (before,) = json.loads((left / "sft" / "rounds" / "00-sft" / "scores.json").read_text())["after"].values()
    assert score["nll"] == pytest.approx(before["nll"], abs=1e-6)
    assert score["score"] == before["score"]


@pytest.mark.parametrize(("command", "name"), [("sft", "sft"), ("continual", "continual")])
def test_a_finished_run_is_not_run_again(hft, left, command, name):
    results = [round_.result_path for round_ in Run(left / name).rounds]
    before = [path.read_bytes() for path in results]
    hft(command, "--recipe", left / f"{name}.yaml")
    assert [path.read_bytes() for path in results] == before


@pytest.fixture(scope="module")
def resumed(hft, left) -> Round:
    """The stopped run, run to its end."""
    hft("sft", "--recipe", left / "stopped.yaml")
    return Run(left / "stopped").rounds[0]


def test_a_stopped_run_goes_on(left, resumed):
    """Its tokens have another name in the cache now, and no hash in its step checkpoint."""
    (step,) = (VERSION_1 / "stopped" / "rounds" / "00-sft" / "steps").iterdir()
    assert resumed.read_result().resumed_from == int(step.name)
    assert "they could not be compared" in resumed.log_path.read_text()
    steps = [row["step"] for row in resumed.read_metrics()]
    assert steps == list(range(1, 13))


def test_a_stopped_run_ends_as_if_undisturbed(hft, left, resumed, tmp_path):
    """`sft` is the same run undisturbed. Where this machine makes its weights to the bit, so does the run that was stopped."""
    undisturbed = left / "sft"
    hft("sft", "--recipe", left / "sft.yaml", "--output", tmp_path / "again")
    if hash_weights(tmp_path / "again") == hash_weights(undisturbed):
        assert hash_weights(left / "stopped") == hash_weights(undisturbed)
    expected = load_file(undisturbed / "rounds" / "00-sft" / "checkpoint" / "model.safetensors")
    for name, weights in load_file(resumed.checkpoint / "model.safetensors").items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-6)
