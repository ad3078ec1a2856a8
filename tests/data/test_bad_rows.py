"""Bad rows are counted and named together, or dropped and counted; one fault does not hide the next."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data.written_rows import write_jsonl
from transformers import PreTrainedTokenizerBase

from hftcli.data.prepare import prepare_dataset, prepare_pairs
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection, TrainSection

GOOD = {"instruction": "a", "input": "", "output": "ok"}
# What is wrong with a row, by where it is found: while it is read, converted, rendered, tokenized.
BAD = {
    '{"instruction": "a", "output": "b"': "not JSON: Expecting ',' delimiter",
    '{"instruction": "a", "output": "b", "output": "c"}': "the key 'output' stands twice in one object",
    '{"instruction": "a", "output": "b", "meta": {"x": 1, "x": 2}}': "the key 'x' stands twice in one object",
    '["a", "b"]': "a row is of type list, expected dict",
    '{"instruction": "a", "output": ""}': "field 'output' is empty",
    '{"instruction": "a"}': "field 'output' is missing",
    '{"instruction": "a", "output": "b", "images": ["x.png"]}': "column 'images' carries meaning",
    '{"instruction": "lose", "output": "me"}': "turn 1, the user's: 'lose' is not in the text that the chat template makes",
    '{"instruction": "raise", "output": "b"}': "the chat template does not render the conversation: no",
    '{"instruction": "a", "output": "<|im_end|>"}': "turn 2 is nothing but special tokens",
    '{"instruction": "all", "output": "b"}': "all of it is trained",
}


@pytest.fixture
def moody(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A template that some rows displease."""
    plain = CHAT_TEMPLATES["chatml"].strip()
    tokenizer.chat_template = (
        "{% set said = messages[0].content %}{% if said == 'raise' %}{{ raise_exception('no') }}"
        "{% elif said == 'lose' %}{% generation %}{{ messages[1].content }}{% endgeneration %}"
        "{% elif said == 'all' %}{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
        "{% else %}" + plain + "{% endif %}"
    )
    return tokenizer


def write_lines(path: Path, lines: list[str]) -> DataSection:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return DataSection(path=str(path))


def prepare(data: DataSection, tokenizer: PreTrainedTokenizerBase, folder: Path, **changes: Any):
    return prepare_dataset(data.model_copy(update=changes), TrainSection(), tokenizer, folder / "cache")


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_with_what_to_do(line: str, moody: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_lines(tmp_path / "rows.jsonl", [json.dumps(GOOD), line])
    with pytest.raises(DataError) as caught:
        prepare(data, moody, tmp_path)
    place = f"{data.path}:2: " if "JSON" in BAD[line] or "twice in one" in BAD[line] else f"{data.path}: row 2: "
    assert caught.value.message.startswith(place + BAD[line])
    assert "data.bad_rows: drop" in caught.value.fix


def test_all_bad_rows_are_counted_and_ten_are_named(moody: PreTrainedTokenizerBase, tmp_path: Path):
    lines = [json.dumps(GOOD), *BAD, *BAD, json.dumps(GOOD)]
    data = write_lines(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError) as caught:
        prepare(data, moody, tmp_path)
    first, *named = caught.value.message.splitlines()
    assert first == f"{data.path}: {2 * len(BAD)} of {len(lines)} rows cannot be trained on; the first 10:"
    assert len(named) == 10
    for line, message in zip(named, list(BAD.values())[:10], strict=True):
        assert message in line
    assert caught.value.fix == "mend them, or leave them out with data.bad_rows: drop"


def test_bad_rows_are_dropped_counted_and_kept_in_the_report(
    moody: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lines = [json.dumps(GOOD), *BAD, json.dumps({**GOOD, "output": "fine"}), *BAD]
    data = write_lines(tmp_path / "rows.jsonl", lines)
    with caplog.at_level(logging.WARNING):
        dataset, report = prepare(data, moody, tmp_path, bad_rows="drop")
    assert [moody.decode(row["input_ids"]).count(word) for row, word in zip(dataset, ("ok", "fine"), strict=True)] == [1, 1]
    assert (report.num_rows, report.num_used, report.num_bad, report.num_dropped) == (len(lines), 2, 2 * len(BAD), 0)
    assert len(report.bad_rows) == 10
    for message, expected in zip(report.bad_rows, list(BAD.values())[:10], strict=True):
        assert expected in message
    assert f"{2 * len(BAD)} bad rows are left out" in caplog.text
    with pytest.raises(DataError, match=f"none of the {len(BAD)} rows can be trained on"):
        prepare(write_lines(tmp_path / "bad.jsonl", list(BAD)), moody, tmp_path, bad_rows="drop")


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".jsonl.zst", ".csv", ".tsv"])
def test_bad_rows_of_every_text_file(suffix: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [{"question": f"q{index}", "answer": "" if index % 3 == 1 else "a"} for index in range(40)]
    path = tmp_path / f"rows{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as stream:
            stream.write(text.encode())
    num_bad = sum(row["answer"] == "" for row in rows)
    with pytest.raises(DataError, match=rf"{path}: {num_bad} of 40 rows cannot be trained on; the first 10:"):
        prepare(DataSection(path=str(path)), tokenizer, tmp_path)
    _, report = prepare(DataSection(path=str(path)), tokenizer, tmp_path, bad_rows="drop")
    assert (report.num_bad, report.num_used) == (num_bad, 40 - num_bad)


def test_a_bad_row_of_a_folder_is_named_by_its_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    good, turns = {"prompt": "a", "completion": "b"}, [{"role": "user", "content": "a"}]
    talk = {"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]}
    folder = tmp_path / "rows"
    folder.mkdir()
    names = [f"train-0000{number}-of-00003.jsonl" for number in range(3)]
    for name, rows in zip(names, ([good, good], [{"prompt": "a"}, good, talk], [good, {"completion": 7}]), strict=True):
        write_jsonl(folder / name, rows)
    with pytest.raises(DataError) as caught:
        prepare(DataSection(path=str(folder)), tokenizer, tmp_path)
    assert caught.value.message.splitlines() == [
        f"{folder}: 3 of 7 rows cannot be trained on:",
        f"{folder / names[1]}: row 1: field 'completion' is missing",
        f"{folder / names[1]}: row 3: it holds messages, and {folder / names[0]}: row 1 plain text",
        f"{folder / names[2]}: row 2: field 'prompt' is missing",
    ]
    write_jsonl(folder / names[0], [])
    write_jsonl(folder / names[1], [{"picture": "a"}])
    with pytest.raises(DataError, match=f"^{folder / names[1]}: row 1: the columns picture are of no known format"):
        prepare(DataSection(path=str(folder)), tokenizer, tmp_path)


def test_bad_pairs_are_counted_as_rows_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    good = {"prompt": "Which?", "chosen": "a", "rejected": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [good, {**good, "rejected": "a"}, {**good, "chosen": 3}, good])
    with pytest.raises(
        DataError, match="2 of 4 rows cannot be trained on:\n.*row 2: fields 'chosen'.*\n.*row 3: field 'chosen'"
    ):
        prepare_pairs(data, tokenizer, tmp_path / "cache")
    _, report = prepare_pairs(data.model_copy(update={"bad_rows": "drop"}), tokenizer, tmp_path / "cache")
    assert (report.num_bad, report.num_used, report.num_sequences) == (2, 2, 4)


def test_a_pair_is_not_advised_a_switch_that_pairs_do_not_have(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    turns = [{"role": "system", "content": ""}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    with pytest.raises(DataError, match="all of it is trained") as caught:
        prepare_pairs(write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": turns, **answers}]), tokenizer, tmp_path / "cache")
    assert caught.value.fix == "mend the {% generation %} markers of the template; or leave it out with data.bad_rows: drop"
    with pytest.raises(DataError) as caught:
        prepare(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": turns, "completion": answers["chosen"]}]), tokenizer, tmp_path)
    assert "or set train.assistant_only_loss: false" in caught.value.fix


def test_a_row_of_another_kind_than_the_first_is_bad(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    plain = {"prompt": "a", "completion": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [plain, turns, plain, turns])
    with pytest.raises(DataError, match="2 of 4 rows") as caught:
        prepare(data, tokenizer, tmp_path)
    assert "row 2: it holds messages, and row 1 plain text" in caught.value.message
    assert prepare(data, tokenizer, tmp_path, bad_rows="drop")[1].num_used == 2
