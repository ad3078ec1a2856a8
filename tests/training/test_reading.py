"""What a round reads before it has weights."""

import json

import pytest

from hftcli.recipe.loading import load_recipe
from hftcli.runners import prepare_single
from hftcli.training.reading import holds_questions, read_assignment, read_named


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Where?", "answers": ["Here"]}, True),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 0}, True),
        ({"question": "How many?", "answer": "#### 7"}, False),  # GSM8K's rows can be trained on as they are
        ({"messages": []}, False),
        ({"picture": "x"}, False),
    ],
)
def test_rows_to_keep_may_be_questions(tmp_path, row: dict, expected: bool):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert holds_questions(path) == expected
    assert not holds_questions(tmp_path / "missing.jsonl")
    path.write_text("not JSON")
    assert not holds_questions(path)


def test_fine_tuning_asks_and_keeps_tasks_that_lie_under_a_root(tmp_path, monkeypatch):
    """From any folder, and though there is a folder by the task's name."""
    for task in ("birds", "FOMC"):
        (tmp_path / "rows" / task).mkdir(parents=True)
        (tmp_path / "rows" / task / "test.json").write_text(json.dumps([{"prompt": f"{task}:", "answer": "A"}] * 2))
    (tmp_path / "trace" / "FOMC").mkdir(parents=True)
    (tmp_path / "trace" / "FOMC" / "train.json").write_text(json.dumps([{"prompt": "another", "answer": "B"}]))
    monkeypatch.chdir(tmp_path)
    given = ["data.root=rows", "eval.tasks=[birds, trace/FOMC]", "freeze.grain=directions", "freeze.keep.path=trace/FOMC"]
    run, round_ = prepare_single(load_recipe("tinyworld", [*given, "output=run"]))
    run.lock.release()
    spec = round_.read_spec()
    assert (spec.data.root, spec.freeze.keep.path) == (str(tmp_path / "rows"), "trace/FOMC")
    monkeypatch.chdir(tmp_path.parent)
    assignment = read_assignment(spec)
    assert [[row.prompt for row in task.task.examples] for task in assignment.asked.values()] == [["birds:"] * 2, ["FOMC:"] * 2]
    kept, _ = read_named(spec, assignment.tokenizer, "freeze.keep", spec.freeze.keep)
    texts = [assignment.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in kept]
    assert [text.replace(" ", "") for text in texts] == ["FOMC:A"] * 2
