"""Runs that are killed, stopped, starved and hung: what is left, what is said, and that the rest is as if undisturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hftcli.errors import ModelError
from hftcli.models.description import make_start_key
from hftcli.models.proof import verify_round
from hftcli.runs.run import Round
from hftcli.training.steps import read_step

PATIENCE_SECONDS = 500.0  # a busy machine is slow, not at fault


class Running:
    """An `hft sft`, `hft dpo` or `hft continual` at work, watched in one of its rounds."""

    def __init__(self, run: Path, options: list[str], command: str, name: str | None):
        self.round = Round(run / "rounds" / (name or f"00-{command}"))
        self.round.progress_path.unlink(missing_ok=True)  # an earlier start's
        arguments = [sys.executable, "-m", "hftcli", command, "--output", str(run), *options]
        self.front = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def find_ranks(self) -> list[psutil.Process]:
        """The processes that train, without the launchers above them."""
        below = psutil.Process(self.front.pid).children(recursive=True)
        return [process for process in below if "deepspeed.launcher" not in " ".join(process.cmdline())]

    def wait_for(self, phase: str, done: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.front.poll() is None:
            assert time.monotonic() < deadline, f"{phase} {done} did not come"
            if self.round.progress_path.exists():
                place = json.loads(self.round.progress_path.read_text())
                if place["phase"] == phase and place["done"] >= done:
                    return
            time.sleep(0.005)
        raise AssertionError(f"ended before {phase} {done}: {self.front.communicate()}")

    def end(self, code: int) -> str:
        """Wait for the end, insist on the exit code, and return what was said."""
        _, error = self.front.communicate(timeout=PATIENCE_SECONDS)
        assert self.front.returncode == code, error
        return error


@pytest.fixture
def start(settings) -> Iterator[Callable[..., Running]]:
    started = []

    def launch(run: Path, values: dict[str, object], command: str = "sft", name: str | None = None) -> Running:
        started.append(Running(run, settings(values), command, name))
        return started[-1]

    yield launch
    for running in started:
        running.front.kill()  # its ranks follow
        running.front.communicate()


@pytest.fixture(scope="module")
def short() -> dict[str, object]:
    """Thirty-eight steps over four passes: no row of metrics.jsonl at the end, nor checkpoints at the ends of passes."""
    return {
        "data.max_examples": 80,
        "train.max_steps": 38,
        "train.num_train_epochs": 4,
        "train.learning_rate": 0.001,
        "train.global_batch_size": 8,
        "train.per_device_train_batch_size": 8,
        "train.logging_steps": 3,
        "checkpoint.save_steps": 5,
        "eval.tasks": "[tinyworld/skill]",
    }


@pytest.fixture(scope="module")
def undisturbed(hft, settings, short, tmp_path_factory) -> Round:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    hft("sft", "--output", run, *settings(short))
    return Round(run / "rounds" / "00-sft")


def assert_same(one: Round, other: Round) -> None:
    """Bit for bit, the weights; and all that was measured."""
    weights, others = (load_file(round_.checkpoint / "model.safetensors") for round_ in (one, other))
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert one.read_metrics() == other.read_metrics()
    assert one.read_scores() == other.read_scores()
    results = [round_.read_result() for round_ in (one, other)]
    for field in ("num_steps", "train_loss", "num_tokens", "updates", "verification", "fingerprint"):
        assert getattr(results[0], field) == getattr(results[1], field), field


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
@pytest.mark.parametrize("phase", ["tokenizing", "loading", "scoring"])
def test_a_signal_before_the_first_step_is_honoured_at_once(start, short, undisturbed, tmp_path, phase):
    run = tmp_path / "run"
    running = start(run, short)
    running.wait_for(phase)
    running.front.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert "00-sft has no step checkpoint yet and starts again" in running.end(75)
    assert time.monotonic() - asked < 10
    running = start(run, short)
    running.end(0)
    assert_same(running.round, undisturbed)


@pytest.mark.slow
def test_a_signal_after_the_last_step_loses_no_step(start, short, undisturbed, tmp_path):
    run, long = tmp_path / "run", short | {"checkpoint.save_steps": 1000}
    running = start(run, long)
    running.wait_for("saving")
    running.front.terminate()
    running.end(75)
    assert running.round.saved_steps == [38]
    running = start(run, long)
    running.end(0)
    assert running.round.read_result().resumed_from == 38
    assert_same(running.round, undisturbed)


@pytest.fixture
def prepared(hft, tmp_path) -> Path:
    """A run of five rounds, of which none has begun."""
    hft("continual", "--output", tmp_path / "run", "--dry-run")
    return tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_the_front_works_by_itself(hft, start, prepared, number):
    """It waits for its own manifest, which comes through a pipe, and so is surely in nobody's hands but its own."""
    manifest = prepared / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    os.mkfifo(manifest)
    running = start(prepared, {}, "continual", "00-newcomers")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            pipe = os.open(manifest, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads yet
            assert time.monotonic() < deadline
            time.sleep(0.05)
    running.front.send_signal(number)
    error = running.end(75)
    os.close(pipe)
    assert error.startswith("hft: stopped by a signal; what was finished before is kept\n     fix: run the same command again")
    manifest.unlink()
    manifest.write_bytes(content)
    hft("continual", "--output", prepared, "--dry-run")


@pytest.mark.slow
def test_a_signal_between_two_rounds_loses_nothing(start, tmp_path):
    """After a round the front adds a row to the matrix, then draws it and writes the page, and then begins the next round."""
    values = {
        "continual.tasks": "[tinyworld/newcomers, tinyworld/topic]",
        "data.max_examples": 16,
        "train.max_steps": 2,
        "eval.max_examples": 4,
    }
    plain = start(tmp_path / "plain", values, "continual", "01-topic")
    plain.end(0)
    run = tmp_path / "run"
    running = start(run, values, "continual", "01-topic")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run / "forgetting.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.front.terminate()
    running.end(75)
    assert not running.round.result_path.exists()
    running = start(run, values, "continual", "01-topic")
    running.end(0)
    assert_same(running.round, plain.round)
    assert (run / "forgetting.json").read_bytes() == (tmp_path / "plain" / "forgetting.json").read_bytes()
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(start, short, tmp_path):
    running = start(tmp_path / "run", short | {"train.max_steps": 4000, "train.num_train_epochs": 400})
    running.wait_for("training", 6)
    ranks = running.find_ranks()
    for rank in ranks:
        rank.suspend()  # it cannot answer the first
    running.front.terminate()
    running.front.terminate()  # one that comes twice is one
    time.sleep(1.5)
    assert running.front.poll() is None
    running.front.terminate()
    assert "stopped at once; 00-sft goes on from its checkpoint at step 5" in running.end(1)
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(start, short, tmp_path):
    two = {"launch.num_processes": 2, "train.per_device_train_batch_size": 4, "launch.timeout_minutes": 0.2}
    running = start(tmp_path / "run", short | two | {"train.max_steps": 400, "train.num_train_epochs": 40})
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


# The long forms: a real model on real rows.


@pytest.fixture(scope="module")
def real(shared) -> dict[str, object]:
    return {
        "model.path": shared / "models" / "stories15M",
        "data.path": shared / "data" / "trace" / "NumGLUE-cm" / "train.json",
        "data.max_length": 64,
        "data.max_examples": 30,
        "train.max_steps": 20,
        "train.num_train_epochs": 3,
        "train.learning_rate": 5e-5,
        "train.global_batch_size": 4,
        "train.per_device_train_batch_size": 4,
        "train.logging_steps": 3,
        "checkpoint.save_steps": 4,
        "eval.tasks": "[]",
    }


def run_whole(start, run: Path, values: dict[str, object]) -> tuple[Round, float]:
    """A run to its end, and the seconds that it took."""
    begun = time.monotonic()
    running = start(run, values)
    running.end(0)
    return running.round, time.monotonic() - begun


def kill_at(running: Running, seconds: float, victim: str) -> str | None:
    """SIGKILL after so many seconds; the phase that it hit, None where the run had ended."""
    try:
        running.front.wait(seconds)
    except subprocess.TimeoutExpired:
        phase = "before the worker"
        if running.round.progress_path.exists():
            place = json.loads(running.round.progress_path.read_text())
            phase = f"{place['phase']} {place['done']}"
        ranks = running.find_ranks()
        for process in [running.front] if victim == "front" or not ranks else [random.Random(seconds).choice(ranks)]:
            process.kill()
        running.front.communicate()
        psutil.wait_procs(ranks, timeout=40)
        return phase
    running.front.communicate()
    return None


def largest_difference(one: Round, other: Round) -> float:
    weights, others = (load_file(round_.checkpoint / "model.safetensors") for round_ in (one, other))
    return max((weights[name].float() - others[name].float()).abs().max().item() for name in weights)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_in_one_process(start, real, tmp_path):
    plain, seconds = run_whole(start, tmp_path / "plain", real)
    chance = random.Random(0)
    for index in range(20):
        run, phases = tmp_path / str(index), []
        while not (run / "rounds" / "00-sft" / "result.json").exists() and len(phases) < 3:
            phases.append(kill_at(start(run, real), chance.uniform(0, seconds), chance.choice(["front", "rank"])))
        round_, _ = run_whole(start, run, real)
        print(f"{index}: killed in {phases}; went on from step {round_.read_result().resumed_from}")
        assert_same(round_, plain)
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [2, 3])
def test_ten_kills_of_two_ranks(start, real, tmp_path, stage):
    """Within the difference of two undisturbed runs."""
    two = real | {"launch.num_processes": 2, "train.per_device_train_batch_size": 2, "launch.zero_stage": stage}
    plain, seconds = run_whole(start, tmp_path / "plain", two)
    again, _ = run_whole(start, tmp_path / "again", two)
    tolerance = largest_difference(plain, again)
    print(f"ZeRO {stage}: two undisturbed runs differ by {tolerance}")
    chance = random.Random(stage)
    for index in range(10):
        run = tmp_path / str(index)
        phase = kill_at(start(run, two), chance.uniform(0.3, 1) * seconds, chance.choice(["front", "rank"]))
        round_, _ = run_whole(start, run, two)
        print(f"{index}: killed in {phase}; went on from step {round_.read_result().resumed_from}")
        assert largest_difference(round_, plain) <= tolerance
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_signals(start, real, tmp_path):
    plain, _ = run_whole(start, tmp_path / "plain", real)
    chance = random.Random(0)
    for index in range(10):
        run, moment = tmp_path / str(index), chance.randrange(19)
        running = start(run, real)
        running.wait_for("training", moment)
        time.sleep(chance.uniform(0, 0.3))
        running.front.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
        running.end(75)
        last = running.round.saved_steps[0]
        assert last >= moment
        read_step(running.round.steps / str(last))
        round_, _ = run_whole(start, run, real)
        print(f"{index}: stopped after step {last}")
        assert round_.read_result().resumed_from == last
        assert_same(round_, plain)
        shutil.rmtree(run)
