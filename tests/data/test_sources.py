"""Mixtures of sources, texts, and memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.written_files import write_file
from data.written_rows import write_jsonl
from transformers import PreTrainedTokenizerBase

from hftcli.data.mixture import draw_rows
from hftcli.data.prepare import prepare_dataset, prepare_pairs
from hftcli.data.samples import show_samples
from hftcli.data.tokens import IGNORED
from hftcli.recipe.sections import DataSection, SourceSection, TrainSection


def write_sources(folder: Path) -> dict[str, Path]:
    """Chat as CSV, stories, and prompts with their completions: a word of its own in each."""
    chat = [{"question": f"bird {index}?", "answer": "heron"} for index in range(120)]
    text = [{"text": "stone " * (5 + index % 90)} for index in range(60)]
    plain = [{"prompt": f"fruit {index}: ", "completion": "pear"} for index in range(300)]
    paths = {"chat": write_file(folder / "chat.csv", chat)}
    for name, rows in {"text": text, "plain": plain}.items():
        paths[name] = folder / f"{name}.jsonl"
        write_jsonl(paths[name], rows)
    return paths


@pytest.mark.parametrize("packing", [False, True])
def test_three_sources_are_mixed_by_their_weights(packing: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    paths = write_sources(tmp_path)
    weights = {"chat": 2, "text": 1, "plain": 1}
    data = DataSection(
        sources=[{"path": str(paths[name]), "weight": weight} for name, weight in weights.items()], max_length=128
    )
    rows, report = prepare_dataset(data, TrainSection(packing=packing), tokenizer, tmp_path / "cache")
    # By hand: the 120 chats are half of the whole, which is 240 then.
    assert [source.num_sequences for source in report.sources] == [120, 60, 60]
    assert [source.num_rows for source in report.sources] == [120, 60, 300]
    assert [source.format for source in report.sources] == ["question-answer", "text", "prompt-completion"]
    assert report.format == "question-answer + text + prompt-completion"
    text = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    assert text.count("heron") == 120
    assert text.count("pear") == 60
    assert (
        sum(len(row["input_ids"]) for row in rows) == report.num_tokens == sum(source.num_tokens for source in report.sources)
    )
    trained = sum(label != IGNORED for row in rows for label in row["labels"])
    assert trained == report.num_trained_tokens == sum(source.num_trained_tokens for source in report.sources)
    if not packing:
        kinds = ["heron" in tokenizer.decode(row["input_ids"]) for row in rows]
        assert 20 < sum(kinds[:80]) < 60  # mixed, and not one after the other
    shown = show_samples(rows, report, tmp_path / "cache", tokenizer)
    assert list(shown) == [f"sample of {path}" for path in paths.values()]
    for word, pieces in zip(("heron", "stone", "pear"), shown.values(), strict=True):
        assert word in "".join(text for text, trained in pieces if trained)


def test_a_mixture_is_drawn_reproducibly(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    paths = write_sources(tmp_path)

    def prepare(cache: str, **values: Any) -> tuple[list, str]:
        sources = [
            {"path": str(paths[name]), "weight": 1, "max_examples": values.pop(name, None)} for name in ("chat", "plain")
        ]
        rows, report = prepare_dataset(DataSection(sources=sources, **values), TrainSection(), tokenizer, tmp_path / cache)
        return rows.to_list(), report.key

    first, key = prepare("a")
    assert prepare("b") == (first, key)
    other, other_key = prepare("a", seed=1)
    assert other != first
    assert other_key != key
    assert len(prepare("a", chat=10)[0]) == 20
    assert len(prepare("a", max_examples=7)[0]) == 14
    moved = paths["chat"].rename(tmp_path / "moved.csv")
    paths["chat"] = moved
    assert prepare("a") == (first, key)


def test_sources_without_weights_are_taken_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    paths = write_sources(tmp_path)
    data = DataSection.model_validate([{"path": str(paths["chat"]), "max_examples": 30}, {"path": str(paths["plain"])}])
    rows, report = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")
    assert len(rows) == report.num_used == 330
    assert report.unused_columns == ()
    texts = {tokenizer.decode(row["input_ids"]) for row in rows}
    assert len(texts) == 330
    assert "bird 29?" in "".join(texts)
    assert "bird 30?" not in "".join(texts)


def test_pairs_are_mixed_as_rows_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{n}", "chosen": "x", "rejected": "y"} for n in range(20)])
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.jsonl"), "weight": 1}]
    pairs, report = prepare_pairs(DataSection(sources=sources), tokenizer, tmp_path / "cache")
    assert [source.num_sequences for source in report.sources] == [20, 7]  # 20 of 26.67, and a quarter of that
    assert (len(pairs), report.num_sequences) == (27, 54)
    assert len(show_samples(pairs, report, tmp_path / "cache", tokenizer)) == 4


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((100, 300), (1, 1), (100, 100)),
        ((100, 300), (1, 3), (100, 300)),
        ((100, 300), (3, 1), (100, 33)),
        ((100, 300), (0.1, 0.9), (33, 300)),
        ((5, 1000), (1, 1000), (1, 1000)),
        ((4, 4), (None, None), (4, 4)),
    ],
)
def test_draws_keep_the_shares(sizes: tuple, weights: tuple, expected: tuple):
    drawn = draw_rows(sizes, weights, 42)
    assert tuple(map(len, drawn)) == expected
    for rows, size in zip(drawn, sizes, strict=True):
        assert len(np.unique(rows)) == len(rows)
        assert rows.max() < size


def test_sources_that_contradict_are_refused():
    source = {"path": "a.jsonl"}
    for values, message in (
        ({"sources": [source], "path": "b.jsonl"}, "path and sources are both given"),
        ({"sources": [source], "split": "test"}, "split and sources are both given"),
        ({"sources": [source, {**source, "weight": 1}]}, "give every one of the sources a weight, or none"),
        ({"sources": [{**source, "weight": 0}]}, "greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DataSection(**values)
    assert DataSection(path="a.jsonl", name="n", revision="r").parts == (SourceSection(path="a.jsonl", name="n", revision="r"),)


# ---- Text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_of_a_text_is_trained_once(packing: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    texts = ["".join(chr(97 + (index * 7 + place) % 26) for place in range(5 + index * 11)) for index in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts]).model_copy(update={"max_length": 32})
    rows, report = prepare_dataset(data, TrainSection(packing=packing), tokenizer, tmp_path / "cache")
    pieces = []
    for row in rows:
        start = 0
        assert len(row["input_ids"]) <= 32
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            pieces.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    # The first token of a piece is predicted from nothing: that of a text is its first, that of a later piece stands before it.
    targets = sorted(label for _, labels in pieces for label in labels[1:])
    assert IGNORED not in targets
    ends = [[*text.encode()[1:]] for text in texts]
    spelled = [tokenizer.convert_ids_to_tokens(target) for target in targets]
    expected = [chr(byte) for text in ends for byte in text] + ["<|im_end|>"] * len(texts)
    assert sorted(spelled) == sorted(expected)
    assert report.num_used == len(texts)
    assert (report.num_dropped, report.num_truncated) == (0, 0)


# ---- More rows than memory -----------------------------------------------------------------------------

MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
from transformers import AutoTokenizer
from hftcli.data.prepare import prepare_dataset
from hftcli.recipe.sections import DataSection, TrainSection

def read_memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

def watch():
    while True:
        seen.append(read_memory())
        time.sleep(0.02)

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
seen = [read_memory()]
threading.Thread(target=watch, daemon=True).start()
data, train = DataSection(path=sys.argv[2], max_length=2048), TrainSection(packing=True)
rows, report = prepare_dataset(data, train, tokenizer, Path(sys.argv[3]))
print(json.dumps([max(seen) - seen[0], report.num_tokens, len(rows)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory that is no file's is read from /proc")
def test_memory_does_not_grow_with_the_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    """In KiB: what 4 and 32 MB of rows take beyond the imports, 8 bytes to every token on disk."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    taken = []
    for num_rows in (2_000, 16_000):
        path = tmp_path / f"{num_rows}.jsonl"
        write_jsonl(path, [{"prompt": f"{row}: ", "completion": "word " * 380} for row in range(num_rows)])
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "tokenizer"), str(path), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        memory, num_tokens, num_sequences = json.loads(done.stdout)
        assert num_sequences == num_rows
        assert num_tokens > num_rows * 1900
        taken.append(memory)
    assert taken[1] < taken[0] + 30_000, taken  # the tokens of the larger one are 243 MB
