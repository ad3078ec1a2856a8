"""Prepared rows: what is counted, what the cache knows them by, a sample in pieces, real data."""

import dataclasses
import hashlib
import os
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from data.written_rows import CONVERSATION, CUE, INSTRUCTION, ROW, lay_out_chatml, make_long, tokenize_whole, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hftcli.data.cache import default_cache, hash_tokens
from hftcli.data.checks import check_positions
from hftcli.data.prepare import prepare_dataset, prepare_task
from hftcli.data.samples import decode_samples
from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.tasks.examples import Cut, Example, Task

# Counted


def test_rows_are_cut_and_dropped_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [{"prompt": "p" * length, "completion": "c" * 5} for length in (2, 8, 10, 12)]  # and the end: 8, 14, 16, 18
    data = write_jsonl(tmp_path / "rows.jsonl", rows).model_copy(update={"max_length": 10})
    calls = []
    dataset, report = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache", lambda *count: calls.append(count))
    assert [len(row["input_ids"]) for row in dataset] == [8, 10]
    assert [label != IGNORED for label in dataset[1]["labels"]] == [False] * 8 + [True] * 2
    assert report.model_dump(exclude={"sources", "key", "max_token_id", "tokens_digest"}, exclude_defaults=True) == {
        "format": "prompt-completion",
        "num_rows": 4,
        "num_used": 2,
        "num_dropped": 2,
        "num_truncated": 1,
        "num_sequences": 2,
        "num_tokens": 18,
        "num_trained_tokens": 6 + 2,
        "length_percentiles": {"p50": 16, "p90": 18, "p99": 18, "max": 18},
    }
    assert calls == [(0, 4), (4, 4)]


def test_no_row_left_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [ROW]).model_copy(update={"max_length": 8})
    with pytest.raises(DataError, match="none of the 1 rows has a trained token among its first 8 tokens"):
        prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")


def test_rows_of_a_task_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    whole, long, never = Example("[:]", "A", (2, 2)), make_long("x" * 100), Example("[:]", "A" * 60, (2, 2))
    data = DataSection(max_length=40)
    tokens, report = prepare_task(Task("a/b", (whole, long, never)), data, tokenizer, tmp_path)
    assert tokens["input_ids"] == [ids for ids, _ in tokenize_whole([whole], tokenizer)] + [tokens[1]["input_ids"]]
    assert len(tokens[1]["input_ids"]) == 40
    counts = report.model_dump(
        exclude={"sources", "key", "length_percentiles", "max_token_id", "tokens_digest"}, exclude_defaults=True
    )
    assert counts == {
        "format": "task", "num_rows": 3, "num_used": 2, "num_dropped": 1, "num_truncated": 1,
        "num_sequences": 2, "num_tokens": 5 + 40, "num_trained_tokens": 2 + 2,
    }  # fmt: skip
    assert report.length_percentiles["max"] == len(INSTRUCTION + CUE) + 100 + 2
    assert report.sources[0].path == "a/b"
    with pytest.raises(DataError, match=r"task a/b: none of the 1 questions fits in 40 tokens .* the shortest, row 1, has 64"):
        prepare_task(Task("a/b", (never,)), data, tokenizer, tmp_path)


def test_check_positions():
    check_positions(256, 256)
    check_positions(256, None)
    with pytest.raises(DataError, match=r"data\.max_length is 257, but the model has 256 positions"):
        check_positions(257, 256)


# The cache


def test_second_call_takes_the_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data, cache = write_jsonl(tmp_path / "rows.jsonl", [ROW]), tmp_path / "cache"

    def stamp_files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix != ".lock"}

    first, report = prepare_dataset(data, TrainSection(), tokenizer, cache)
    stamps = stamp_files()
    calls = []
    second, second_report = prepare_dataset(data, TrainSection(), tokenizer, cache, lambda *count: calls.append(count))
    assert (second.to_list(), second_report) == (first.to_list(), report)
    assert stamp_files() == stamps
    assert not calls
    assert (cache / report.key / "report.json").is_file()
    assert second.cache_files, "the tokens are mapped from disk, not held in memory"


def test_same_bytes_elsewhere_take_the_same_entry(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    reports = []
    for name in ("a.jsonl", "b.jsonl"):
        data = write_jsonl(tmp_path / name, [ROW])
        tokenizer(["a", "bbb"], truncation=True, max_length=2)  # leaves a setting behind
        reports.append(prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")[1])
    assert reports[0].key == reports[1].key
    assert [Path(report.sources[0].path).name for report in reports] == ["a.jsonl", "b.jsonl"]


def test_whatever_shapes_the_tokens_changes_the_key(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data, train = write_jsonl(tmp_path / "rows.jsonl", [ROW]), TrainSection()
    keys = []

    def add_key(data: DataSection, train: TrainSection) -> None:
        keys.append(prepare_dataset(data, train, tokenizer, tmp_path / "cache")[1].key)

    add_key(data, train)
    for change in ({"max_length": 64}, {"max_examples": 1}, {"split": "test"}):
        add_key(data.model_copy(update=change), train)
    for name in ("packing", "assistant_only_loss"):
        add_key(data, train.model_copy(update={name: not getattr(train, name)}))
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    for completion_only in (True, False):
        add_key(plain, train.model_copy(update={"completion_only_loss": completion_only}))
    add_key(write_jsonl(tmp_path / "others.jsonl", [ROW, ROW]), train)
    tokenizer.chat_template += " "
    add_key(data, train)
    tokenizer.bos_token = "<|im_start|>"
    add_key(data, train)
    tokenizer.add_tokens(["Hello"])
    add_key(data, train)
    assert len(set(keys)) == len(keys) == 12

    add_key(data, train.model_copy(update={"learning_rate": 1.0}))
    assert keys[-1] == keys[-2]


def test_the_cache_knows_a_task_by_all_that_shapes_its_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    example = make_long("x" * 100)
    other = dataclasses.replace(example, body=(0, 1))

    def key(*examples: Example, cut: Cut = "middle", **values: Any) -> str:
        return prepare_task(Task("a/b", examples, cut=cut), DataSection(max_length=60, **values), tokenizer, tmp_path)[1].key

    first = key(example)
    assert key(example, root="elsewhere") == first
    keys = [key(example, example), key(example, cut="start"), key(dataclasses.replace(example, answer="B"))]
    keys.append(prepare_task(Task("a/b", (other,)), DataSection(max_length=200), tokenizer, tmp_path)[1].key)
    keys.append(prepare_task(Task("a/b", (example,)), DataSection(max_length=200), tokenizer, tmp_path)[1].key)
    assert len({first, *keys}) == 6


def test_damaged_entry_is_made_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data, cache = write_jsonl(tmp_path / "rows.jsonl", [ROW]), tmp_path / "cache"
    first, report = prepare_dataset(data, TrainSection(), tokenizer, cache)
    expected = first.to_list()
    for file in (cache / report.key).iterdir():
        os.truncate(file, 0) if file.name != "report.json" else file.unlink()
    second, second_report = prepare_dataset(data, TrainSection(), tokenizer, cache)
    assert (second.to_list(), second_report) == (expected, report)


# What the tokens are


def make_tokens(kind: str, **columns: list[list[int]]) -> datasets.Dataset:
    features = datasets.Features({name: datasets.List(datasets.Value(kind)) for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def test_tokens_are_known_by_lengths_and_numbers_however_they_are_stored():
    def digest(*numbers: int) -> str:
        return hashlib.sha256(np.array(numbers, dtype="<i4").tobytes()).hexdigest()

    lines = f"input_ids {digest(3, 0, 1)} {digest(1, 2, 3, 4)}\nlabels {digest(3, 0, 1)} {digest(-100, 2, 3, 4)}\n"
    columns = {"labels": [[-100, 2, 3], [], [4]], "input_ids": [[1, 2, 3], [], [4]]}
    expected = hashlib.sha256(lines.encode()).hexdigest()
    whole = make_tokens("int32", **columns)
    assert hash_tokens(whole) == hash_tokens(make_tokens("int64", **columns)) == expected
    assert hash_tokens(datasets.concatenate_datasets([whole.select([0]), whole.select([1, 2])])) == expected
    assert hash_tokens(whole.select([2, 0, 1]).select([1, 2, 0])) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": [[1, 2, 3], [5]], "seq_lengths": [[2, 1], [1]]},
        {"input_ids": [[1, 2], [3, 4]], "seq_lengths": [[2, 1], [1]]},
        {"input_ids": [[4], [1, 2, 3]], "seq_lengths": [[1], [2, 1]]},
        {"input_ids": [[1, 2, 3], [4]], "seq_lengths": [[1, 2], [1]]},
        {"input_ids": [[1, 2, 3], [4]]},
    ],
)
def test_other_tokens_or_packs_are_other(other: dict[str, list[list[int]]]):
    tokens = make_tokens("int32", input_ids=[[1, 2, 3], [4]], seq_lengths=[[2, 1], [1]])
    assert hash_tokens(make_tokens("int32", **other)) != hash_tokens(tokens)


def test_entries_of_the_same_tokens_under_other_keys_have_one_digest(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    """Packed, they are others: what stands side by side is trained otherwise."""
    data, cache = write_jsonl(tmp_path / "rows.jsonl", [ROW, ROW]), tmp_path / "cache"
    first, longer = (
        prepare_dataset(data.model_copy(update={"max_length": length}), TrainSection(), tokenizer, cache)[1]
        for length in (512, 64)
    )
    assert first.key != longer.key
    assert first.tokens_digest == longer.tokens_digest
    packed, report = prepare_dataset(data, TrainSection(packing=True), tokenizer, cache)
    assert report.tokens_digest == hash_tokens(packed) != first.tokens_digest


def test_default_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HFT_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere/tokens")
    monkeypatch.delenv("HFT_CACHE")
    assert default_cache() == Path.home() / ".cache/hft/tokens"


# Reading it back


def test_sample_is_the_whole_text_in_pieces(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CONVERSATION}])
    dataset, _ = prepare_dataset(data, TrainSection(), minimind, tmp_path / "cache")
    pieces = groupby(lay_out_chatml(), key=lambda piece: piece[1])
    expected = [("".join(text for text, _ in group), trained) for trained, group in pieces]
    assert decode_samples(dataset, minimind, 0) == {"sample": expected}


@pytest.mark.parametrize("model", ["stories15M", "stories260K"])
def test_sample_of_a_sentencepiece_vocabulary(model: str, shared: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Once: 你", "completion": " upon  a 好"}])
    dataset, _ = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")
    assert decode_samples(dataset, tokenizer, 0) == {"sample": [("<s> Once: 你", False), (" upon  a 好</s>", True)]}


# Real data


@pytest.mark.parametrize(
    ("name", "format_name", "num_rows"),
    [
        ("sft/alpaca_en_demo.jsonl", "messages", 999),
        ("sft/oasst1_zh.jsonl", "messages", 766),
        ("sft/dolly3k.jsonl", "messages", 2996),
        ("sft/gsm8k_train.jsonl", "question-answer", 7473),
        ("trace/C-STANCE", "prompt-answer", 500),
        ("trace/FOMC", "prompt-answer", 500),
        ("trace/MeetingBank", "prompt-answer", 375),
        ("trace/Py150", "prompt-answer", 500),
        ("trace/ScienceQA", "prompt-answer", 500),
        ("trace/NumGLUE-cm", "prompt-answer", 282),
        ("trace/NumGLUE-ds", "prompt-answer", 500),
        ("trace/20Minuten", "prompt-answer", 500),
        ("trace/Lima", "prompt-answer", 300),
    ],
)
def test_real_data(name: str, format_name: str, num_rows: int, shared: Path, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    data = DataSection(path=str(shared / "data" / name), max_length=512)
    dataset, report = prepare_dataset(data, TrainSection(), minimind, tmp_path)
    assert (report.format, report.num_rows) == (format_name, num_rows)
    assert report.num_used == report.num_sequences == len(dataset)
    assert report.num_used + report.num_dropped == num_rows
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert max(lengths) <= 512
    assert sum(lengths) == report.num_tokens
    trained = [sum(label != IGNORED for label in labels) for labels in dataset["labels"]]
    assert min(trained) > 0
    assert sum(trained) == report.num_trained_tokens < report.num_tokens
    is_cut = report.length_percentiles["max"] > 512
    assert bool(report.num_truncated + report.num_dropped) == is_cut
