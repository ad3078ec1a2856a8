"""Running `hft` as a user does: a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Hft = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def hft() -> Hft:
    """`hft("sft", "--output", folder, code=2)`: run the command and insist on its exit code."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "hftcli", *map(str, arguments)]
        environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == code, f"{command}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def settings() -> Callable[..., list[str]]:
    """`settings({"train.max_steps": 4})` as `--set` options."""

    def expand(values: dict[str, object]) -> list[str]:
        return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]

    return expand


@pytest.fixture(scope="session")
def small(shared: Path) -> dict[str, object]:
    """A short round of a real model on real rows: four steps of eight."""
    return {
        "model.path": shared / "models" / "stories260K",
        "data.path": shared / "data" / "trace" / "NumGLUE-cm" / "train.json",
        "data.max_length": 200,
        "train.max_steps": 4,
        "train.learning_rate": 0.001,
        "train.global_batch_size": 8,
        "train.per_device_train_batch_size": 8,
        "train.logging_steps": 1,
        "eval.tasks": "[]",
    }
