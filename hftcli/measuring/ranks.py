"""Several processes that ask a model together: each has the whole of it, and a share of the questions.

The first is `hft eval` itself, which alone tells what was found; it starts the others (follower.py), and ends if one of them
fails.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hftcli.launching.command import find_free_port
from hftcli.models.device import find_device

POLL_SECONDS = 0.2
# A rank waits for the first while that lets lm-evaluation-harness ask. Whether the others live is watched on both sides.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those that ask together."""

    rank: int = 0
    num_ranks: int = 1

    @property
    def device(self) -> torch.device:
        """Its own GPU, or the processor."""
        return find_device(self.num_ranks, self.rank)

    def join(self, port: int) -> None:
        """Meet the others."""
        if torch.cuda.is_available():
            torch.cuda.set_device(self.device)
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            f"tcp://127.0.0.1:{port}",
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=PATIENCE,
        )


@contextmanager
def leading(asked: Any, num_ranks: int) -> Iterator[Ranks]:
    """Start the other ranks on the same questions, and be the first; afterwards they are gone.

    Args:
        asked: an `Examination`.
    """
    if num_ranks == 1:
        yield Ranks()
        return
    port, first = find_free_port(), Ranks(0, num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "asked"
        path.write_bytes(pickle.dumps(asked))
        command = [sys.executable, "-m", "hftcli.measuring.follower", str(os.getpid()), str(path)]
        threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // num_ranks, 1))} | dict(os.environ)
        others = [
            subprocess.Popen([*command, str(rank), str(num_ranks), str(port)], env=threads, stdout=subprocess.DEVNULL)
            for rank in range(1, num_ranks)
        ]
        done = threading.Event()
        threading.Thread(target=_watch, args=(others, done), daemon=True).start()
        try:
            first.join(port)
            yield first
        finally:
            done.set()
            for other in others:
                other.kill()
                other.wait()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _watch(others: list[subprocess.Popen[bytes]], done: threading.Event) -> None:
    """End this process where another one fails: it would wait for its answers without an end."""
    while not done.wait(POLL_SECONDS):
        for rank, other in enumerate(others, start=1):
            if other.poll():
                print(f"hft: rank {rank} of {len(others) + 1} ended with code {other.returncode}; see above", file=sys.stderr)
                for each in others:
                    each.kill()
                os._exit(1)


def watch_leader(leader: int) -> None:
    """End this process where the first rank is gone: it would wait for its answers without an end."""
    while os.getppid() == leader:
        time.sleep(POLL_SECONDS)
    os._exit(1)
