"""A run at work, watched from outside, and what two rounds must have in common to be the same."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from hftcli.runs.run import Round

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


def assert_same(one: Round, other: Round) -> None:
    """Bit for bit, the weights; and all that was measured."""
    weights, others = (load_file(round_.checkpoint / "model.safetensors") for round_ in (one, other))
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert one.read_metrics() == other.read_metrics()
    assert one.read_scores() == other.read_scores()
    results = [round_.read_result() for round_ in (one, other)]
    for field in ("num_steps", "train_loss", "num_tokens", "updates", "verification", "fingerprint"):
        assert getattr(results[0], field) == getattr(results[1], field), field
