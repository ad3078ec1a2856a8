"""What the front does with signals while its ranks run."""

import os
import signal
import time

import pytest

from hftcli.errors import Interrupted
from hftcli.processes import ECHO_SECONDS, passing_signals
from hftcli.run import Round


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_signal_becomes_a_file_and_ends_the_run_when_the_ranks_have_ended(tmp_path):
    round_ = Round(tmp_path)
    with pytest.raises(Interrupted, match="stopped by a signal"), passing_signals(round_):
        assert not round_.stop_path.exists()
        send(signal.SIGTERM)
        assert round_.stop_path.exists()
    assert not round_.stop_path.exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, None),  # one that comes twice, from Slurm and from the batch shell, is one
        (signal.SIGUSR1, signal.SIGTERM),  # Slurm's word ahead of time, and that the time is over
    ],
)
def test_what_is_no_second_signal(tmp_path, first, second):
    with pytest.raises(Interrupted), passing_signals(Round(tmp_path)):
        send(first, first)
        if second is not None:
            time.sleep(ECHO_SECONDS + 0.1)
            send(second, second)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_all_at_once(tmp_path, second):
    with pytest.raises(KeyboardInterrupt), passing_signals(Round(tmp_path)):
        send(signal.SIGTERM)
        time.sleep(ECHO_SECONDS + 0.1)
        send(second)
        pytest.fail("it went on")
