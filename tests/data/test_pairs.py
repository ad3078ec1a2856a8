"""Preference rows to tokens: the shapes people write them in, faults, the border of the prompt, the cut."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data.written_rows import read_rows
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hftcli import PACKAGE
from hftcli.data.formats import detect_format
from hftcli.data.prepare import deal_pairs, prepare_pairs
from hftcli.data.samples import decode_samples
from hftcli.data.templates import find_template
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection

USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}
GOOD, BAD = {"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "What?"}
TURNS = [USER, {"role": "assistant", "content": "Yes?"}, OTHER]
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
LONG_PAIR = {"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
TEXT = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}


def write_rows(folder: Path, *rows: Any) -> DataSection:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(path=str(path))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model")


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("prompt-pair", TEXT, TEXT),
        ("prompt-pair", PAIR, PAIR),
        ("prompt-pair", {"prompt": [USER], "chosen": "Hello!", "rejected": "What?"}, PAIR),
        ("prompt-pair", {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        # UltraFeedback binarized: the prompt is repeated
        ("prompt-pair", {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0}, PAIR),
        ("conversation-pair", {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, LONG_PAIR),
        # hh-rlhf
        (
            "conversation-pair",
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Ho\n\nAssistant: Hello!",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Ho\n\nAssistant: What?",
            },
            LONG_PAIR,
        ),
        (
            "sharegpt-pair",
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello!"},
                "rejected": {"from": "gpt", "value": "What?"},
            },
            PAIR,
        ),
    ],
)
def test_format(name: str, row: dict, expected: dict, tmp_path: Path):
    assert detect_format(list(row), "dpo") == name
    rows, found = read_rows(write_rows(tmp_path, row, row), "dpo")
    assert (rows, found) == ([expected, expected], name)


@pytest.mark.parametrize(
    ("first", "row", "message"),
    [
        (TEXT, {"prompt": "Hi", "chosen": "a"}, "field 'rejected' is missing"),
        (TEXT, {"prompt": "Hi", "chosen": "a", "rejected": " "}, "field 'rejected' is empty"),
        (TEXT, {"prompt": "Hi", "chosen": "a", "rejected": "a"}, "fields 'chosen' and 'rejected' are equal"),
        (TEXT, {"prompt": "Hi", "chosen": "a", "rejected": ["a"]}, "field 'rejected' is of type list"),
        (TEXT, PAIR, "it holds messages, and row 1 plain text"),
        (PAIR, {**PAIR, "chosen": [USER, GOOD]}, "field 'chosen' has the turns user, assistant"),
        (PAIR, {**PAIR, "prompt": [USER, GOOD]}, "the prompt ends with the assistant's turn"),
        (PAIR, {"prompt": "Ho", **WHOLE}, "field 'prompt' differs from the prompt within"),
        (WHOLE, {**WHOLE, "rejected": [OTHER, BAD]}, "'chosen' and 'rejected' differ in their prompt"),
        (WHOLE, {"chosen": [GOOD], "rejected": [BAD]}, "'chosen' and 'rejected' have no prompt"),
        (WHOLE, {"chosen": "a", "rejected": "b"}, "field 'chosen' is text that does not start with a turn of hh-rlhf"),
    ],
)
def test_bad_row_is_named(first: dict, row: dict, message: str, tmp_path: Path):
    data = write_rows(tmp_path, first, row)
    with pytest.raises(DataError) as caught:
        read_rows(data, "dpo")
    assert caught.value.message.startswith(f"{data.path}: row 2: {message}")


def test_rows_of_the_other_objective_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="they are preference pairs") as caught:
        read_rows(write_rows(tmp_path, {"chosen": "a", "rejected": "b"}))
    assert "hft dpo" in caught.value.fix
    with pytest.raises(DataError, match="of no known format for `hft dpo`"):
        read_rows(write_rows(tmp_path, {"messages": [USER, GOOD]}), "dpo")


def test_tokens_are_the_template_s_up_to_the_end_of_the_answer(shared: Path, tmp_path: Path):
    minimind = AutoTokenizer.from_pretrained(shared / "models" / "MiniMind2-Small")
    data = DataSection(path=str(shared / "data" / "preference" / "hh_harmless_test.jsonl"), max_examples=50)
    pairs, report = prepare_pairs(data, minimind, tmp_path)
    rows, _ = read_rows(data, "dpo")
    template = find_template(minimind)
    for pair, row in zip(pairs, rows, strict=True):
        assert minimind.decode(pair["prompt_ids"]) == template.render(row["prompt"], add_generation_prompt=True)
        for name in ("chosen", "rejected"):
            whole = template.render(row["prompt"] + row[name])
            assert minimind.decode(pair["prompt_ids"] + pair[f"{name}_ids"]) == whole.rstrip()
            assert pair[f"{name}_ids"][-1] == minimind.eos_token_id
    assert (report.format, report.num_used, report.num_sequences) == ("prompt-pair", 50, 100)
    assert report.num_tokens == sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)


def test_plain_text_ends_with_the_end_token(shared: Path, tmp_path: Path):
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    pairs, _ = prepare_pairs(write_rows(tmp_path, TEXT), stories, tmp_path / "cache")
    shown = decode_samples(pairs, stories, 0)
    assert "".join(text for text, _ in shown["chosen"]) == "<s> HiHello!</s>"
    assert shown["rejected"][-1] == ("What?</s>", True)


def test_the_cut_counts_what_it_makes_the_same_and_drops_what_it_leaves_empty(tokenizer, tmp_path: Path, caplog):
    turn = {"role": "user", "content": "Do you know the job of Mami?"}
    answers = [f"Certainly! It is {name}." for name in ("smith", "miller")]
    rows = [
        {"prompt": [turn], "chosen": answers[0], "rejected": answers[1]},  # the same up to the fourth token
        {"prompt": [turn], "chosen": answers[0], "rejected": "smith, obviously."},
        {"prompt": [turn] * 3, "chosen": answers[0], "rejected": answers[1]},  # the prompt alone fills the length
    ]
    whole, _ = prepare_pairs(write_rows(tmp_path, *rows), tokenizer, tmp_path / "cache")
    start, length = len(whole[0]["prompt_ids"]), len(whole[2]["prompt_ids"])
    data = write_rows(tmp_path, *rows).model_copy(update={"max_length": start + 3})
    assert start + 3 < length
    with caplog.at_level(logging.WARNING):
        kept, report = prepare_pairs(data, tokenizer, tmp_path / "cache")
    assert (report.num_rows, report.num_used, report.num_dropped, report.num_identical) == (3, 2, 1, 1)
    assert "makes the answers of 1 pairs the same" in caplog.text
    assert all(len(pair["prompt_ids"]) + len(pair["chosen_ids"]) <= data.max_length for pair in kept)
    dropped, report = prepare_pairs(data.model_copy(update={"drop_identical": True}), tokenizer, tmp_path / "cache")
    assert (report.num_used, report.num_dropped, report.num_identical) == (1, 2, 1)
    assert dropped[0] == kept[1]
    with pytest.raises(DataError, match="none of the 3 pairs has two answers among its first 8 tokens"):
        prepare_pairs(data.model_copy(update={"max_length": 8}), tokenizer, tmp_path / "cache")


TRIMMING = (
    "{% for turn in messages %}<|{{ turn['role'] }}|>{{ turn['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(("other", "what"), [("Hello! ", "text"), ("HELLO!", "tokens")])
def test_answers_that_become_the_same_are_no_preference(tmp_path: Path, other: str, what: str, caplog):
    """By a chat template that trims them, or a tokenizer that writes them small; no cut is to blame."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model")
    tokenizer.chat_template = TRIMMING
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    same = {**PAIR, "rejected": [{**GOOD, "content": other}]}
    data = write_rows(tmp_path, same, PAIR, same)
    with pytest.raises(DataError, match="2 of 3 rows cannot be trained on") as caught:
        prepare_pairs(data, tokenizer, tmp_path / "cache")
    reason = f"'chosen' and 'rejected' make the same {what}: there is no preference to learn (drop the row)"
    assert caught.value.message.splitlines()[1:] == [f"{data.path}: row {number}: {reason}" for number in (1, 3)]
    kept, report = prepare_pairs(data.model_copy(update={"bad_rows": "drop"}), tokenizer, tmp_path / "cache")
    assert (len(kept), report.num_bad, report.num_dropped, report.num_identical) == (1, 2, 0, 0)
    assert "the cut" not in caplog.text


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_pair_is_dealt_once(tokenizer, tmp_path: Path, num_ranks: int):
    pairs, _ = prepare_pairs(DataSection(path="tinyworld/preferences", split="test", max_examples=50), tokenizer, tmp_path)
    batches = deal_pairs(pairs, 300, num_ranks)
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert len(batches) > 1
