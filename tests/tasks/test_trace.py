"""TRACE: its rows as released, what is never cut of them, and the archive that becomes a root."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tasks.written_tasks import INVENTED, find

from hftcli.errors import DataError
from hftcli.tasks import check_tasks, load_task
from hftcli.tasks.trace import SHEETS, TRACE

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_trace.py"


@pytest.mark.parametrize("task", SHEETS)
def test_what_is_never_cut_of_a_trace_prompt(task, trace_root):
    cues = {
        "C-STANCE": "\n态度：",
        "FOMC": "\nStance:",
        "MeetingBank": "\nSummary:",
        "Py150": "",
        "ScienceQA": "\n\nAnswer:",
        "NumGLUE-cm": "\nAnswer:",
        "NumGLUE-ds": "\nAnswer:",
        "20Minuten": "\n\nSimplification:",
    }
    instruction = SHEETS[task].instruction
    for split in ("train", "eval", "test"):
        loaded = load_task(f"trace/{task}", trace_root, split)
        assert loaded.cut == ("start" if task == "Py150" else "end")
        for example in loaded.examples:
            start, end = example.body
            assert example.prompt[:start] == instruction
            assert example.prompt[end:].endswith(cues[task])
            assert example.prompt[end:].startswith(SHEETS[task].cue)
            assert 0 < start < end or (task == "Py150" and end == len(example.prompt))


def test_targets_and_choices_are_never_cut(trace_root):
    for task, word in (("C-STANCE", "对象"), ("ScienceQA", "Choices:\nA.")):
        example = load_task(f"trace/{task}", trace_root, max_examples=1).examples[0]
        assert word in example.prompt[example.body[1] :]


def test_lima_is_for_replay_only(trace_root):
    assert load_task("trace/Lima", trace_root, "train", max_examples=5).examples[4].answer
    assert load_task("Lima", trace_root, "train").examples
    with pytest.raises(DataError, match="trace/Lima has no test rows"):
        check_tasks(("trace/Lima",), trace_root)


def test_the_archive_becomes_a_root(tmp_path):
    archive, output = tmp_path / "archive.zip", tmp_path / "trace"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("TRACE-Benchmark/README.md", "")
        opened.writestr("../../outside.json", "[]")
        opened.writestr("TRACE-Benchmark/LLM-CL-Benchmark_5000/../../../FOMC/train.json", "[]")
        for task in TRACE.tasks:
            for split in ("train", "eval", "test"):
                rows = INVENTED if split != "test" else [{"prompt": f"Name {task}.", "answer": "yes"}]
                opened.writestr(f"TRACE-Benchmark/LLM-CL-Benchmark_500/{task}/{split}.json", json.dumps(rows))
    command = [sys.executable, str(SCRIPT), str(archive), "--size", "500", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is not the release of sha256 11152d50" in done.stderr
    assert f"data.root={output}" in done.stdout
    assert "trace/FOMC has 3/3/1 rows in train, eval and test; the official set has 5,000/496/496." in done.stdout
    assert find("trace", str(output)).tasks[0] == "trace/C-STANCE"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.zip", "trace"]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    other = subprocess.run([*command[:3], "--size", "1000", "--output", str(tmp_path / "new")], capture_output=True, text=True)
    assert other.returncode == 2
    assert "has no LLM-CL-Benchmark_1000" in other.stderr
