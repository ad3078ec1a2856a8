"""The processes of a round: how each hears that it shall stop, and that no two starts of a round overlap.

    front    while ranks run, the first signal becomes a file, `stop`, which reaches every rank on every machine, past the
             launchers: those answer a signal by ending the ranks within seconds. A second signal ends them at once. While the
             front works by itself, signals.py has it stop at once.
    rank     a signal to itself, or that file, asks for a stop; training honours it at the end of a step, together with the
             other ranks. Where nothing would be lost it is honoured at once.

A rank whose front is gone ends itself, so that no orphan goes on writing.
"""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from hftcli.errors import InputError, Interrupted
from hftcli.launching.signals import SIGNALS
from hftcli.runs.run import Round

FRONT_VARIABLE = "HFT_FRONT"  # which process is the front, in the environment of its ranks
POLL_SECONDS = 0.2
ECHO_SECONDS = 1.0  # a signal may come twice: from Slurm, and from the batch shell that hands on its own
NAMESPACE = Path("/proc/self/ns/pid")  # a link, on Linux
OVERLAP_SECONDS = 30.0  # how long the ranks of an earlier start, whose front is gone, may take to end


@contextmanager
def passing_signals(round_: Round) -> Iterator[None]:
    """The front's part while a round's worker runs.

    Raises:
        Interrupted: at the end, where a signal came and the body did not raise an error of its own.
        KeyboardInterrupt: at the second signal. SIGUSR1 does not count as the first: it is a word ahead of time, as Slurm gives
            it, and SIGTERM comes when the time is over.
    """
    round_.stop_path.unlink(missing_ok=True)  # of a front that was killed; later it would be this one's
    received: list[tuple[int, float]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        orders = [moment for earlier, moment in received if earlier != signal.SIGUSR1]
        if orders and now - orders[0] > ECHO_SECONDS:
            raise KeyboardInterrupt
        if not received and sys.stderr.isatty():  # past the bar, and past a write that the signal may have come into
            os.write(
                sys.stderr.fileno(), f"\r\nhft: stopping after this step; again to lose {round_.describe_loss()}\r\n".encode()
            )
        received.append((number, now))
        round_.stop_path.touch()

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        round_.stop_path.unlink(missing_ok=True)
    if received:
        raise Interrupted(f"stopped by a signal; {round_.name} was finished before", "run the same command again")


def describe_front() -> str:
    """This process, as its ranks are told of it."""
    return f"{_describe_place()} {os.getpid()} {_read_birth(os.getpid())}"


class StopRequest:
    """A rank's part: whether it has been asked to stop.

    Attributes:
        at_once: honour a signal at once, by raising from wherever the main thread is. False where the steps since the last
            checkpoint would be lost: there the ranks agree on a moment.
    """

    def __init__(self, round_: Round):
        self.round = round_
        self.at_once = True
        self.is_requested = False

    def listen(self) -> None:
        """Take signals from here on, and watch the front."""
        for number in SIGNALS:
            signal.signal(number, self._take)
        threading.Thread(target=self._watch, daemon=True).start()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        if self.at_once:
            raise make_interrupted(self.round)

    def _watch(self) -> None:
        place, pid, birth = os.environ.get(FRONT_VARIABLE, "- 0 -").split(" ")
        has_front = place == _describe_place()  # on other machines, the launcher's connection ends the ranks
        while True:
            if has_front and _read_birth(int(pid)) != birth:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self.is_requested and self.round.stop_path.exists():
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(POLL_SECONDS)


def make_interrupted(round_: Round) -> Interrupted:
    """The error of a round that a signal stopped, with what it goes on from."""
    return Interrupted(f"stopped by a signal; {round_.describe_kept()}", "run the same command again")


@contextmanager
def hold_round(round_: Round) -> Iterator[None]:
    """A rank's hold on the round's folder, shared with the other ranks of its start."""
    with _open_lock(round_) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def await_ranks(round_: Round) -> None:
    """Wait until no rank of an earlier start is left.

    Raises:
        InputError: one still runs.
    """
    deadline = time.monotonic() + OVERLAP_SECONDS
    with _open_lock(round_) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{round_.folder}: ranks of an earlier start still run, without their front",
                        "end them (they are listed by `pgrep -f hftcli.training.worker`), then run the same command again",
                    ) from None
            time.sleep(POLL_SECONDS)


def _open_lock(round_: Round) -> BinaryIO:
    return round_.lock_path.open("a+b")  # NFS gives a shared hold to readers alone, a sole one to writers


def _describe_place(namespace: Path = NAMESPACE) -> str:
    """Where a process number means something: a host, and one of its namespaces where it has them."""
    return f"{socket.gethostname()}/{os.readlink(namespace) if namespace.is_symlink() else ''}"


def _read_birth(pid: int, namespace: Path = NAMESPACE) -> str | None:
    """When a living process was started, in the kernel's ticks; with its number, it is that process and no later one.

    Without /proc, as on macOS, only whether it lives.
    """
    try:
        if not namespace.is_symlink():
            os.kill(pid, 0)
            return "alive"
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, birth = fields[0], fields[19]
    return None if state in "ZX" else birth
