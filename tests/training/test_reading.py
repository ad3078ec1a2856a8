"""What a round reads before it has weights."""

import json

import pytest

from hftcli.training.reading import holds_questions


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
