"""`hft compare` from a recipe: runs what is missing and nothing else, then compares."""

import json

import pytest

from hftcli.runs.run import Run

VARY = ("--vary", "freeze.trainable_fraction=0.5,1.0", "--seeds", "1")
SHORT = {"train.max_steps": 6, "eval.tasks": "[tinyworld/facts,tinyworld/skill]"}


@pytest.mark.slow
def test_grid_is_run_once_resumed_and_compared(hft, settings, tmp_path):
    command = ("compare", "--recipe", "tinyworld", *VARY, *settings(SHORT), "--output", tmp_path / "grid", "--json")
    found = json.loads(hft(*command).stdout)
    assert list(found["methods"]) == ["full", "half"]
    runs = [run for method in found["methods"].values() for setting in method for run in setting["runs"]]
    assert len(runs) == 2
    assert (tmp_path / "grid" / "frontier.svg").exists()
    results = {run["run"]: Run(tmp_path / run["run"]).rounds[0].result_path for run in runs}
    assert all((Run(path.parents[2]).page_path).exists() for path in results.values())
    written = {name: path.stat().st_mtime_ns for name, path in results.items()}

    missing = next(iter(results))
    results[missing].unlink()
    again = json.loads(hft(*command).stdout)
    changed = [name for name, path in results.items() if path.stat().st_mtime_ns != written[name]]
    assert changed == [missing]
    assert again["differences"] == found["differences"]  # the same seeds give the same run
