"""Dozens of kills and signals at random moments: a real model on real rows."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from end_to_end.running import Running, assert_same
from safetensors.torch import load_file

from hftcli.runs.run import Round
from hftcli.training.steps import read_step


@pytest.fixture(scope="module")
def real(shared) -> dict[str, object]:
    return {
        "model.path": shared / "models" / "stories15M",
        "data.path": shared / "data" / "trace" / "NumGLUE-cm" / "train.json",
        "data.max_length": 64,
        "data.max_examples": 30,
        "train.max_steps": 20,
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
