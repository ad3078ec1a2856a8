"""Every way to choose what trains (scripts/ways.json): what is planned is what a run holds, and what is frozen is proved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "ways.json"
CHANGING = ("redrawn", "entries, 5 %, SpIEL")  # what trains changes, which pieces of it cannot follow
# With settings of a larger model, whose widths they divide, or whose tokens they name.
UNSUITED = ("blocks, quiet", "quiet", "VeRA", "OFT", "BOFT", "OSF", "SHiRA", "LoHa", "LoKr", "LN tuning", "trainable tokens")


def check_way(name: str, way: dict) -> None:
    """AdamW has two numbers for each that trains, and there is a gradient of it; and what is frozen is so."""
    for key, factor in (("gradient_bytes", 4), ("state_bytes", 8)):
        assert way[key]["planned"] == factor * way["trained"], name
        # Until a round has scored its start, the plan is of a draw in their place, whose units are of other sizes.
        most = 0.05 if name == "half, by Fisher" else 0
        assert way[key]["measured"] == pytest.approx(way[key]["planned"], rel=most, abs=0), name
    if way["counts_adapter"]:
        assert way["flops"]["measured"] == pytest.approx(way["flops"]["planned"], abs=0.03), name
    assert way["passed"], name
    assert (way["frozen"] == "nothing is frozen") is (name in ("full", "redrawn: half"))  # the one after the other trains
    refused = {launch for launch, refusal in way["launches"].items() if refusal is not None}
    assert "one" not in refused
    if name.startswith(CHANGING):
        assert refused == {"1", "2", "3"}, name


def test_what_a_real_model_held_is_what_is_planned():
    """Two steps of each way, and fifty of halves that are redrawn."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["MiniMind2-Small"]
    assert len(known) >= 37
    for name, way in known.items():
        check_way(name, way)


@pytest.mark.slow
def test_it_is_so_on_a_small_model(shared: Path, tmp_path: Path):
    """Measured anew."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["MiniMind2-Small"]
    names = [name for name in known if name not in UNSUITED]
    command = [sys.executable, ROOT / "scripts" / "measure_ways.py", "--model", shared / "models" / "stories260K"]
    options = ["--output", tmp_path, "--results", tmp_path / "ways.json", "--ways", *names]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ways.json").read_text(encoding="utf-8"))["stories260K"]
    assert list(found) == names
    for name, way in found.items():
        check_way(name, way)
