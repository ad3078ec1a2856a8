"""How a worker is started, and what its end means."""

import json
import sys
from pathlib import Path

import pytest

from hftcli.errors import HftError, InputError, Interrupted, TrainingError, VerificationError
from hftcli.launching import command as room
from hftcli.launching.watch import _read_outcome
from hftcli.recipe.sections import LaunchSection
from hftcli.recipe.slurm import SlurmSection
from hftcli.runs.run import Round


def test_one_process_needs_no_launcher():
    command = room.worker_command(Path("r"), LaunchSection(num_processes=1), 1)
    assert command == [sys.executable, "-m", "hftcli.training.worker", "r"]


def test_several_processes_go_through_deepspeed():
    command = room.worker_command(Path("r"), LaunchSection(num_processes=8), 29500)
    assert command[2:] == [
        "deepspeed.launcher.runner", "--num_gpus", "8", "--master_port", "29500", "--no_local_rank",
        "--module", "hftcli.training.worker", "r",
    ]  # fmt: skip


def test_several_machines_go_over_ssh_or_through_slurm(tmp_path):
    over_ssh = LaunchSection(hostfile="hosts", num_nodes=2, num_processes=1)
    command = room.worker_command(tmp_path, over_ssh, 29500)
    assert command == [sys.executable, "-m", "hftcli.launching.cluster", str(tmp_path), "29500"]
    through_slurm = LaunchSection(slurm=SlurmSection(), num_nodes=2, num_processes=1)
    command = room.worker_command(Path("r"), through_slurm, 29500)
    assert (command[0], command[-4:]) == ("srun", [sys.executable, "-m", "hftcli.training.worker", "r"])
    with pytest.raises(InputError, match="nothing says how to reach the machines"):
        room.worker_command(Path("r"), LaunchSection(num_nodes=2, num_processes=1), 1)


def test_machines_are_counted_from_the_hostfile_or_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # this machine's one GPU says nothing about the others
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    monkeypatch.chdir(tmp_path)
    resolved = room.resolve_launch(LaunchSection(hostfile="hosts"))
    assert (resolved.num_nodes, resolved.num_processes, resolved.num_ranks) == (2, 8, 16)
    assert resolved.hostfile == str(tmp_path / "hosts")
    assert room.resolve_launch(resolved) == resolved
    assert room.count_ranks(LaunchSection(hostfile="hosts", num_processes=4)) == 8
    assert room.count_ranks(LaunchSection(num_nodes=3, num_processes=8)) == 24
    assert room.resolve_launch(LaunchSection(num_nodes=3, num_processes=8)).num_ranks == 24
    assert room.resolve_launch(LaunchSection(slurm=SlurmSection(), num_processes=8)).num_ranks == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hostfile": "hosts", "slurm": SlurmSection()}, "both say where to run"),
        ({"hostfile": "hosts", "num_nodes": 3}, "num_nodes is 3, but hosts names 1 hosts"),
        ({"hostfile": "hosts", "num_processes": 9}, "num_processes is 9, but a has 8 slots"),
        ({"slurm": SlurmSection()}, "cannot be counted from here"),
    ],
)
def test_launches_that_do_not_go_together(tmp_path, monkeypatch, values, message):
    (tmp_path / "hosts").write_text("a slots=8\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        room.resolve_launch(LaunchSection(**values))


@pytest.mark.parametrize(("visible", "num_gpus"), [("", 0), ("-1", 0), ("0", 1), ("0,3,5", 3)])
def test_visible_gpus_are_counted(monkeypatch, visible, num_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert room.count_gpus() == num_gpus


def test_every_visible_gpu_by_default_and_never_more(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert room.resolve_launch(LaunchSection()).num_processes == 2
    with pytest.raises(InputError, match="launch.num_processes is 4, but this machine has 2 GPUs"):
        room.resolve_launch(LaunchSection(num_processes=4))


def test_without_gpus_one_process_or_that_many_cpu_ranks(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert room.resolve_launch(LaunchSection()).num_processes == 1
    assert room.resolve_launch(LaunchSection(num_processes=3)).num_processes == 3


@pytest.mark.parametrize(("code", "kind"), [(1, HftError), (2, InputError), (3, VerificationError), (75, Interrupted)])
def test_the_workers_word_decides_over_the_launchers_code(tmp_path, code, kind):
    failure = {"message": "why", "fix": "how", "exit_code": code}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    with pytest.raises(kind) as caught:
        _read_outcome(Round(tmp_path), 1)
    assert (caught.value.message, caught.value.fix, caught.value.exit_code) == ("why", "how", code)


def test_a_worker_that_dies_without_a_word(tmp_path):
    for code in (-9, 137):  # as the kernel tells it, and as srun does
        with pytest.raises(TrainingError, match="ended with code -9 and left no word"):
            _read_outcome(Round(tmp_path), code)


@pytest.mark.parametrize("code", [-15, 143, 138])
def test_a_worker_that_dies_of_a_signal_while_it_starts(tmp_path, code):
    """143 is srun's word for SIGTERM, 138 that for SIGUSR1."""
    with pytest.raises(Interrupted, match="stopped by a signal while starting"):
        _read_outcome(Round(tmp_path), code)
