"""Three sources in one run on a real model: questions as CSV, stories as text, and prompts with their completions."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hftcli.runs.run import Run

GREEN = "\x1b[1;32m"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "birds.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer"])
        writer.writerows([f"Which bird has the number {number}?", f"A heron, says {number}."] for number in range(30))
    stories = [{"text": f"There was a stone in the river, and it counted to {number}."} for number in range(40)]
    plain = [{"prompt": f"Fruit {number}:", "completion": " a pear"} for number in range(50)]
    for name, found in (("stories", stories), ("fruits", plain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.mark.slow
def test_a_mixture_is_shown_and_trained(hft, settings, rows, shared, tmp_path):
    weights = {"birds.csv": 2, "stories.jsonl": 1, "fruits.jsonl": 1}
    sources = [{"path": str(rows / name), "weight": weight} for name, weight in weights.items()]
    values = {
        "model.path": shared / "models" / "MiniMind2-Small", "data.path": "null", "data.sources": json.dumps(sources),
        "data.max_length": 64, "train.max_steps": 2, "train.global_batch_size": 8, "train.per_device_train_batch_size": 8,
    }  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    command = [sys.executable, "-m", "hftcli", "data", *settings(values)]
    colours = {**environment, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    shown = subprocess.run(command, capture_output=True, text=True, env=colours, check=True).stdout
    # By hand: the 30 questions are half of the whole.
    for name, share in (("birds.csv", "50.0%"), ("stories.jsonl", "25.0%"), ("fruits.jsonl", "25.0%")):
        [line] = [line for line in shown.splitlines() if name in line and "%" in line]
        assert share in line
        assert f"first sample of {rows / name}" in shown
    for trained in ("A heron, says 0.<|im_end|>", "There was a stone in the river, and it counted to", " a pear<|im_end|>"):
        assert f"{GREEN}{trained}" in shown
    hft("sft", "--output", tmp_path / "run", *settings(values))
    report = Run(tmp_path / "run").last_finished.read_result().data
    assert [source.num_sequences for source in report.sources] == [30, 15, 15]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    kept = manifest["rounds"]["00-sft"]["data"]["sources"]
    assert [(source["path"], source["weight"], source["format"]) for source in kept] == [
        (str(rows / "birds.csv"), 2.0, "question-answer"),
        (str(rows / "stories.jsonl"), 1.0, "text"),
        (str(rows / "fruits.jsonl"), 1.0, "prompt-completion"),
    ]
