"""Which devices a worker finds: those that the user left visible, be they counted from the front or by the worker itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hftcli.launching.command import settle_devices, worker_command, worker_environment
from hftcli.recipe.sections import LaunchSection
from hftcli.recipe.slurm import SlurmSection

# A module that runs the worker up to where it would import torch, and notes the devices that torch would find there.
STOPPED = """\
import os, runpy, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            open(f"{folder}/{os.environ.get('LOCAL_RANK', 'alone')}", "w").write(os.environ["CUDA_VISIBLE_DEVICES"])
            os._exit(0)
sys.meta_path.insert(0, Stop())
sys.argv = ["worker", "r"]
runpy.run_module("hftcli.training.worker", run_name="__main__")
"""


def start_ranks(folder: Path, num_processes: int) -> dict[str, str]:
    """The devices that every rank of a launch on this machine finds, by its LOCAL_RANK."""
    (folder / "found").mkdir()
    (folder / "stopped.py").write_text(STOPPED.replace("{folder}", str(folder / "found")))
    launch = LaunchSection(num_processes=num_processes)
    command = ["stopped" if part == "hftcli.training.worker" else part for part in worker_command(folder, launch, 29533)]
    environment = {**os.environ, **worker_environment(launch), "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, sys.path)])
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return {path.name: path.read_text() for path in (folder / "found").iterdir()}


@pytest.mark.parametrize("mask", ["3,5", "GPU-1f,GPU-2a", ""])
def test_the_ranks_of_deepspeeds_launcher_find_the_devices_that_the_user_left_visible(tmp_path, monkeypatch, mask):
    """By itself the launcher gives them 0 and 1, which may be someone else's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert start_ranks(tmp_path, 2) == {"0": mask, "1": mask}


@pytest.mark.parametrize(("mask", "found"), [("3,5", "3"), ("GPU-1f,GPU-2a", "GPU-1f"), ("5", "5"), ("", "")])
def test_one_process_takes_the_first_visible_device(tmp_path, monkeypatch, mask, found):
    """With several, transformers would split the batch over them, which TRL refuses."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert start_ranks(tmp_path, 1) == {"alone": found}


def test_a_worker_started_by_hand_counts_the_devices_of_its_machine(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1f)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2a)'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for alone in ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        settle_devices(alone)
        assert alone["CUDA_VISIBLE_DEVICES"] == "0"
        assert "DS_ACCELERATOR" not in alone
    one_of_two = {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    settle_devices(one_of_two)
    assert one_of_two == {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def test_slurms_ranks_look_at_the_devices_of_their_node(monkeypatch):
    """The front may be on a login node without any, whose cores are not theirs either."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    launch = LaunchSection(slurm=SlurmSection(), num_nodes=2, num_processes=8)
    assert not {"DS_ACCELERATOR", "OMP_NUM_THREADS", "HFT_VISIBLE_DEVICES"} & set(worker_environment(launch))
    on_gpus = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    settled = dict(on_gpus)
    settle_devices(settled)
    assert settled == on_gpus
    on_cores = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": ""}
    settle_devices(on_cores)
    assert (on_cores["DS_ACCELERATOR"], on_cores["OMP_NUM_THREADS"]) == ("cpu", "8")
