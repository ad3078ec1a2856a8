"""The benchmark of a step's time runs in all its modes; on the embedded model, whose times say nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ("--tokens", "16", "--micro-batch", "2", "--steps", "1", "--repeats", "1")


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (["--levers"], ["plain", "token_weights: stm", "anchor, top_k 32", "self_replay: kl"]),
        pytest.param(
            ["--grains"], ["full", "half", "columns", "directions", "quiet: these within half"], marks=pytest.mark.slow
        ),
        pytest.param([], ["full", "half, prefix 0.25", "LoRA, r 8"], marks=pytest.mark.slow),
    ],
)
def test_it_prints_every_row(options, rows):
    model = ROOT / "hftcli" / "tinyworld" / "model"
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_speed.py"), "--model", str(model), *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert f"\n| {row} | " in done.stdout
