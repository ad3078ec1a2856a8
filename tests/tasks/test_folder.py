"""Folders of tasks with their sheets, and what is refused of them."""

import pytest
from tasks.written_tasks import find, write_task

from hftcli.data.formats import UNSUPPORTED_COLUMNS, UNSUPPORTED_CONTEXT
from hftcli.errors import DataError, InputError
from hftcli.tasks import load_task
from hftcli.tasks.folder import TaskSheet


def test_a_folder_of_tasks_with_its_sheet(tmp_path):
    root = write_task(tmp_path / "animals")
    task = load_task("animals", root)
    assert (task.name, task.metric, task.max_new_tokens, task.cut) == ("animals", "exact_match", 512, "middle")
    assert task.examples[0].body == (0, len("Say fox.\nAnswer:"))
    sheet = "metric: number\nmax_new_tokens: 4\ninstruction: 'Say '\ncue: \"\\nAnswer:\"\ncut: start\n"
    (tmp_path / "animals" / "task.yaml").write_text(sheet)
    task = load_task("animals", root, "train", max_examples=2)
    assert (task.metric, task.max_new_tokens, task.cut, len(task.examples)) == ("number", 4, "start", 2)
    assert [example.prompt[slice(*example.body)] for example in task.examples] == ["fox.", "hen."]


def test_the_cue_stands_where_it_is_last():
    sheet = TaskSheet(instruction="Q:", cue="\nA:")
    assert sheet.find_body("Q: one\nA: two\nA: three\nA:") == (2, 22)
    assert sheet.find_body("one\nA:") == (0, 3)
    assert sheet.find_body("Q: no cue") == (2, 9)


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ("metrc: sari", r"task\.yaml: unknown key 'metrc' \(did you mean metric\?\)"),
        ("metric: blue", r"task\.yaml: metric: unknown metric 'blue'"),
        ("max_new_tokens: 0", r"task\.yaml: max_new_tokens: .*greater than or equal to 1, got 0"),
        ("- metric", r"task\.yaml: the sheet: .*valid dictionary"),
        ("metric: [", r"task\.yaml: not YAML"),
    ],
)
def test_sheets_that_are_refused(sheet, message, tmp_path):
    root = write_task(tmp_path / "animals")
    (tmp_path / "animals" / "task.yaml").write_text(sheet)
    with pytest.raises(DataError, match=message):
        load_task("animals", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"prompt": "a", "answer": "b"}, {"prompt": "a"}]',
            r'row 2: expected \{"prompt": "\.\.\.", .* got \{"prompt": str\}',
        ),
        ('[{"prompt": "a", "answer": 3}]', r"row 1: .*\"answer\": int"),
        ('["a"]', r"row 1: .*got a str"),
        ('[{"prompt": "a", "answer": "b", "answer": "c"}]', "the key 'answer' stands twice in one object"),
        ('[{"prompt": "a", "answer": "b", "input": "c"}]', "row 1: the key 'input' carries meaning"),
        ('{"prompt": "a", "answer": "b"}', "expected a JSON array of rows"),
        ("[]", "got an empty array"),
        ('{"prompt": "a"}\n{"prompt": "b"}', r"test\.json:2: not JSON: Extra data"),
        ("[{", r"test\.json:1: not JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_rows_that_are_refused(text, message, tmp_path):
    root = write_task(tmp_path / "animals")
    (tmp_path / "animals" / "test.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as raised:
        load_task("animals", root)
    assert str(tmp_path / "animals" / "test.json") in raised.value.message


def test_a_row_that_says_more_than_its_prompt_is_refused(tmp_path):
    """Whatever rows to train on may not hold beside these two columns, and what a question is about; empty, it says nothing."""
    row = {"prompt": "Who is it?", "answer": "Ann", "id": 7}
    refused = {*UNSUPPORTED_COLUMNS, *UNSUPPORTED_CONTEXT}
    for split in ("train", "test"):
        for key in sorted(refused):
            root = write_task(tmp_path / "people", **{split: [row, {**row, key: "Ann came in."}]})
            with pytest.raises(DataError, match=rf"{split}\.json: row 2: the key '{key}' carries meaning"):
                load_task("people", root, split)
    root = write_task(tmp_path / "people", test=[{**row, **dict.fromkeys(refused)}, {**row, "context": " ", "tools": []}])
    assert len(load_task("people", root).examples) == 2


def test_folders_that_are_refused(tmp_path):
    root = write_task(tmp_path / "animals")
    with pytest.raises(InputError, match="unknown task 'animal'") as raised:
        find("animal", root)
    assert raised.value.fix == "did you mean animals?"
    (tmp_path / "animals" / "test.json").unlink()
    with pytest.raises(DataError, match=r"animals/test\.json is missing"):
        find("animals", root)
    with pytest.raises(DataError, match="no such folder"):
        find("animals", root + "/nowhere")
    write_task(tmp_path / "trace")
    with pytest.raises(InputError, match="'trace' is a benchmark, not a task"):
        find(("animals", "trace"), root)
    write_task(tmp_path / "LLM-CL-Benchmark_500" / "C-STANCE")
    with pytest.raises(DataError, match="is missing") as raised:
        find("trace", root)
    assert raised.value.fix.endswith("LLM-CL-Benchmark_500")
