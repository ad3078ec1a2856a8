"""A checkpoint is the start of the next round, and draws another half, by whichever name it is given."""

import json
import shutil
from pathlib import Path

import pytest

from hftcli.runs.history import read_history
from hftcli.runs.run import Round

SHORT = {
    "train.max_steps": 2, "data.max_examples": 40, "eval.tasks": "[]", "train.per_device_train_batch_size": 8,
    "train.global_batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(hft, settings, tmp_path_factory) -> Round:
    """A round on the embedded model that left a delta."""
    run = tmp_path_factory.mktemp("runs") / "first"
    hft("sft", "--output", run, *settings(SHORT | {"checkpoint.format": "delta"}))
    return Round(run / "rounds" / "00-sft")


def prepare(hft, settings, folder: Path, model: Path) -> dict:
    """The next round's round.json."""
    rows = {"model.path": model, "data.path": "tinyworld/skill", "data.max_length": 128}
    shown = hft("sft", "--dry-run", "--output", folder, *settings(SHORT | rows)).stdout
    assert "rows    40 of 40" in shown
    return json.loads((folder / "rounds" / "00-sft" / "round.json").read_text())


def test_a_checkpoint_says_what_made_it(finished):
    (past,) = read_history(finished.checkpoint).rounds
    assert (past.index, past.objective, past.fingerprint) == (0, "sft", finished.read_plan().fingerprint)
    assert past.parent == finished.read_spec().model.path


@pytest.mark.parametrize(
    "how", ["copy", "reset", *(pytest.param(how, marks=pytest.mark.slow) for how in ("run", "checkpoint", "merged"))]
)
def test_the_next_round_is_the_next_however_its_start_is_named(hft, settings, finished, tmp_path, how):
    run = finished.folder.parents[1]
    if how == "copy":
        shutil.copytree(finished.checkpoint, tmp_path / "start")
    elif how == "merged":
        hft("merge", "--delta", finished.checkpoint, "--output", tmp_path / "start")
    elif how == "reset":
        hft("reset", "--base", "tinyworld", "--tuned", run, "--set", "freeze.seed=7", "--output", tmp_path / "start")
    start = {"run": run, "checkpoint": finished.checkpoint}.get(how, tmp_path / "start")
    spec = prepare(hft, settings, tmp_path / "next", start)
    assert spec["index"] == 1
    shown = json.loads(hft("plan", "--model", start, "--json").stdout)
    assert shown["fingerprint"] != finished.read_plan().fingerprint


def test_a_second_round_adds_itself(hft, settings, finished, tmp_path):
    rows = {"model.path": finished.checkpoint, "data.path": "tinyworld/skill", "data.max_length": 128, "train.bf16": False}
    hft("sft", "--output", tmp_path / "next", *settings(SHORT | rows))
    last = Round(tmp_path / "next" / "rounds" / "00-sft")
    history = read_history(last.checkpoint)
    assert [past.index for past in history.rounds] == [0, 1]
    assert history.rounds[1].fingerprint == last.read_plan().fingerprint != history.rounds[0].fingerprint
    manifest = json.loads((tmp_path / "next" / "manifest.json").read_text())
    assert manifest["parent"] == str(finished.checkpoint)


def test_the_rows_of_a_sequence_are_shown(hft):
    shown = json.loads(hft("data", "--recipe", "tinyworld-continual", "--json").stdout)
    assert list(shown) == [f"tinyworld/{task}" for task in ("newcomers", "topic", "reverse", "sale", "sum")]
    assert {task["num_rows"] for task in shown.values()} == {600}
    text = hft("data", "--recipe", "tinyworld-continual").stdout
    assert text.index("tinyworld/topic") < text.index("Classify the sentence") < text.index("tinyworld/reverse")
