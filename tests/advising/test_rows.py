"""The rows of a search, divided."""

import json
import shutil
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.advising.rows import Order, as_asked, as_lesson, divide_rows
from hftcli.comparing.advice import list_candidates
from hftcli.data.formats import convert_row
from hftcli.data.turns import Lost
from hftcli.errors import DataError, InputError
from hftcli.measuring.drift import draw_texts
from hftcli.recipe.loading import load_recipe
from hftcli.tasks.general import convert_conversation

EMBEDDED = PACKAGE / "tinyworld" / "model"
TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here"}]
ASKED = {"question": "Where?", "answers": ["Here", "There"]}


@pytest.fixture
def order(tmp_path) -> Order:
    rows = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(100)]
    kept = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]} for n in range(9)]
    for name, lines in (("new", rows), ("kept", kept)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    new, keep = str(tmp_path / "new.jsonl"), str(tmp_path / "kept.jsonl")
    return Order("tinyworld", new, keep, 0.02, 60.0, 3, (), tmp_path / "search")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_row_is_trained_on_and_asked(order):
    rows = divide_rows(order)
    folder = order.folder / "rows"
    trained, held_out = read(rows.trained), read(folder / "held-out.jsonl")
    assert (len(trained), len(held_out), rows.num_held_out) == (90, 10, 10)
    assert {row["completion"] for row in trained + held_out} == set(map(str, range(100)))
    named, known = read(rows.named), read(folder / "known.jsonl")
    assert (len(named), len(known), rows.num_named) == (5, 4, 5)
    questions = {row["messages"][0]["content"] for row in named + known}
    assert questions == {f"Q{number}" for number in range(9)}
    before = rows.trained.read_bytes()
    divide_rows(order)
    assert rows.trained.read_bytes() == before


def test_without_rows_to_keep_the_model_s_own_texts_are_asked(order):
    rows = divide_rows(replace(order, keep=None))
    assert rows.named is None
    asked = read(order.folder / "rows" / "known.jsonl")
    assert asked
    assert all(row["text"].strip() and row["continuation"].strip() for row in asked)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED)
    chosen_by = {tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in draw_texts(model, tokenizer, model.device)}
    texts = [row["text"] + row["continuation"] for row in asked]
    assert len(set(texts)) == len(texts)
    assert {text for text in texts if any(other.startswith(text) for other in chosen_by)} <= {
        "Be brief."
    }  # which it often says


def test_what_stands_twice_is_not_trained_on_and_asked(order, tmp_path):
    for name in ("new", "kept"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text() * 2)
    rows = divide_rows(order)
    assert rows.num_rows == 100
    questions = [row["messages"][0]["content"] for row in read(rows.named)]
    questions += [row["messages"][0]["content"] for row in read(order.folder / "rows" / "known.jsonl")]
    assert sorted(questions) == sorted({f"Q{number}" for number in range(9)})


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_asked_goes_into_every_recipe(order, keep):
    rows = divide_rows(order if keep else replace(order, keep=None))
    for candidate in list_candidates(rows.trained, rows.named, rows.num_named):
        recipe = load_recipe(None, ["model.path=tinyworld", *rows.settings, *candidate.settings, "train.max_steps=5"], "sft")
        assert recipe.eval.tasks == (str(order.folder / "rows" / "known.jsonl"),)


@pytest.mark.parametrize("key", ["data", "keep"])
def test_of_rows_that_are_given_there_is_a_path_alone(order, tmp_path, key):
    """No key says the split: a file is to be given."""
    (tmp_path / "rows").mkdir()
    for split in ("test", "dev"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text((tmp_path / "new.jsonl").read_text())
    with pytest.raises(DataError, match="there is no split train, it holds: validation, test$") as caught:
        divide_rows(replace(order, **{key: str(tmp_path / "rows")}))
    assert caught.value.fix == "give a file"
    with pytest.raises(DataError, match=f"^--{key} {tmp_path}/no.jsonl: no such file"):
        divide_rows(replace(order, **{key: f"{tmp_path}/no.jsonl"}))


def test_a_folder_holds_one_search(order):
    divide_rows(order)
    with pytest.raises(InputError, match="holds another search"):
        divide_rows(replace(order, limit=0.5))
    with open(order.data, "a") as file:
        file.write(json.dumps({"prompt": "Say more", "completion": "more"}) + "\n")
    with pytest.raises(InputError, match="or one with other rows"):
        divide_rows(order)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ASKED, "context": "A house."}, "the key 'context' carries meaning"),
        ({**ASKED, "tools": [{"name": "look"}]}, "the key 'tools' carries meaning"),
        ({**ASKED, "train": False}, "the key 'train' carries meaning"),
        ({**ASKED, "weight": 0}, "the key 'weight' carries meaning"),
        ({"messages": TURNS, "tools": [{"name": "look"}]}, "a list of tools carries meaning"),
        ({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]}, "reasoning_content carries meaning"),
    ],
)
def test_a_question_is_not_asked_without_a_part_of_it(row: dict, said: str):
    with pytest.raises(DataError, match=f"kept.jsonl: row 3: {said} that would not be asked"):
        as_asked(row, "kept.jsonl: row 3")


def test_what_is_kept_is_asked_as_it_stands_and_trained_as_it_is_asked():
    talk = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    assert as_lesson(as_asked(talk, "f"), True) == as_asked(talk, "f") == talk
    asked = as_asked({"prompt": "Once upon", "completion": " a time"}, "f")
    assert asked == {"text": "Once upon", "continuation": " a time"}
    assert as_lesson(asked, True) == {"prompt": "Once upon", "completion": " a time"}
    assert as_lesson(ASKED, False) == {"prompt": "Question: Where?\nAnswer:", "completion": " Here"}
    turns = [{"role": "user", "content": "Question: Where?\nAnswer:"}, {"role": "assistant", "content": "Here"}]
    assert as_lesson(ASKED, True) == {"messages": turns}


@pytest.mark.parametrize(
    "mark", [{"train": False}, {"weight": 0}, {"loss_mask": 0}, None], ids=["train", "weight", "mask", "prompt"]
)
def test_an_answer_that_is_not_to_be_trained_is_asked_about_and_not_trained(order, tmp_path, mark):
    """Neither one that is marked, nor one that stands in a prompt; the question that a mark stands at trains nothing anyway."""
    first, second = [TURNS[0], {"role": "assistant", "content": "Nowhere"}], [{"role": "user", "content": "So?"}, TURNS[1]]
    rows = []
    for number in range(4):
        opening = {"role": "system", "content": f"{number}"}
        if mark is None:
            rows.append({"prompt": [opening, *first, second[0]], "completion": second[1:]})
        else:
            rows.append({"messages": [opening, *({**turn, **mark} for turn in first), *second]})
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    divided = divide_rows(order)
    named, known = read(divided.named), read(order.folder / "rows" / "known.jsonl")
    assert (len(named), len(known)) == (2, 2)
    for row in named:
        assert row["messages"][1:] == [first[0], {**first[1], "train": False}, *second]
        assert convert_row(row, "messages", Lost())["untrained"] == [2]
    for row in known:
        assert row["messages"][1:] == [*first, *second]
        assert convert_conversation(row, "f").answer == "Here"


def test_what_differs_in_its_marks_alone_is_not_trained_on_and_asked(order, tmp_path):
    talks = [[*TURNS, {"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}] for n in range(4)]
    marked = [[talk[0], {**talk[1], "train": False}, *talk[2:]] for talk in talks]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks + marked))
    rows = read(divide_rows(order).named) + read(order.folder / "rows" / "known.jsonl")
    assert sorted(row["messages"][2]["content"] for row in rows) == ["Q0", "Q1", "Q2", "Q3"]


def test_a_last_answer_that_is_not_to_be_trained_is_refused():
    row = {"messages": [*TURNS, TURNS[0], {**TURNS[1], "weight": 0}]}
    with pytest.raises(DataError, match="f: row 3: the last answer is what would be asked, and it is marked") as caught:
        as_asked(row, "f: row 3")
    assert caught.value.fix == "take the mark off, or leave the row out"


def test_a_model_without_a_template_is_asked_in_plain_text(order, tmp_path):
    model = shutil.copytree(EMBEDDED, tmp_path / "plain")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({key: config[key] for key in config if key != "chat_template"}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps({**ASKED, "question": f"Q{n}?"}) + "\n" for n in range(4)))
    rows = divide_rows(replace(order, model=str(model)))
    assert read(rows.named)[0]["prompt"].startswith("Question: Q")


def test_columns_that_json_has_no_form_for_are_text(order, tmp_path):
    days = [date(2026, 1, 1) + timedelta(days=number) for number in range(50)]
    columns = {
        "prompt": [f"Say {number}" for number in range(50)], "completion": ["yes"] * 50, "day": days,
        "price": [Decimal("1.50")] * 50, "raw": [b"x"] * 50,
    }  # fmt: skip
    Dataset.from_dict(columns).to_parquet(tmp_path / "new.parquet")
    rows = divide_rows(replace(order, data=str(tmp_path / "new.parquet")))
    first = read(rows.trained)[0]
    assert first["day"].startswith("2026-")
    assert (first["price"], first["raw"]) == ("1.50", "b'x'")


def test_what_cannot_be_asked_is_named(order, tmp_path):
    assert as_asked(ASKED, "f") == ASKED
    with pytest.raises(DataError, match="ends with none"):
        as_asked({"text": "A story."}, "f")
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(InputError, match=r"few.jsonl: too few rows, 1"):
        divide_rows(replace(order, data=str(few)))
