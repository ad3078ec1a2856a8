"""README's "Your own rows", word for word, on a local model in place of the one on the hub."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hftcli.runs.run import Run
from hftcli.runs.scores import HELD_OUT

ROOT = Path(__file__).parent.parent.parent
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The one file that is described and not shown.
UNSEEN = {"messages": [{"role": "user", "content": "When do you close?"}, {"role": "assistant", "content": "At 17."}]}


@pytest.fixture(scope="module")
def blocks() -> dict[str, str]:
    """What stands between the fences: rows, a try, a recipe, questions, the commands on a real model, a talk, a comparison."""
    section = re.search(r"^## Your own rows\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
    found = BLOCK.findall(section)
    assert [language for language, _ in found] == ["json", "", "yaml", "json", "", "", "", "", ""]
    names = ("my.jsonl", "try", "my.yaml", "known.jsonl", "run", "talk", "compare", "keep", "printed")
    return {name: text for name, (_, text) in zip(names, found, strict=True)}


@pytest.fixture(scope="module")
def place(blocks: dict[str, str], shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the section has its reader write."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("my.jsonl", "known.jsonl", "my.yaml"):
        (folder / name).write_text(blocks[name])
    (folder / "unseen.jsonl").write_text(json.dumps(UNSEEN))
    assert blocks["my.yaml"].count(HUB_ID) == 1
    (folder / "my.yaml").write_text(blocks["my.yaml"].replace(HUB_ID, str(shared / "models" / "MiniMind2-Small")))
    return folder


@pytest.fixture
def run(place: Path) -> Callable[..., str]:
    """Type a block of commands into a shell that has `hft` on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160", "PATH": path}

    def run_block(commands: str, typed: str = "") -> str:
        command = ["bash", "-e", "-c", commands]
        done = subprocess.run(command, cwd=place, input=typed, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_block


@pytest.mark.slow
def test_the_rows_are_tried_on_the_embedded_model(blocks, place, run):
    shown = run(blocks["try"])
    assert "⟦From 9 to 17.<|end|>⟧" in shown
    assert Run(place / "runs" / "try").last_finished.read_result().num_steps == 20


@pytest.mark.slow
@pytest.mark.timeout(3600)  # eighteen runs
def test_a_real_model_is_trained_asked_and_compared(blocks, place, run):
    shown = run(blocks["run"])
    round_ = Run(place / "runs" / "my").last_finished
    assert round_.read_result().num_steps == 3  # two rows are one step of 8, in three passes
    assert set(round_.read_scores().after) == {"known.jsonl", HELD_OUT}
    assert shown.count("36 of 36 frozen parameters bit-identical to the start") == 2  # in the summary, and by `hft verify`
    assert (place / "runs" / "my" / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(round_.checkpoint)
    assert sum(weights.numel() for weights in model.parameters()) == 25_829_888
    assert run(blocks["talk"], typed="When are you open?\n").strip()
    shown = run(blocks["compare"])
    assert len(list((place / "runs" / "compare-my").glob("*/recipe.yaml"))) == 18  # two shares, three rates, three seeds
    assert [shown.count(f"│ {method} ") for method in ("full", "half")] == [3, 3]
