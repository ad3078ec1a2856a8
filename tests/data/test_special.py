"""Special tokens that a row's own text brings: beginnings and ends that would stand twice, and borders of turns in the text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data.written_rows import read_template, read_trained, write_jsonl
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hftcli.data.prepare import prepare_dataset, prepare_pairs
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.errors import DataError
from hftcli.recipe.sections import TrainSection
from hftcli.runs.records import DataReport

# Templates with the beginning that each prints, and the token with which it ends the assistant's turn.
TEMPLATES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<s>", "<end_of_turn>"),
    "gemma3": ("<s>", "<end_of_turn>"),
    "phi3": ("", "<|end|>"),
    "qwen2_5": ("", "<|im_end|>"),
    "qwen3": ("", "<|im_end|>"),
    "deepseek_r1_distill": ("<s>", "<｜end▁of▁sentence｜>"),
    "chatml": ("", "<|im_end|>"),
    "tulu": ("<s>", "</s>"),
}


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, str]:
    beginning, end = TEMPLATES[name]
    tokenizer.chat_template = CHAT_TEMPLATES.get(name) or read_template(name)
    if beginning:
        tokenizer.bos_token = beginning
    return beginning, end


def prepare(
    rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, folder: Path, **data: Any
) -> tuple[list[tuple[str, ...]], DataReport]:
    """Of every row its tokens and what of them is trained; of a pair the prompt and both answers."""
    section = write_jsonl(folder / "rows.jsonl", list(rows)).model_copy(update=data)
    if "rejected" in rows[0]:
        pairs, report = prepare_pairs(section, tokenizer, folder / "cache")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [tuple(tokenizer.decode(pair[name]) for name in names) for pair in pairs], report
    made, report = prepare_dataset(section, TrainSection(), tokenizer, folder / "cache")
    texts = [(tokenizer.decode(row["input_ids"]), read_trained(row["input_ids"], row["labels"], tokenizer)) for row in made]
    return texts, report


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ---- Beginnings and ends that would stand twice -------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text", "trained", "doubled"),
    [
        ({"prompt": "<s>[INST] Which? [/INST]", "completion": " A heron.</s>"},
         "<s>[INST] Which? [/INST] A heron.</s>", " A heron.</s>", {"beginning": 1, "end": 1}),
        ({"prompt": "Which?", "completion": "A heron.</s> \n"}, "<s>Which?A heron.</s>", "A heron.</s>", {"end": 1}),
        ({"prompt": "Which?", "completion": "A heron.</s></s>"}, "<s>Which?A heron.</s>", "A heron.</s>", {"end": 1}),
        ({"prompt": "<s>Which?", "completion": "A heron.\n"}, "<s>Which?A heron.\n</s>", "A heron.\n</s>", {"beginning": 1}),
        ({"prompt": "Which?", "answer": "A heron."}, "<s>Which?A heron.</s>", "A heron.</s>", {}),
        ({"prompt": "<s>Which?", "answer": "A heron.</s>"}, "<s>Which?A heron.</s>", "A heron.</s>",
         {"beginning": 1, "end": 1}),
        ({"text": "<s>A heron wades.</s>"}, "<s>A heron wades.</s>", "A heron wades.</s>", {"beginning": 1, "end": 1}),
        ({"text": "A heron wades."}, "<s>A heron wades.</s>", "A heron wades.</s>", {}),
    ],
)  # fmt: skip
def test_plain_text_has_one_beginning_and_one_end(
    row: dict, text: str, trained: str, doubled: dict, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    texts, report = prepare([row], byte_tokenizer, tmp_path)
    assert texts == [(text, trained)]
    assert (report.doubled, report.num_special) == (doubled, 0)


def test_a_beginning_stays_where_the_tokenizer_adds_none(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    byte_tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    texts, report = prepare([{"prompt": "<s>Which?", "completion": "A heron."}], byte_tokenizer, tmp_path)
    assert texts == [("<s>Which?A heron.</s>", "A heron.</s>")]
    assert report.doubled == {}
    assert report.special_tokens == {"<s>": 1}


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_have_one_beginning_and_one_end(name: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    beginning, end = set_template(byte_tokenizer, name)
    clean = talk("Which?", "A heron.")
    [expected], report = prepare([clean], byte_tokenizer, tmp_path)
    assert report.doubled == {}
    assert expected[1].count(end) == 1
    for answer in (f"A heron.{end}", f"A heron.{end}\n", f"A heron.{end}{end}"):
        texts, report = prepare([talk(f"{beginning}Which?", answer), clean], byte_tokenizer, tmp_path)
        assert texts == [expected, expected]
        assert (report.doubled, report.num_special) == ({"end": 1} | ({"beginning": 1} if beginning else {}), 0)


def test_pairs_have_the_prompt_once(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [
        {"prompt": "<s>[INST] Name a colour. [/INST]", "chosen": " Red</s>", "rejected": " Car </s>"},
        {"prompt": "Name a fruit: ", "chosen": "pear", "rejected": "stone"},
        {"prompt": "Name a fruit: ", "chosen": "Name a fruit: pear", "rejected": "Name a fruit: stone"},
        {"prompt": "Name a fruit: ", "chosen": "Name a fruit: pear", "rejected": "stone"},  # one of them may repeat it
        {"prompt": "The", "chosen": "The pear", "rejected": "The stone"},  # a word may well be said again
        {"prompt": "x", "chosen": "a</s>\n", "rejected": "b</s> "},
    ]
    texts, report = prepare(rows, byte_tokenizer, tmp_path)
    assert texts == [
        ("<s>[INST] Name a colour. [/INST]", " Red</s>", " Car </s>"),
        ("<s>Name a fruit: ", "pear</s>", "stone</s>"),
        ("<s>Name a fruit: ", "pear</s>", "stone</s>"),
        ("<s>Name a fruit: ", "Name a fruit: pear</s>", "stone</s>"),
        ("<s>The", "The pear</s>", "The stone</s>"),
        ("<s>x", "a</s>", "b</s>"),
    ]
    assert report.doubled == {"beginning": 1, "end": 2, "prompt": 1}


def test_rows_of_nothing_but_special_tokens_are_bad(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    with pytest.raises(DataError, match="row 1: field 'completion' is nothing but special tokens: '</s>'"):
        prepare([{"prompt": "Which?", "completion": "</s>"}], byte_tokenizer, tmp_path)
    set_template(byte_tokenizer, "chatml")
    with pytest.raises(DataError, match=r"row 1: turn 2 is nothing but special tokens: '<\|im_end\|>'"):
        prepare([talk("Which?", "<|im_end|>")], byte_tokenizer, tmp_path)
    with pytest.raises(DataError, match="row 1: 'chosen' and 'rejected' are equal without what stands in them twice"):
        prepare([{"prompt": "Which?", "chosen": "a", "rejected": "a</s>"}], byte_tokenizer, tmp_path)


# ---- Special tokens in the text ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TEMPLATES, "plain"])
def test_written_special_tokens_are_counted_escaped_or_refused(
    name: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    """One token per byte: an escaped token has as many as it has bytes, and a kept one is one."""
    end = "</s>"
    if name != "plain":
        _, end = set_template(byte_tokenizer, name)
    border = "<｜User｜>" if name == "deepseek_r1_distill" else end
    question, answer = f"What is {border} for?", f"It {border} ends"
    rows = [talk("Which?", "A heron."), talk(question, answer)]
    if name == "plain":
        rows = [{"prompt": "Which?", "completion": "A heron."}, {"prompt": question, "completion": answer}]
    (clean, kept), report = prepare(rows, byte_tokenizer, tmp_path)
    assert (report.num_special, report.special_tokens) == (1, {border: 1})
    (same, escaped), escaped_report = prepare(rows, byte_tokenizer, tmp_path, special_tokens_in_text="escape")
    assert (same, escaped) == (clean, kept)  # the same characters
    assert escaped_report.special_tokens == report.special_tokens
    num_added = 2 * (len(border.encode()) - 1)
    assert escaped_report.num_tokens == report.num_tokens + num_added
    assert escaped_report.num_trained_tokens == report.num_trained_tokens + num_added // 2
    with pytest.raises(DataError, match=r"row 2: its text holds the special tokens <"):
        prepare(rows, byte_tokenizer, tmp_path, special_tokens_in_text="refuse")


@pytest.mark.parametrize("model", ["MiniMind2-Small", "stories15M", "stories260K"])
def test_escaped_tokens_are_those_of_transformers(model: str, shared: Path, tmp_path: Path):
    """Its own way of taking special tokens from users' texts parts the text at them, so that only the bytes compare."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATES["tulu"]
    end, row = tokenizer.eos_token, talk("", "")
    row["messages"][0]["content"] = f"a {end} b{end}c {tokenizer.bos_token}"
    row["messages"][1]["content"] = f"{end}{end} d {tokenizer.bos_token}e"
    theirs = tokenizer.apply_chat_template(row["messages"], sanitize_control_tokens=True)["input_ids"]
    section = write_jsonl(tmp_path / "rows.jsonl", [row]).model_copy(update={"special_tokens_in_text": "escape"})
    [made], report = prepare_dataset(section, TrainSection(), tokenizer, tmp_path / "cache")
    special = set(tokenizer.all_special_ids)
    assert [token for token in made["input_ids"] if token in special] == [token for token in theirs if token in special]
    assert tokenizer.decode(made["input_ids"]) == tokenizer.decode(theirs)
    assert report.num_special == 1


def test_tags_that_people_write_are_no_borders(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    byte_tokenizer.add_tokens([AddedToken(tag, special=False) for tag in tags])
    set_template(byte_tokenizer, "qwen3")
    _, report = prepare([talk("Which?", "<think>\nSo.\n</think>\nA heron. <tool_call>")], byte_tokenizer, tmp_path)
    assert (report.num_special, report.special_tokens) == (0, {})


def test_special_tokens_in_what_tools_are_called_with(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    call = {"name": "look_up", "arguments": {"word": "<|im_end|>"}}
    row = {
        "messages": [
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "<|im_start|>"},
            {"role": "assistant", "content": "A heron."},
        ]
    }
    [(kept, _)], report = prepare([row], minimind, tmp_path)
    assert report.special_tokens == {"<|im_end|>": 1, "<|im_start|>": 1}
    [(escaped, _)], escaped_report = prepare([row], minimind, tmp_path, special_tokens_in_text="escape")
    assert escaped == kept
    assert escaped_report.num_tokens > report.num_tokens


def test_special_tokens_in_what_tools_say_of_themselves(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    """Also below keys that elsewhere hold no text: `id`, `type` and `role`."""
    given = {"id": {"type": "string", "description": "ends in <|im_end|>"}, "role": {"enum": ["<|im_start|>"]}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": given}}}
    row = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A heron."}], "tools": [tool]}
    [(kept, _)], report = prepare([row], minimind, tmp_path)
    assert report.special_tokens == {"<|im_end|>": 1, "<|im_start|>": 1}
    [(escaped, _)], escaped_report = prepare([row], minimind, tmp_path, special_tokens_in_text="escape")
    assert escaped == kept
    assert escaped_report.num_tokens > report.num_tokens
    with pytest.raises(DataError, match=r"its text holds the special tokens <\|im_end\|>, <\|im_start\|>"):
        prepare([row], minimind, tmp_path, special_tokens_in_text="refuse")
