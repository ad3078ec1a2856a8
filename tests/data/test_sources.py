"""Where rows come from: files of every type, folders, saved datasets, snapshots; mixtures; memory."""

import csv
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from data.written_rows import read_rows, write_jsonl
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from hftcli.data.mixture import draw_rows
from hftcli.data.prepare import prepare_dataset, prepare_pairs
from hftcli.data.samples import show_samples
from hftcli.data.sources import find_places, find_sources
from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection, SourceSection, TrainSection

ROWS = [{"question": f"q{index} é", "answer": f"a{index}"} for index in range(23)]


def write_file(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows in the type that the name asks for."""
    kind = path.name.partition(".")[2]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "arrow":
        Dataset.from_list(rows).save_to_disk(path.parent / "saving")
        next((path.parent / "saving").glob("*.arrow")).rename(path)
    elif kind == "ipc.arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(str(path), table.schema) as stream:
            stream.write_table(table)
    elif kind == "jsonl":
        path.write_text(lines)
    else:
        with pyarrow.output_stream(
            str(path), compression={"gz": "gzip", "bz2": "bz2", "zst": "zstd"}[path.suffix[1:]]
        ) as stream:
            stream.write(lines.encode())
    return path


def read(rows: list[Any]) -> list[list[str]]:
    return [[message["content"] for message in row["messages"]] for row in rows]


EXPECTED = [[row["question"], row["answer"]] for row in ROWS]
NAMES = ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "rows.arrow", "rows.ipc.arrow", "rows.jsonl.gz",
         "rows.jsonl.bz2", "rows.jsonl.zst"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_type_of_file_gives_the_same_rows(name: str, tmp_path: Path):
    file = write_file(tmp_path / name, ROWS)
    rows, found = read_rows(DataSection(path=str(file)))
    assert (read(rows), found) == (EXPECTED, "question-answer")
    assert len(read_rows(DataSection(path=str(file), max_examples=4))[0]) == 4
    [place] = find_places(DataSection(path=str(file)))
    assert place.count_rows() in (None, 23)
    [source] = find_sources(DataSection(path=str(file)))
    assert (source.path, source.num_bytes) == (str(file), file.stat().st_size)


def test_cells_are_text_as_they_stand(tmp_path: Path):
    (tmp_path / "rows.csv").write_text('question,answer,id\n007,NA,1\n"two\nlines, and ""quotes""",1.50,2\n')
    rows, _ = read_rows(DataSection(path=str(tmp_path / "rows.csv")))
    assert read(rows) == [["007", "NA"], ['two\nlines, and "quotes"', "1.50"]]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path):
    file = write_file(tmp_path / name, [{"question": str(index) * 99, "answer": "a"} for index in range(4000)])
    content = bytearray(file.read_bytes())
    for place in range(200, len(content) - 200, 97):  # neither head nor tail
        content[place] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(DataSection(path=str(file)))
    assert caught.value.message.startswith(str(file))


def test_what_a_table_filled_in_is_left_out(tmp_path: Path):
    """A column of structs has all keys in every row."""
    tools = [{"name": "a", "arguments": {"x": "1"}}, {"name": "b", "arguments": {"y": "2"}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": tool}]},
                {"role": "tool", "content": "t"},
                {"role": "assistant", "content": "v"},
            ]
        }
        for tool in tools
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist() != rows
    found, _ = read_rows(DataSection(path=str(tmp_path / "rows.parquet")))
    assert [row["messages"][1]["tool_calls"][0]["function"] for row in found] == tools


# ---- Folders -------------------------------------------------------------------------------------------


def test_folders_of_files(tmp_path: Path):
    """As `datasets` would divide them: by the names of files, of folders, or not at all."""
    first, second, third = ROWS[:5], ROWS[5:9], ROWS[9:12]
    layouts = {
        "names": {
            "train-00000-of-00002.parquet": first,
            "train-00001-of-00002.parquet": second,
            "test-00000-of-00001.parquet": third,
        },
        "folders": {"train/a.jsonl": first, "train/b.jsonl": second, "test/a.jsonl": third},
        "data": {"data/train-0.csv": first, "data/train-1.csv": second, "data/test-0.csv": third},
        "compressed": {"train.jsonl.gz": first + second, "test.jsonl.zst": third},
    }
    for layout, files in layouts.items():
        for name, rows in files.items():
            (tmp_path / layout / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(tmp_path / layout / name, rows)
        section = DataSection(path=str(tmp_path / layout))
        assert read(read_rows(section)[0]) == EXPECTED[:9], layout
        assert read(read_rows(section.model_copy(update={"split": "test"}))[0]) == EXPECTED[9:12], layout
        with pytest.raises(DataError, match=r"there is no data\.split dev, it holds: train, test"):
            find_sources(section.model_copy(update={"split": "dev"}))
    (tmp_path / "shards").mkdir()
    for name, rows in {"one.jsonl": first, "two.jsonl": second}.items():
        write_file(tmp_path / "shards" / name, rows)
    sources = find_sources(DataSection(path=str(tmp_path / "shards")))
    assert read(read_rows(DataSection(path=str(tmp_path / "shards")))[0]) == EXPECTED[:9]
    assert [(source.path, source.files) for source in sources] == [(str(tmp_path / "shards"), ("one.jsonl", "two.jsonl"))]
    write_file(tmp_path / "shards" / "two.jsonl", third)
    assert find_sources(DataSection(path=str(tmp_path / "shards")))[0].fingerprint != sources[0].fingerprint


def test_a_split_that_is_not_there_is_no_other(tmp_path: Path):
    """The only file of a folder, or a saved dataset, is of one split: of that which its name says, or of train."""
    for name, held in (("train.jsonl", "train"), ("my-test.jsonl", "test"), ("rows.jsonl", "train")):
        folder = tmp_path / name
        folder.mkdir()
        write_file(folder / name, ROWS)
        for split in ("train", "test", "validation"):
            section = DataSection(path=str(folder), split=split)
            if split == held:
                assert read(read_rows(section)[0]) == EXPECTED
            else:
                with pytest.raises(DataError, match=rf"there is no data\.split {split}, it holds: {held}$"):
                    find_places(section)
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl" / "rows.jsonl"), cache_dir=str(tmp_path / "c"))
    rows["train"].save_to_disk(tmp_path / "saved")
    assert read(read_rows(DataSection(path=str(tmp_path / "saved")))[0]) == EXPECTED
    with pytest.raises(DataError, match=r"there is no data\.split test, it holds: train$"):
        find_places(DataSection(path=str(tmp_path / "saved"), split="test"))
    with pytest.raises(DataError, match=r"data\.name is birds, a configuration of a hub dataset"):
        find_places(DataSection(path=str(tmp_path / "saved"), name="birds"))


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("a.jsonl", "b.csv", "c.jsonl"), "b.csv"),
        (("chat.jsonl", "my-train.jsonl"), "chat.jsonl"),
        (("train/a.jsonl", "more.jsonl"), "more.jsonl"),
        (("train.jsonl", "train.csv"), r"train\.(csv|jsonl)"),
        (("a.jsonl", *(f"{number}.tsv" for number in range(8)), *(f"b{number}.jsonl" for number in range(9))),
         "0.tsv, 1.tsv, 2.tsv, 3.tsv, 4.tsv and 3 more"),
    ],
)  # fmt: skip
def test_files_that_would_be_left_out_are_named(names: tuple, left: str, tmp_path: Path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_file(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=rf"its splits \(train\) leave out {left}, of another type"):
        find_places(DataSection(path=str(tmp_path)))


def test_what_is_no_file_of_rows_is_left_out(tmp_path: Path):
    """What `datasets` keeps beside rows, hidden files, and what a snapshot's card leaves out on purpose."""
    for name in ("my-train.jsonl", ".cache/notes.jsonl", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_file(tmp_path / name, ROWS)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(read_rows(DataSection(path=str(tmp_path)))[0]) == EXPECTED
    write_file(tmp_path / "others.csv", ROWS)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- {config_name: default, data_files: my-train.jsonl}\n---\n")
    assert read(read_rows(DataSection(path=str(tmp_path)))[0]) == EXPECTED


def test_saved_datasets(tmp_path: Path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS[:9]), "dev": Dataset.from_list(ROWS[9:])}).save_to_disk(tmp_path / "several")
    assert read(read_rows(DataSection(path=str(tmp_path / "one")))[0]) == EXPECTED
    assert read(read_rows(DataSection(path=str(tmp_path / "several"), split="dev"))[0]) == EXPECTED[9:]
    with pytest.raises(DataError, match=r"there is no data\.split test, it holds: train, dev"):
        find_places(DataSection(path=str(tmp_path / "several"), split="test"))
    [source] = find_sources(DataSection(path=str(tmp_path / "one")))
    assert source.num_bytes == sum(file.stat().st_size for file in (tmp_path / "one").glob("*.arrow"))


CARD = """---
configs:
- config_name: birds
  data_files:
  - {split: train, path: birds/first.jsonl}
  - {split: test, path: birds/second.jsonl}
- config_name: fruit
  data_files: fruit.csv
---
"""


def test_a_snapshot_of_the_hub(tmp_path: Path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "birds").mkdir()
    write_file(tmp_path / "birds" / "first.jsonl", ROWS[:5])
    write_file(tmp_path / "birds" / "second.jsonl", ROWS[5:9])
    write_file(tmp_path / "fruit.csv", ROWS[9:])
    path = str(tmp_path)
    assert read(read_rows(DataSection(path=path, name="birds"))[0]) == EXPECTED[:5]
    assert read(read_rows(DataSection(path=path, name="birds", split="test"))[0]) == EXPECTED[5:9]
    assert read(read_rows(DataSection(path=path, name="fruit"))[0]) == EXPECTED[9:]
    with pytest.raises(DataError, match=r"Config name is missing.*'birds', 'fruit'"):
        find_places(DataSection(path=path))  # fruit.csv is the only file at the top
    with pytest.raises(DataError, match=r"data\.name stones"):
        find_places(DataSection(path=path, name="stones"))
    with pytest.raises(DataError, match=r"data\.revision is main"):
        find_places(DataSection(path=path, revision="main"))


def test_no_more_is_read_than_is_asked_for(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    """A file that is not even JSON after the first rows, and a shard after the first that is none."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[:5])
    with Path(data.path).open("ab") as stream:
        stream.write(b"not JSON\n" * 100_000 + b"\xff\xff nor UTF-8\n")
    assert read(read_rows(data.model_copy(update={"max_examples": 5}))[0]) == EXPECTED[:5]
    (tmp_path / "shards").mkdir()
    write_file(tmp_path / "shards" / "train-0.parquet", ROWS)
    (tmp_path / "shards" / "train-1.parquet").write_bytes(b"no Parquet")
    [place] = find_places(DataSection(path=str(tmp_path / "shards")))
    assert len(place.files) == 2
    reading = place.read()
    assert [next(reading)["question"] for _ in range(23)] == [row["question"] for row in ROWS]
    # As the hub's are: streamed, by the reader of `datasets`.
    streamed = datasets.load_dataset(str(tmp_path / "shards"), split="train", streaming=True)
    assert [row["question"] for row in islice(streamed, 20)] == [row["question"] for row in ROWS[:20]]


# ---- Mixtures ------------------------------------------------------------------------------------------


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
