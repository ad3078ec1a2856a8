"""Files of every type, folders, saved datasets and snapshots of the hub."""

from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pytest
from data.written_files import EXPECTED, ROWS, read, write_file
from data.written_rows import read_rows, write_jsonl
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from hftcli.data.sources import find_places, find_sources
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection

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


def test_a_source_is_called_by_its_own_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where it is found missing as late as on the hub."""
    for split in ("test", "dev"):
        (tmp_path / "rows").mkdir(exist_ok=True)
        write_file(tmp_path / "rows" / f"{split}.jsonl", ROWS)
    good, bad = {"path": str(tmp_path / "rows"), "split": "dev"}, {"path": str(tmp_path / "rows")}
    with pytest.raises(DataError, match=r"there is no data\.sources\.1\.split train, it holds: validation, test$") as caught:
        find_places(DataSection(sources=(good, bad)))
    assert caught.value.fix == "set data.sources.1.split"
    with pytest.raises(DataError, match=r"data\.sources\.0\.name is birds"):
        find_places(DataSection(sources=({"path": str(tmp_path / "rows" / "dev.jsonl"), "name": "birds"}, good)))

    def refuse(*given, **options):
        raise ValueError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    hub = find_places(DataSection(sources=(good, {"path": "owner/rows"})))[1]
    for ask in (lambda: list(hub.read()), hub.describe):
        with pytest.raises(
            DataError, match=r"^data\.sources\.1\.path owner/rows: no such file or folder, and the hub"
        ) as caught:
            ask()
        assert caught.value.fix.endswith("its data.sources.1.name and data.sources.1.split")


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
