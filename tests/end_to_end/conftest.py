"""Runs to disturb, and one that nobody disturbs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from end_to_end.running import Running

from hftcli.runs.run import Round


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


@pytest.fixture(scope="session")
def short() -> dict[str, object]:
    """Thirty-eight steps over almost four passes: no row of metrics.jsonl at the end, nor checkpoints at the ends of passes."""
    return {
        "data.max_examples": 80,
        "train.max_steps": 38,
        "train.learning_rate": 0.001,
        "train.global_batch_size": 8,
        "train.per_device_train_batch_size": 8,
        "train.logging_steps": 3,
        "checkpoint.save_steps": 5,
        "eval.tasks": "[tinyworld/skill]",
    }


@pytest.fixture(scope="session")
def undisturbed(hft, settings, short, tmp_path_factory) -> Round:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    hft("sft", "--output", run, *settings(short))
    return Round(run / "rounds" / "00-sft")
