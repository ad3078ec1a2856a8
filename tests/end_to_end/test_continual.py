"""`hft continual` from the command line to the matrix, killed and started again."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from hftcli.comparing.forgetting import read_matrix
from hftcli.runs.run import Run

SHORT = {"train.max_steps": 8, "eval.max_examples": 20, "eval.tasks": "[tinyworld/facts]"}
TASKS = ("newcomers", "topic", "reverse")


def sequence(*tasks: str) -> str:
    return ",".join(f"tinyworld/{task}" for task in tasks)


@pytest.fixture(scope="module")
def finished(hft, settings, tmp_path_factory) -> Path:
    """A run of three short rounds that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    hft("continual", "--tasks", sequence(*TASKS), "--output", run, *settings(SHORT))
    return run


def test_every_round_starts_from_the_one_before_with_another_half(hft, finished):
    rounds = Run(finished).rounds
    assert [round_.name for round_ in rounds] == ["00-newcomers", "01-topic", "02-reverse"]
    for before, after in pairwise(rounds):
        assert after.read_spec().model.path == str(before.checkpoint.resolve())
    assert len({round_.read_plan().fingerprint for round_ in rounds}) == 3
    hft("verify", finished)


def test_the_matrix_has_a_row_for_the_start_and_one_for_each_round(finished):
    matrix = read_matrix(finished)
    assert matrix.tasks == TASKS
    assert [len(row) for row in matrix.scores] == [3, 3, 3, 3]
    assert None not in matrix.scores[0]
    assert [value is None for value in matrix.scores[1]] == [False, False, True]  # seen, next, unseen
    assert all(value is not None for row in matrix.nll for value in row)
    assert len(matrix.general["tinyworld/facts"]) == 4
    assert (finished / "figures" / "forgetting.svg").stat().st_size > 1000


def test_report_prints_the_matrix_again(hft, finished):
    shown = hft("report", finished).stdout
    assert "reverse" in shown
    found = json.loads(hft("report", finished, "--json").stdout)
    assert {"op", "bwt", "forgetting", "fwt", "plasticity", "units"} <= found.keys()


def test_the_data_check_is_kept(finished):
    assert Run(finished).read_manifest().sequence is not None


@pytest.mark.slow
def test_killed_in_every_round_it_ends_with_the_same_matrix(hft, settings, finished, tmp_path):
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "hftcli", "continual", "--tasks", sequence(*TASKS), "--output", str(run), *settings(SHORT)]
    for name in ("00-newcomers", "01-topic", "02-reverse"):
        kill_while_training(command, run / "rounds" / name)
        assert not (run / "rounds" / name / "result.json").exists()
    hft(*command[3:])
    assert read_matrix(run) == read_matrix(finished)


def kill_while_training(command: list[str], folder: Path) -> None:
    """SIGKILL the front and all that it started in the middle of a round's training."""
    front = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = folder / "progress.json", time.monotonic() + 300
    while not (metrics.exists() and json.loads(metrics.read_text())["phase"] == "training"):
        assert time.monotonic() < deadline, f"{folder.name} did not come to train"
        time.sleep(0.01)
    for process in [*front.children(recursive=True), front]:
        process.send_signal(signal.SIGKILL)
    front.wait()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "tinywurld"], "did you mean"),
        (["--tasks", "tinyworld", "--order", "7"], "order"),
        (["--tasks", "trace", "--set", "model.path=tinyworld"], "C-STANCE"),
        (["--tasks", "trace", "--set", "model.path=tinyworld", "--set", "data.root=nowhere"], "nowhere"),
        (["--set", "data.path=rows.jsonl"], "data.path would have no effect under `hft continual`"),
        (["--set", "method.ewd={}"], "did you mean 'ewc'"),
        (["--set", "method.gem={}", "--num-processes", "2", "--set", "train.per_device_train_batch_size=16"], "ZeRO"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(hft, tmp_path, options, expected):
    error = hft("continual", "--output", tmp_path / "run", *options, code=2).stderr
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
