"""What the tests share. Real models and data live in `shared/` beside the checkout; without it, what needs them is skipped."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from fork_server import ForkServer

Hft = Callable[..., subprocess.CompletedProcess]

# Modules beside the tests, whose assertions then say as much as a test's.
pytest.register_assert_rewrite("data", "end_to_end", "freezing", "methods", "models")

# The same examples in every run, and few: a gate is to be quick and to say the same twice.
hypothesis.settings.register_profile("gate", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("gate")

TERMINAL = {"NO_COLOR": "1", "COLUMNS": "160"}

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Before any test starts a process: nothing is fetched, and nothing is left in the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: a second thread gains nothing, and waits badly on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that no core waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_check_gpu.py")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real models and data are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def hft(fork_server: ForkServer) -> Hft:
    """`hft("sft", "--output", folder, code=2)`: run the command and insist on its exit code."""

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "hftcli", *map(str, arguments)]
        environment = {**os.environ, **TERMINAL}
        if fork_server.can_run(environment):
            done = fork_server.run(command[3:], environment)
        else:
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
        "train.bf16": False,
        "launch.num_processes": 1,
    }
