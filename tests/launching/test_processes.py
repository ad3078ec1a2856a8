"""What the front does with signals while its ranks run."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hftcli.errors import HftError, Interrupted
from hftcli.launching import watch
from hftcli.launching.processes import (
    ECHO_SECONDS,
    NAMESPACE,
    _describe_place,
    _open_lock,
    _read_birth,
    await_ranks,
    hold_round,
    passing_signals,
)
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.run import Round

PAUSE = 0  # no signal


def receive(round_: Round, *numbers: int) -> None:
    """Signals to this process, as if the ranks of a round ran all the while."""
    with passing_signals(round_):
        for number in numbers:
            if number == PAUSE:
                time.sleep(ECHO_SECONDS + 0.1)
            else:
                os.kill(os.getpid(), number)
                assert round_.stop_path.exists()


def test_a_front_that_was_killed_leaves_no_word_to_the_next(tmp_path):
    Round(tmp_path).stop_path.touch()
    with passing_signals(Round(tmp_path)):
        assert not Round(tmp_path).stop_path.exists()


def test_a_signal_that_comes_before_the_ranks_reaches_them(tmp_path, monkeypatch):
    """As while the front waits for those of an earlier start to end."""
    round_, seen = Round(tmp_path), []
    monkeypatch.setattr(watch, "await_ranks", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(watch, "worker_command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(watch, "_watch", lambda round_, *_: seen.append(round_.stop_path.exists()))
    with pytest.raises(HftError), passing_signals(round_):
        watch.launch_round(round_, LaunchSection(), lambda _: None)
    assert seen == [True]


def test_without_a_signal_nothing_is_asked(tmp_path):
    with passing_signals(Round(tmp_path)):
        assert not Round(tmp_path).stop_path.exists()


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT,),
        (signal.SIGTERM, signal.SIGTERM),  # from Slurm, and from the batch shell that hands on its own
        (signal.SIGUSR1, PAUSE, signal.SIGTERM, signal.SIGTERM),  # Slurm's word ahead of time, and that the time is over
    ],
)
def test_a_signal_becomes_a_file_and_ends_the_run_when_the_ranks_have_ended(tmp_path, numbers):
    with pytest.raises(Interrupted, match="stopped by a signal"):
        receive(Round(tmp_path), *numbers)
    assert not Round(tmp_path).stop_path.exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_all_at_once(tmp_path, second):
    with pytest.raises(KeyboardInterrupt):
        receive(Round(tmp_path), signal.SIGTERM, PAUSE, second, PAUSE)
    assert not Round(tmp_path).stop_path.exists()


@pytest.mark.parametrize("namespace", [NAMESPACE, Path("nowhere")], ids=["linux", "without /proc"])
def test_a_front_is_missed_once_it_has_ended(namespace: Path):
    front = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = _read_birth(front.pid, namespace)
    assert born is not None
    assert _read_birth(front.pid, namespace) == born
    assert _describe_place(namespace).startswith(f"{socket.gethostname()}/")
    front.communicate(b"\n")
    assert _read_birth(front.pid, namespace) is None


def test_the_lock_is_open_to_read_and_to_write(tmp_path):
    """NFSv4 refuses a shared hold on a file that is not open to read, and a sole one on a file that is not open to write."""
    round_ = Round(tmp_path)
    with _open_lock(round_) as lock:
        assert fcntl.fcntl(lock, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    with hold_round(round_), hold_round(round_):
        pass
    await_ranks(round_)
