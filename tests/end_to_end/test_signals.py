"""Runs that are asked to stop, at every moment: what is said, what is kept, and that the rest is as if undisturbed."""

import os
import signal
import time
from pathlib import Path

import pytest
from end_to_end.running import PATIENCE_SECONDS, assert_same

TASKS = "[tinyworld/newcomers, tinyworld/topic]"


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tokenizing", "loading", "scoring"])
def test_a_signal_before_the_first_step_is_honoured_at_once(start, short, undisturbed, tmp_path, monkeypatch, phase):
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))  # where no earlier run has kept what the start scores
    run = tmp_path / "run"
    running = start(run, short)
    running.wait_for(phase)
    running.front.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert "00-sft had not begun to train" in running.end(75)
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
def prepared(hft, settings, tmp_path) -> Path:
    """A run of two rounds, of which none has begun."""
    hft("continual", "--output", tmp_path / "run", "--dry-run", *settings({"continual.tasks": TASKS}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_while_the_front_works_by_itself(hft, settings, start, prepared, number):
    """It waits for its own manifest, which comes through a pipe, and so is surely in nobody's hands but its own."""
    manifest = prepared / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    os.mkfifo(manifest)
    running = start(prepared, {"continual.tasks": TASKS}, "continual", "00-newcomers")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            pipe = os.open(manifest, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads yet
            assert time.monotonic() < deadline
            time.sleep(0.05)
    time.sleep(0.2)  # it reads by then: a signal between its open(2) and read(2) would be seen only after the latter
    running.front.send_signal(number)
    error = running.end(75)
    os.close(pipe)
    assert error.startswith("hft: stopped by a signal; what was finished before is kept\n     fix: run the same command again")
    manifest.unlink()
    manifest.write_bytes(content)
    hft("continual", "--output", prepared, "--dry-run", *settings({"continual.tasks": TASKS}))


@pytest.mark.slow
def test_a_signal_between_two_rounds_loses_nothing(start, tmp_path):
    """After a round the front adds a row to the matrix, then draws it and writes the page, and then begins the next round."""
    values = {
        "continual.tasks": TASKS,
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
    running = start(tmp_path / "run", short | {"train.max_steps": 4000})
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
