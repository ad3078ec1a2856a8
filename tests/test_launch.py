"""How a worker is started, and what its end means."""

import json
import sys
from pathlib import Path

import pytest

from hftcli import launch
from hftcli.errors import InputError, TrainingError, VerificationError
from hftcli.recipe import LaunchSection
from hftcli.run import Round


def test_one_process_needs_no_launcher():
    command = launch.worker_command(Path("r"), LaunchSection(num_processes=1), 1)
    assert command == [sys.executable, "-m", "hftcli.worker", "r"]


def test_several_processes_go_through_deepspeed():
    command = launch.worker_command(Path("r"), LaunchSection(num_processes=8), 29500)
    assert command[2:] == [
        "deepspeed.launcher.runner", "--num_gpus", "8", "--master_port", "29500", "--no_local_rank",
        "--module", "hftcli.worker", "r",
    ]  # fmt: skip


@pytest.mark.parametrize(("visible", "num_gpus"), [("", 0), ("-1", 0), ("0", 1), ("0,3,5", 3)])
def test_visible_gpus_are_counted(monkeypatch, visible, num_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.count_gpus() == num_gpus


def test_every_visible_gpu_by_default_and_never_more(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launch.resolve_launch(LaunchSection()).num_processes == 2
    with pytest.raises(InputError, match="launch.num_processes is 4, but this machine has 2 GPUs"):
        launch.resolve_launch(LaunchSection(num_processes=4))


def test_without_gpus_one_process_or_that_many_cpu_ranks(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.resolve_launch(LaunchSection()).num_processes == 1
    assert launch.resolve_launch(LaunchSection(num_processes=3)).num_processes == 3


@pytest.mark.parametrize(
    ("code", "kind"), [(1, launch.HftError), (2, InputError), (3, VerificationError), (75, launch.Interrupted)]
)
def test_the_workers_word_decides_over_the_launchers_code(tmp_path, code, kind):
    failure = {"message": "why", "fix": "how", "exit_code": code}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    with pytest.raises(kind) as caught:
        launch._read_outcome(Round(tmp_path), 1)
    assert (caught.value.message, caught.value.fix, caught.value.exit_code) == ("why", "how", code)


def test_a_worker_that_dies_without_a_word(tmp_path):
    with pytest.raises(TrainingError, match="ended with code -9 and left no word"):
        launch._read_outcome(Round(tmp_path), -9)
