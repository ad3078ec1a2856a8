"""The check of a GPU, rehearsed on the CPU: every step prints its rows, and a planted fault is reported by its step alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hftcli.freezing.activations import Workload

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


def test_the_plan_is_what_a_gpu_held(monkeypatch):
    """Row by row within 5 %: the most that the allocator held on an H200, and to the byte what is held in any case."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from gpu.plans import list_cases, make_setting

    steps = json.loads((ROOT / "scripts" / "gpu" / "results" / "h200.json").read_text())["steps"]
    rows = {row["name"]: row for step in steps.values() for row in step["rows"]}
    for case in [*list_cases("135M"), *list_cases("1B")]:
        row, memory = rows[case.name], case.make_setting().planned
        assert row["measured_gb"] == pytest.approx(memory.total_bytes / 1e9, rel=0.05), case.name
        for name in ("weights", "gradients", "optimizer", "reference"):
            assert row[f"{name}_gb"] == pytest.approx(getattr(memory, f"{name}_bytes") / 1e9, rel=1e-5), f"{case.name}: {name}"
        if case.every is None:
            kept = memory.activations_bytes / 1e9
            assert row["kept_gb"] == pytest.approx(kept, rel=1e-3), case.name
    work = Workload(1, 2048, attention="flash", arithmetic="autocast", checkpoint_every=1)
    whole = rows["half on one card, 8 micro-batches of 2048"]["peak_gib"]
    assert whole == pytest.approx(make_setting("7B", "half", work).planned.total_bytes / 2**30, rel=0.01)
    exact = make_setting("7B", "half", replace(work, arithmetic="bfloat16")).budget
    offloaded, row = replace(exact, offload=True), rows["half with the optimizer on the host, 8 micro-batches of 2048"]
    assert row["peak_gib"] == pytest.approx(offloaded.half.total_bytes / 2**30, rel=0.01)
    assert row["host_gib"] == pytest.approx(offloaded.host.host_bytes / 2**30, rel=1e-5)
    assert (offloaded.half.optimizer_bytes, offloaded.host.bottleneck) == (0, "the host's update")
