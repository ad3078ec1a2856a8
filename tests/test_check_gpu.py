"""The check of a GPU, rehearsed on the CPU: every step prints its rows, and a planted fault is reported by its step alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LETTERS = "abcdefgh"


def rehearse(folder: Path, *options: str) -> tuple[int, dict[str, dict], str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_gpu.py"), "--rehearse", "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    return done.returncode, json.loads((folder / "check.json").read_text())["steps"], done.stdout


def test_the_rehearsal_passes_and_prints_every_row(tmp_path):
    code, steps, shown = rehearse(tmp_path)
    assert code == 0, shown
    assert "".join(sorted(steps)) == LETTERS
    for letter, step in steps.items():
        assert f"### {letter}. {step['title']}: passed" in shown
        for row in step["rows"]:
            assert f"| {row['name']} | " in shown


@pytest.mark.slow
@pytest.mark.parametrize("faulty", ["aceg", "bdfh"])
def test_a_planted_fault_is_reported_by_its_step_alone(tmp_path, faulty):
    """A launch that cannot be, a frozen byte that changed, another learning rate, a wrong plan, a step over its limit, a card
    that is too small, a task that there is not, a kernel with another loss."""
    code, steps, shown = rehearse(tmp_path, "--fault", ",".join(faulty))
    assert code == 1
    assert {letter for letter, step in steps.items() if not step["passed"]} == set(faulty), shown
    if "e" in faulty:
        assert "ended after its limit of 8 s" in shown


def test_a_part_is_chosen_by_letters(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "check_gpu.py"), "--steps", "a,z", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no step z: there are a, b, c" in done.stderr
