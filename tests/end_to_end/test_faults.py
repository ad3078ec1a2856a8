"""Runs that are killed, starved, hung and damaged: what is left, what is said, and that the rest is as if undisturbed."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from end_to_end.running import assert_same

from hftcli.errors import ModelError
from hftcli.models.description import make_start_key
from hftcli.models.proof import verify_round
from hftcli.runs.run import Round
from hftcli.training.steps import read_step

# Killed and hung


def test_killed_and_stopped_a_run_ends_as_if_undisturbed(hft, settings, start, short, undisturbed, tmp_path):
    run = tmp_path / "run"
    # The front is killed, and with it the rank; nobody else may work in the folder before.
    running = start(run, short)
    running.wait_for("training", 8)
    refused = hft("sft", "--output", run, *settings(short), code=2).stderr
    assert f"in use by another hft, process {running.front.pid} on" in refused
    (rank,) = running.find_ranks()
    running.front.kill()
    running.front.communicate()
    psutil.wait_procs([rank], timeout=5)
    assert not rank.is_running()
    # The front is asked to stop.
    running = start(run, short)
    running.wait_for("training", 17)
    running.front.terminate()
    error = running.end(75)
    (last, *_) = running.round.saved_steps
    assert f"goes on from its checkpoint at step {last}" in error
    assert last >= 17
    # Undisturbed to the end.
    running = start(run, short)
    running.end(0)
    assert running.round.read_result().resumed_from == last
    assert_same(running.round, undisturbed)
    assert not running.round.steps.exists()


@pytest.mark.slow
def test_a_killed_rank_is_named(start, short, undisturbed, tmp_path):
    running = start(tmp_path / "run", short)
    running.wait_for("training", 27)
    for rank in running.find_ranks():
        rank.kill()
    assert "ended with code -9 and left no word; 00-sft goes on from its checkpoint at step 25" in running.end(1)
    running = start(tmp_path / "run", short)
    running.end(0)
    assert running.round.read_result().resumed_from == 25
    assert_same(running.round, undisturbed)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(start, short, tmp_path):
    two = {"launch.num_processes": 2, "train.per_device_train_batch_size": 4, "launch.timeout_minutes": 0.2}
    running = start(tmp_path / "run", short | two | {"train.max_steps": 400})
    running.wait_for("training", 6)
    running.find_ranks()[-1].suspend()
    error = running.end(1)
    assert "the worker hangs: no progress for 0.2 minutes while training at" in error
    assert "goes on from its checkpoint at step" in error


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_lost_rank_ends_the_job_and_the_rerun_goes_on(start, short, tmp_path, stage):
    two = short | {"launch.num_processes": 2, "train.per_device_train_batch_size": 4, "launch.zero_stage": stage}
    running = start(tmp_path / "run", two)
    running.wait_for("training", 12)
    running.find_ranks()[-1].kill()
    error = running.end(1)
    assert "00-sft goes on from its checkpoint at step 10" in error
    frozen = set(running.round.read_plan().frozen)
    for path in (running.round.steps / "10").rglob("*model_states.pt"):
        held = torch.load(path, weights_only=False)
        assert held["module"]
        assert not frozen & held["module"].keys()
        assert not held["frozen_param_fragments"]
    running = start(tmp_path / "run", two)
    running.end(0)
    assert running.round.read_result().resumed_from == 10
    plain = start(tmp_path / "plain", two)
    plain.end(0)
    assert_same(running.round, plain.round)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["precompute", "shared", "full"])
def test_preferences_go_on_with_the_reference_that_they_had(start, tmp_path, mode):
    """And with what was measured before the first step; the precomputed reference's own file is gone."""
    values = {
        "reference": mode,
        "data.max_examples": 64,
        "train.max_steps": 12,
        "train.logging_steps": 5,
        "checkpoint.save_steps": 4,
        "eval.tasks": "[]",
        "eval.held_out.max_examples": 20,
    }
    rounds = []
    for name in ("plain", "killed"):
        running = start(tmp_path / name, values, "dpo")
        if name == "killed":
            running.wait_for("training", 6)
            running.front.kill()
            running.front.communicate()
            shutil.rmtree(Path(os.environ["HFT_CACHE"]) / "references", ignore_errors=True)
            running = start(tmp_path / name, values, "dpo")
        running.end(0)
        rounds.append(running.round)
    assert rounds[1].read_result().resumed_from == 4
    assert_same(*rounds)
    assert rounds[0].read_result().pairs == rounds[1].read_result().pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *("replay: {when: after}", "replay: {when: mixed}", "ewc: {}", "gem: {}", "agem: {}", "lora: {}", "olora: {}"),
        *("ia3: {}", "l2sp: {strength: 0.1}"),
    ],
)
def test_methods_go_on_as_if_undisturbed(start, tmp_path, method):
    """Killed in the second round, and asked to stop after its last step, where LoRA has merged its adapters."""
    values = {
        "continual.tasks": "[tinyworld/newcomers, tinyworld/topic]",
        "method": f"{{{method}}}",
        "data.max_examples": 40,
        "train.max_steps": 8,
        "train.logging_steps": 3,
        "checkpoint.save_steps": 3,
        "eval.max_examples": 20,
    }
    rounds = []
    for name in ("plain", "killed"):
        if name == "killed":
            running = start(tmp_path / name, values, "continual", "01-topic")
            running.wait_for("training", 4)
            running.front.kill()
            running.front.communicate()
            running = start(tmp_path / name, values, "continual", "01-topic")
            running.wait_for("saving")
            running.front.terminate()
            running.end(75)
        running = start(tmp_path / name, values, "continual", "01-topic")
        running.end(0)
        rounds.append(running.round)
    assert_same(*rounds)


# Started otherwise than before


@pytest.mark.slow
def test_a_changed_recipe_is_refused_and_the_checkpoint_kept(hft, settings, start, short, tmp_path):
    run = tmp_path / "run"
    running = start(run, short)
    running.wait_for("training", 6)
    for rank in running.find_ranks():
        rank.send_signal(signal.SIGUSR1)  # to the rank itself
    assert "stopped by a signal; 00-sft goes on from its checkpoint" in running.end(75)
    before = running.round.saved_steps
    refused = hft("sft", "--output", run, *settings(short | {"train.learning_rate": 0.002}), code=2).stderr
    assert "holds the run of another recipe (differs in train.learning_rate)" in refused
    assert running.round.saved_steps == before


@pytest.mark.slow
def test_another_number_of_ranks_is_refused(hft, settings, start, short, tmp_path):
    """As where `launch.num_processes` is null and the machine has other GPUs than before."""
    run = tmp_path / "run"
    running = start(run, short)
    running.wait_for("training", 6)
    running.front.terminate()
    running.end(75)
    for name in ("recipe.yaml", "manifest.json"):  # the recipe is the same, and resolves to something else
        (run / name).unlink()
    shutil.move(running.round.steps, tmp_path / "steps")
    running.round.metrics_path.unlink()
    shutil.rmtree(run)
    two = short | {"launch.num_processes": 2, "train.per_device_train_batch_size": 4}
    hft("sft", "--output", run, "--dry-run", *settings(two))
    shutil.move(tmp_path / "steps", running.round.steps)
    error = hft("sft", "--output", run, *settings(two), code=2).stderr
    assert "was written by 1 processes at ZeRO 2, and this start has 2 at ZeRO 2" in error


# Disks


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own that is soon full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting a disk takes root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_complete(start, short, undisturbed, tiny_disk):
    run = tiny_disk / "run"
    running = start(run, short)
    running.wait_for("training", 11)
    stuffing = tiny_disk / "stuffing"
    running.find_ranks()[0].suspend()
    with stuffing.open("wb") as file:
        file.write(b"0" * (shutil.disk_usage(tiny_disk).free - (1 << 19)))
    running.find_ranks()[0].resume()
    error = running.end(1)
    assert "no space is left on the disk" in error
    whole = [step for step in running.round.saved_steps if read_step(running.round.steps / str(step))]
    assert whole[0] >= 10
    stuffing.unlink()
    running = start(run, short)
    running.end(0)
    assert_same(running.round, undisturbed)


@pytest.mark.slow
def test_a_folder_that_takes_no_writing_is_refused(hft, settings, short, tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    assert "Read-only file system" in hft("sft", "--output", tiny_disk / "run", *settings(short), code=2).stderr


# Damage


@pytest.fixture
def damaged(undisturbed, tmp_path) -> Path:
    """A finished run, of whose model one bit is not what it was."""
    shutil.copytree(undisturbed.folder.parent.parent, tmp_path / "damaged")
    path = tmp_path / "damaged" / "rounds" / "00-sft" / "checkpoint" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return tmp_path / "damaged"


def test_a_damaged_checkpoint_is_found(undisturbed, damaged):
    round_ = Round(damaged / "rounds" / "00-sft")
    assert verify_round(undisturbed).passed
    assert verify_round(round_).damaged == ("model.safetensors has other bytes than were written",)
    with pytest.raises(ModelError, match="model.safetensors has other bytes than were written"):
        make_start_key(round_.checkpoint)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_by_verify_and_by_the_next_round(hft, settings, short, damaged, tmp_path):
    assert "damaged: checkpoint/model.safetensors has other bytes" in hft("verify", damaged, code=3).stdout
    refused = hft("sft", "--output", tmp_path / "next", *settings(short | {"model.path": damaged}), code=2).stderr
    assert "model.safetensors has other bytes than were written" in refused
