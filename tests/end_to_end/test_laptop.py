"""A laptop: no DeepSpeed, a plain processor, and a folder of the user's own with files that are called as modules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from written_runs import write_run

WITHOUT = Path(__file__).parent / "without"
PAUSE = {"train.max_steps": 4, "eval.max_examples": 20}


@pytest.fixture
def bare(monkeypatch):
    """Every process that is started finds no DeepSpeed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(WITHOUT), os.environ.get("PYTHONPATH")))))
    found = subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True, text=True, check=False)
    assert "No module named 'deepspeed'" in found.stderr


@pytest.mark.parametrize("objective", ["sft", "dpo", "continual"])
def test_several_processes_say_what_is_missing(bare, hft, tmp_path, objective):
    done = hft(objective, "--output", tmp_path / "run", "--num-processes", "2", code=2)
    assert "2 processes share their work through DeepSpeed, which is not installed" in done.stderr
    assert "pip install 'deepspeed" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_comparison_needs_no_deepspeed(bare, hft, tmp_path):
    runs = [write_run(tmp_path / name, f"freeze.trainable_fraction={share}") for name, share in (("half", 0.5), ("full", 1.0))]
    assert list(json.loads(hft("compare", *runs, "--json").stdout)["methods"]) == ["full", "half"]


@pytest.mark.slow
def test_the_quick_starts_need_no_deepspeed(bare, hft, settings, tmp_path, monkeypatch):
    runs = {}
    for objective in ("sft", "dpo", "continual"):
        runs[objective] = tmp_path / objective
        hft(objective, "--output", runs[objective], *settings(PAUSE))
        hft("report", runs[objective])
    hft("sft", "--output", tmp_path / "full", *settings({**PAUSE, "freeze.trainable_fraction": 1.0}))
    # Not through the fixture, which for these commands has a process that imported DeepSpeed before.
    for arguments in (
        ("verify", runs["sft"]),
        ("eval", "--model", runs["sft"], "--tasks", "tinyworld/facts", "--max-examples", "10"),
        ("compare", runs["sft"], tmp_path / "full"),
        ("doctor",),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "hftcli", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert "deepspeed" not in done.stderr.lower(), done.stderr
        assert done.returncode == 0 or arguments[0] == "doctor", done.stderr  # which may find other faults of the machine
    command = [sys.executable, "-m", "hftcli", "chat", str(runs["sft"]), "--max-new-tokens", "5"]
    done = subprocess.run(command, input="Hello\n/quit\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_take_the_quick_starts(hft, settings, tmp_path):
    for objective in ("sft", "dpo"):
        hft(objective, "--output", tmp_path / objective, "--num-processes", "2", *settings(PAUSE))


@pytest.mark.slow
def test_a_file_that_is_called_as_a_module_is_left_alone(hft, settings, tmp_path, monkeypatch):
    for name in ("csv", "random", "typing", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user own file was imported')")
    (tmp_path / "csv.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    monkeypatch.chdir(tmp_path)
    hft("sft", "--output", "run", *settings({**PAUSE, "data.path": "csv.jsonl", "eval.tasks": "[]"}))
