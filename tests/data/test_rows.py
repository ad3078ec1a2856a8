"""Files of rows in the formats people have, and their faults by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from data.written_rows import (
    ROW,
    SYSTEM,
    read_rows,
    write_jsonl,
)
from datasets import Dataset

from hftcli import PACKAGE
from hftcli.data.formats import FORMATS, convert_row, detect_format
from hftcli.data.sources import find_sources
from hftcli.data.turns import Lost
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection

EXAMPLES = {
    "messages": (
        {"messages": [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b"}]},
        "ab",
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"}, "ab"),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, "a\n\nib"),
    "prompt-answer": ({"prompt": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
    "question-answer": ({"question": "a", "answer": "b"}, "ab"),
    "text": ({"text": "a"}, {"text": "a"}),
}
USER, ASSISTANT = ROW["messages"]


@pytest.mark.parametrize("name", [name for name, known in FORMATS.items() if known.objective == "sft"])
def test_format(name: str, tmp_path: Path):
    row, expected = EXAMPLES[name]
    if isinstance(expected, str):
        question, answer = {"role": "user", "content": expected[:-1]}, {"role": "assistant", "content": expected[-1]}
        expected = {"messages": [question, answer]}
    assert detect_format(list(row)) == name
    assert convert_row(row, name, Lost()) == expected
    rows, found = read_rows(write_jsonl(tmp_path / "rows.jsonl", [row, row]))
    assert (rows, found) == ([expected, expected], name)


def test_alpaca_without_input():
    for row in ({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "", "output": "b"}):
        assert convert_row(row, "alpaca", Lost())["messages"][0]["content"] == "a"


def test_system_turn_may_be_empty():
    messages = [{"role": "system", "content": ""}, *ROW["messages"]]
    assert convert_row({"messages": messages}, "messages", Lost()) == {"messages": messages}


def test_all_file_types_give_the_same_rows(tmp_path: Path):
    rows = [{"question": f"q{index}", "answer": "a", "extra": index if index else "text"} for index in range(5)]
    lines = write_jsonl(tmp_path / "lines.jsonl", rows)
    expected = read_rows(lines)[0]
    (tmp_path / "lines.json").write_text("\n" + Path(lines.path).read_text())
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    Dataset.from_list([{**row, "extra": 0} for row in rows]).to_parquet(tmp_path / "rows.parquet")
    for name in ("lines.json", "array.json", "rows.parquet"):
        assert read_rows(DataSection(path=str(tmp_path / name)))[0] == expected
    assert len(read_rows(lines.model_copy(update={"max_examples": 2}))[0]) == 2


def test_folder_has_a_file_for_each_split(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    with pytest.raises(DataError, match=r"there is no data\.split validation, it holds: train"):
        read_rows(DataSection(path=str(tmp_path), split="validation"))
    write_jsonl(tmp_path / "test.jsonl", [ROW, ROW])
    assert len(read_rows(DataSection(path=str(tmp_path)))[0]) == 1
    assert len(read_rows(DataSection(path=str(tmp_path), split="test"))[0]) == 2
    with pytest.raises(DataError, match=r"there is no data\.split dev, it holds: train, test"):
        read_rows(DataSection(path=str(tmp_path), split="dev"))


@pytest.mark.skipif(not (PACKAGE / "tinyworld").is_dir(), reason="tinyworld is not built")
def test_tinyworld_comes_with_the_package():
    rows, name = read_rows(DataSection(path="tinyworld/skill"))
    assert name == "messages"
    assert len(rows) > len(read_rows(DataSection(path="tinyworld/skill", split="test"))[0]) > 0


@pytest.mark.parametrize(
    ("format_name", "row", "message"),
    [
        ("prompt-answer", {"prompt": "a", "answer": None}, "field 'answer' is missing"),
        ("prompt-answer", {"prompt": "a"}, "field 'answer' is missing"),
        ("prompt-answer", {"prompt": "a", "answer": " \n"}, "field 'answer' is empty"),
        ("prompt-answer", {"prompt": "a", "answer": 4}, "field 'answer' is of type int, expected str"),
        ("prompt-answer", {"prompt": "a", "answer": "\ud83d"}, "field 'answer' holds a broken character at position 0"),
        ("messages", ["a"], "a row is of type list, expected dict"),
        ("messages", {"messages": "Hi"}, "field 'messages' is of type str, expected list"),
        ("messages", {"messages": []}, "field 'messages' is empty"),
        ("messages", {"messages": ["Hi"]}, "messages[0] is of type str, expected dict"),
        ("messages", {"messages": [{"content": "Hi"}]},
         "field 'messages[0].role' is None, expected one of system, developer, user, assistant, tool"),
        ("messages", {"messages": [USER, {"role": "bot", "content": "a"}]}, "field 'messages[1].role' is 'bot', expected"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "field 'messages[1].content' is empty"),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]},
         "messages[1].tool_calls[0] is of type int, expected dict"),
        ("messages", {"messages": [USER, ASSISTANT, USER]}, "the conversation ends with the user's turn"),
        ("messages", {"messages": [SYSTEM]}, "the conversation ends with the system's turn"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "field 'conversations[0].value' is missing"),
        ("sharegpt", {"conversations": [{"from": "ai", "value": "a"}]},
         "field 'conversations[0].from' is 'ai', expected one of system, developer, user, assistant, tool, function, human"),
        ("alpaca", {"instruction": "a", "output": ""}, "field 'output' is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "field 'input' is of type int"),
        ("question-answer", {"question": "a", "answer": ["b"]}, "field 'answer' is of type list"),
        ("prompt-completion", {"prompt": [USER], "completion": [USER, ASSISTANT]},
         "field 'completion' starts with the user's turn"),
        ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]}, "it holds messages, and row 1 plain text"),
    ],
)  # fmt: skip
def test_bad_row_is_named(format_name: str, row: Any, message: str, tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([EXAMPLES[format_name][0], row]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(DataSection(path=str(file)))
    assert caught.value.message.startswith(f"{file}: row 2: {message}")


def test_unknown_columns_are_listed_with_the_known_ones(tmp_path: Path):
    with pytest.raises(DataError, match="row 1: the columns input, target are of no known format") as caught:
        read_rows(write_jsonl(tmp_path / "rows.jsonl", [{"input": "a", "target": "b"}]))
    assert all(name in caught.value.fix for name in EXAMPLES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n\n{"question": "a",\n', ":3: not JSON: "),
        ("rows.json", b'[\n{"question": "a" "answer": "b"}]', ":2: not JSON: Expecting ',' delimiter"),
        ("rows.jsonl", b'{"question": "\xff"}', ":1: not UTF-8: invalid start byte at byte 15 of the line"),
        (
            "rows.csv",
            b"question,answer\n" + b"a,b\n" * 9000 + b"c,\xffd\n",
            ":9002: not UTF-8: invalid start byte at byte 3",
        ),
        ("rows.json", b'[\n{"question": "a",\n"answer": "\xc3"}]', ":3: not UTF-8: invalid continuation byte at byte 12 of"),
        ("rows.jsonl", b"\n", ": there are no rows in it"),
        ("rows.json", b"[]", ": there are no rows in it"),
        ("rows.parquet", b"PAR", ": not a Parquet file, or a damaged one: "),
        ("rows.csv", b"a,b", ": there are no rows in it"),
        ("rows.txt", b"a,b", " is of no type that hft reads"),
    ],
)
def test_bad_file_is_named(name: str, content: bytes, message: str, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(DataSection(path=str(file)))
    assert caught.value.message.startswith(f"{file}{message}")


def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("train.jsonl"), [ROW])
    for path in (str(tmp_path / "trian.jsonl"), "trian.jsonl", "./trian.jsonl"):
        with pytest.raises(DataError, match="no such file or folder") as caught:
            find_sources(DataSection(path=path))
        assert caught.value.fix.startswith("did you mean")
        assert caught.value.fix.endswith("train.jsonl?")
    with pytest.raises(DataError) as caught:
        find_sources(DataSection(path="none/of/these"))
    assert caught.value.fix == "there is no folder none/of either"
    with pytest.raises(DataError, match="no such file or folder, and the hub does not give it"):
        find_sources(DataSection(path="nobody/nothing"))
    with pytest.raises(DataError, match=r"data\.name is main, a configuration of a hub dataset"):
        find_sources(DataSection(path="train.jsonl", name="main"))
