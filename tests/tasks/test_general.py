"""Tasks of a file: what is read, how it is asked, and how answers are matched."""

import json
from pathlib import Path

import pytest

from hftcli.errors import DataError
from hftcli.tasks import check_tasks, load_task
from hftcli.tasks.examples import Example
from hftcli.tasks.metrics import METRICS

CHOICE = {"question": "Which is a planet?", "choices": ["Mars", "Titan"], "answer": 1, "subject": "planets"}
OPEN = {"question": "who wrote hamlet", "answers": ["William Shakespeare", "Shakespeare"]}


def write(folder: Path, *lines: object) -> str:
    path = folder / "task.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_multiple_choice(tmp_path):
    task = load_task(write(tmp_path, CHOICE, "", CHOICE), max_examples=1)
    assert task.examples == (Example("Question: Which is a planet?\nAnswer:", " Titan", options=(" Mars", " Titan")),)
    assert (task.max_new_tokens, task.bare_prompt) == (None, "Answer:")


def test_closed_book(tmp_path):
    task = load_task(write(tmp_path, OPEN, {**OPEN, "question": "Who wrote Hamlet?"}))
    assert [example.prompt for example in task.examples] == [
        "Question: who wrote hamlet?\nAnswer:",
        "Question: Who wrote Hamlet?\nAnswer:",
    ]
    assert task.examples[0].options == (" William Shakespeare", " Shakespeare")
    assert (task.metric, task.bare_prompt) == ("closed_book", None)
    assert load_task(write(tmp_path, {**OPEN, "id": 7, "context": "", "image": None, "reasoning": "By his name."})).examples


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "there are no rows in it"),
        (["{"], "row 1: not JSON"),
        (["[1]"], "row 1: expected an object"),
        ([OPEN, "", {"question": "who"}], "row 3: 'answers': expected 1 or more texts, got none"),
        ([OPEN, {**OPEN, "answers": "Shakespeare"}], "row 2: 'answers': expected 1 or more texts, got \"Shakespeare\""),
        ([{"passage": "It is.", "question": " ", "answer": True}], "row 1: 'question': expected a text"),
        ([OPEN, {**OPEN, "context": "He was a poet."}], "row 2: the key 'context' carries meaning that would not be asked"),
        ([{**OPEN, "chat_template_kwargs": {"a": 1}}], "row 1: the key 'chat_template_kwargs' carries meaning"),
        ([{**OPEN, "choices": ["Marlowe", "Bacon"]}], "row 1: 'answer': expected"),
        ([OPEN, {**OPEN, "choices": ["Marlowe", "Bacon"]}], "row 2: the key 'choices' carries meaning"),
        ([{**CHOICE, "passage": "Titan is a moon."}], "row 1: the key 'passage' carries meaning"),
        ([{**CHOICE, "subject": "astronomy", "system": "Be brief."}], "row 1: the key 'system' carries meaning"),
        ([CHOICE, OPEN], "row 2: 'choices': expected 2 or more texts, got none"),
        ([{**CHOICE, "choices": ["Mars"]}], "row 1: 'choices': expected 2 or more texts"),
        ([{**CHOICE, "choices": ["Mars", 4]}], "row 1: 'choices': expected 2 or more texts"),
        ([{**CHOICE, "answer": 2}], "row 1: 'answer': expected the place of the right choice, 0 to 1, got 2"),
        ([{**CHOICE, "answer": True}], "row 1: 'answer': expected the place of the right choice, 0 to 1, got true"),
        ([{**CHOICE, "answer": "B"}], "row 1: 'answer': expected the place of the right choice, 0 to 1, got \"B\""),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, lines, fault):
    path = write(tmp_path, *lines)
    with pytest.raises(DataError) as raised:
        load_task(path)
    assert raised.value.message.startswith(f"{path}: {fault}")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"question": "a", "answers": ["b"], "answers": ["c"]}', r"row 1: the key 'answers' stands twice in one object"),
        ('{"question": "a", "answers": ["b"], "input": "of c"}', r"row 1: the key 'input' carries meaning"),
        ('{"question": "a", "answers": ["b"], "instruction": "Say it."}', r"row 1: the key 'instruction' carries meaning"),
    ],
)
def test_what_a_question_would_lose_is_refused(tmp_path, line, fault):
    (tmp_path / "asked.jsonl").write_text(line)
    with pytest.raises(DataError, match=fault):
        load_task(str(tmp_path / "asked.jsonl"))


def test_a_missing_file_is_named_with_its_neighbor(tmp_path):
    write(tmp_path, OPEN)
    with pytest.raises(DataError, match="no such file") as raised:
        check_tasks([str(tmp_path / "tsak.jsonl")])
    assert raised.value.fix == f"did you mean {tmp_path / 'task.jsonl'}?"
    with pytest.raises(DataError, match="has no train rows"):
        load_task(write(tmp_path, OPEN), split="train")


@pytest.mark.parametrize(
    ("prediction", "exact", "contained"),
    [
        ("William Shakespeare", 1, 1),
        ("the  shakespeare!", 1, 1),
        ("It was Shakespeare who did", 0, 1),
        ("Shakespeares", 0, 0),
        ("Marlowe", 0, 0),
        ("", 0, 0),
        ("The", 0, 0),
    ],
)
def test_answers_are_matched_but_for_their_form(prediction, exact, contained):
    example = Example("", " William Shakespeare", options=(" William Shakespeare", " Shakespeare", " ?"))
    metric = METRICS["closed_book"]
    assert (metric.strict(prediction, example), metric.lenient(prediction, example)) == (exact, contained)


def test_real_files(shared):
    folder = shared / "data" / "eval"
    names = "arc_challenge_test arc_easy_test hellaswag_val_1200 mmlu_test_40per_subject piqa_val".split()
    for name, num_rows in zip(names, (1172, 2376, 1200, 2280, 1838), strict=True):
        task = load_task(str(folder / f"{name}.jsonl"))
        assert len(task.examples) == num_rows
        assert all(example.answer in example.options for example in task.examples)
    for name, num_rows in (("nq_open_val", 3610), ("triviaqa_val5k", 5000), ("hotpotqa_dev_closedbook", 7405)):
        assert len(load_task(str(folder / f"{name}.jsonl")).examples) == num_rows
    assert len(load_task(str(folder / "gsm8k_test.jsonl")).examples) == 1319
    with pytest.raises(DataError, match="row 1: 'answers'"):
        load_task(str(folder / "boolq_val_1000.jsonl"))
