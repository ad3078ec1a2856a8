"""What a row's columns and keys mean is trained on; what cannot be is refused by its name, and the rest is listed.

What to expect is written out as messages, and rendered by transformers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from data.written_rows import ASK, CALL, REPLY, TOOL, prepare, read_rows, read_trained, render, say, write_jsonl
from transformers import PreTrainedTokenizerBase

from hftcli.data.prepare import prepare_dataset
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection, TrainSection

# A row of each format that is a conversation, all saying the same.
CONVERSATIONS = {
    "messages": {"messages": [ASK, REPLY]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": REPLY["content"]}]},
    "prompt-completion": {"prompt": [ASK], "completion": [REPLY]},
    "alpaca": {"instruction": ASK["content"], "output": REPLY["content"]},
    "question-answer": {"question": ASK["content"], "answer": REPLY["content"]},
    "sharegpt-pair": {
        "conversations": [{"from": "human", "value": ASK["content"]}],
        "chosen": {"from": "gpt", "value": REPLY["content"]},
        "rejected": {"from": "gpt", "value": "A brick."},
    },
    "prompt-pair": {"prompt": [ASK], "chosen": [REPLY], "rejected": [say("assistant", "A brick.")]},
    "conversation-pair": {"chosen": [ASK, REPLY], "rejected": [ASK, say("assistant", "A brick.")]},
}
PLAIN = {
    "prompt-completion": {"prompt": "a:", "completion": "b"},
    "prompt-answer": {"prompt": "a:", "answer": "b"},
    "text": {"text": "a"},
    "prompt-pair": {"prompt": "a:", "chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_system_history_and_tools_of_every_format(name: str, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    row = CONVERSATIONS[name]
    history = [say("user", "Do you know birds?"), say("assistant", "Yes.")]
    cases = [
        ({"system": "Answer in two words."}, [say("system", "Answer in two words."), ASK, REPLY], {}),
        ({"system_prompt": "Answer in two words."}, [say("system", "Answer in two words."), ASK, REPLY], {}),
        ({"history": [["Do you know birds?", "Yes."]]}, [*history, ASK, REPLY], {}),
        (
            {"system": "Be curt.", "history": [["Do you know birds?", "Yes."]]},
            [say("system", "Be curt."), *history, ASK, REPLY],
            {},
        ),
        ({"tools": [TOOL]}, [ASK, REPLY], {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL["function"]])}, [ASK, REPLY], {"tools": [TOOL]}),
        ({"functions": [TOOL["function"]]}, [ASK, REPLY], {"tools": [TOOL]}),
        # and what says nothing
        ({"system": "", "history": [], "tools": "[]", "functions": None}, [ASK, REPLY], {}),
    ]
    for columns, messages, options in cases:
        text, trained, report = prepare({**row, **columns}, minimind, tmp_path)
        assert text.rstrip() == render(messages, minimind, **options), columns
        assert trained.endswith("A heron.<|im_end|>")
        has_earlier = bool(columns.get("history")) and not {"prompt", "rejected"} & row.keys()
        assert ("Yes." in trained) == has_earlier
        assert not report.unused_columns


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("column", ["system", "system_prompt", "history", "tools", "functions"])
def test_plain_text_has_no_place_for_a_dialogue(name: str, column: str, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    with pytest.raises(DataError, match=rf"row 1: column '{column}' carries meaning that hft does not train on"):
        prepare({**PLAIN[name], column: ["x"]}, minimind, tmp_path)
    assert prepare({**PLAIN[name], column: ""}, minimind, tmp_path)[2].unused_columns == (column,)


UNSUPPORTED = (
    "image images video videos audio audios documents chat_template_kwargs function_call function_calls tool_call tool_calls "
    "weight loss_mask mask train rejected_response rejected_messages weights sample_weight kto_tag"
).split()
ROWS = [*CONVERSATIONS.items(), *((f"plain {name}", row) for name, row in PLAIN.items())]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_meaning_that_is_not_supported_is_refused_by_name(
    name: str, row: dict, minimind: PreTrainedTokenizerBase, tmp_path: Path
):
    given = [*UNSUPPORTED]
    if name in ("alpaca", "question-answer", "prompt-completion", "plain prompt-completion", "plain prompt-answer"):
        given += ["context", "passage", "choices", "options", "reasoning", "thinking"]
    if "text" in row:
        given += ["label", "labels", "prompt", "summary", "answer", "context"]
    elif "chosen" not in row:
        given.append("label")
    for column in given:
        with pytest.raises(DataError, match=f"row 1: column '{column}' carries meaning") as caught:
            prepare({**row, column: 0}, minimind, tmp_path)
        assert f"data.ignore_columns: [{column}]" in caught.value.fix
        expected = prepare(row, minimind, tmp_path)[:2]
        *found, report = prepare({**row, column: 0}, minimind, tmp_path, ignore_columns=(column,))
        assert (tuple(found), report.unused_columns) == (expected, (column,))


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[name for name, _ in ROWS])
def test_every_column_that_is_not_used_is_listed(name: str, row: dict, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    *found, report = prepare({"id": 7, **row, "source": "web", "score": 0.5}, minimind, tmp_path)
    assert report.unused_columns == ("id", "score", "source")
    assert tuple(found) == prepare(row, minimind, tmp_path)[:2]


def mark(row: dict, key: str, *values: Any) -> dict:
    """A conversation with a mark on each of its turns."""
    [column] = row
    return {column: [{**turn, key: value} for turn, value in zip(row[column], values, strict=True)]}


TWICE = [ASK, say("assistant", "A brick is a bird."), say("user", "Try again."), REPLY]
MARKED = {
    "messages": {"messages": TWICE},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TWICE
        ]
    },
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("key", ["train", "weight", "loss_mask", "loss", "training", "trainable", "train_on", "train_on_turn"])
@pytest.mark.parametrize("template", ["own", "chatml"])  # found by the turns before, and by markers
def test_marked_turns_are_not_trained(
    name: str, key: str, template: str, tokenizer: PreTrainedTokenizerBase, minimind: PreTrainedTokenizerBase, tmp_path: Path
):
    speaker = minimind if template == "own" else tokenizer
    row = MARKED[name]
    both = "A brick is a bird.<|im_end|>A heron.<|im_end|>"
    for no, yes in ((False, True), (0, 1), (0.0, 1.0)):
        assert prepare(mark(row, key, None, no, None, yes), speaker, tmp_path)[1] == "A heron.<|im_end|>"
        assert prepare(mark(row, key, no, yes, no, no), speaker, tmp_path)[1] == "A brick is a bird.<|im_end|>"
        assert prepare(mark(row, key, no, yes, None, None), speaker, tmp_path)[1] == both
    text, trained, report = prepare(row, speaker, tmp_path)
    assert (text.rstrip(), trained, report.unused_columns) == (render(TWICE, speaker), both, ())


@pytest.mark.parametrize(
    "key", "mask masked ignore ignored skip no_train no_loss label labels weights loss_scale loss_weight".split()
)
def test_marks_of_another_meaning_are_refused(key: str, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    """Some tools train on what has a mask of 1, and others leave it out."""
    for row in MARKED.values():
        for value in (True, 0, 0.5):
            with pytest.raises(DataError, match=rf"row 1: \w+\[1\]\.{key} carries meaning"):
                prepare(mark(row, key, None, value, None, None), minimind, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, 0.5, None, 1), r"\[1\].weight is 0.5, and hft trains on a turn or does not"),
        ((None, "no", None, 1), r"\[1\].weight is 'no', and hft trains on a turn or does not"),
        ((1, 1, None, 1), r"\[0\] is the user's and marked to be trained"),
        ((None, 0, None, 0), "every turn of the assistant is marked as not to be trained"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(
    values: tuple, message: str, minimind: PreTrainedTokenizerBase, tmp_path: Path
):
    for row in MARKED.values():
        with pytest.raises(DataError, match=message):
            prepare(mark(row, "weight", *values), minimind, tmp_path)


def test_marks_of_prompts_and_pairs(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    before = [ASK, say("assistant", "A brick.", train=False), say("user", "Try again.")]
    row = {"prompt": before, "completion": [REPLY, say("user", "And now?"), say("assistant", "No.", weight=0), ASK, REPLY]}
    text, trained, _ = prepare(row, minimind, tmp_path)
    assert trained == "A heron.<|im_end|>" * 2
    assert text.count("A brick.") == text.count("No.") == 1
    for marked in ({"prompt": [ASK, {**REPLY, "train": True}, ASK], "completion": [REPLY]},):
        with pytest.raises(DataError, match=r"prompt\[1\] is marked to be trained, and a prompt is not"):
            prepare(marked, minimind, tmp_path)
    pair = CONVERSATIONS["prompt-pair"]
    with pytest.raises(DataError, match="field 'chosen' is marked as not to be trained"):
        prepare({**pair, "chosen": [{**REPLY, "weight": 0}]}, minimind, tmp_path)


def test_all_text_but_marked_turns_is_trained_without_assistant_only_loss(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [mark(MARKED["messages"], "train", None, False, None, None)])
    [row], _ = prepare_dataset(data, TrainSection(assistant_only_loss=False), tokenizer, tmp_path / "cache")
    text = render(TWICE, tokenizer) + "\n"
    assert read_trained(row["input_ids"], row["labels"], tokenizer) == text.replace("A brick is a bird.<|im_end|>", "")


@pytest.mark.parametrize("template", ["own", "chatml"])
def test_marked_turns_stay_untrained_whatever_is_trained_around_them(
    template: str, tokenizer: PreTrainedTokenizerBase, minimind: PreTrainedTokenizerBase, tmp_path: Path
):
    """Turns of a prompt, and turns that are not the assistant's; without a mark each of them is trained."""
    speaker = minimind if template == "own" else tokenizer
    wrong, asked = TWICE[1], {**ASK, "train": False}

    def train(row: dict, **switches: bool) -> tuple[str, str]:
        data = write_jsonl(tmp_path / "rows.jsonl", [row])
        [made], _ = prepare_dataset(data, TrainSection(**switches), speaker, tmp_path / "cache")
        whole = speaker.decode(made["input_ids"], skip_special_tokens=False)
        return whole, read_trained(made["input_ids"], made["labels"], speaker)

    for mark, expected in (({}, "A brick is a bird.<|im_end|>A heron.<|im_end|>"), ({"train": False}, "A heron.<|im_end|>")):
        row = {"prompt": [ASK, {**wrong, **mark}, TWICE[2]], "completion": [REPLY]}
        assert train(row, completion_only_loss=False)[1] == expected
        whole, trained = train(row, completion_only_loss=False, assistant_only_loss=False)
        assert trained == whole.replace(f"{wrong['content']}<|im_end|>", "" if mark else f"{wrong['content']}<|im_end|>")
    whole, trained = train({"messages": [asked, REPLY]}, assistant_only_loss=False)
    assert whole.count(ASK["content"]) == 1
    assert trained == whole.replace(ASK["content"], "")
    assert train({"messages": [asked, REPLY]})[1] == "A heron.<|im_end|>"


def test_a_template_that_renders_no_tools_refuses_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    row = {"messages": [ASK, REPLY], "tools": [TOOL]}
    with pytest.raises(DataError, match="row 1: the tool look_up is not in the text that the chat template makes"):
        prepare(row, tokenizer, tmp_path)
    row = {"messages": [ASK, {**say("assistant", "Let me see."), "tool_calls": [CALL]}]}
    with pytest.raises(DataError, match="row 1: turn 2, the assistant's: 'look_up' is not in the text"):
        prepare(row, tokenizer, tmp_path)
    minded = tokenizer.chat_template
    tokenizer.chat_template = {"default": minded, "tool_use": "{% if tools %}{{ tools | tojson }}{% endif %}\n" + minded}
    text, trained, _ = prepare({"messages": [ASK, REPLY], "tools": [TOOL]}, tokenizer, tmp_path)
    assert text.startswith('[{"type": "function", "function": {"name": "look_up"')
    assert trained == "A heron.<|im_end|>"


def test_what_a_turn_holds_besides(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    parts = [{"type": "text", "text": "Which bird"}, {"type": "text", "text": " is it?"}]
    row = {"messages": [{**ASK, "content": parts, "id": 3, "name": None}, {**REPLY, "time": "now", "refusal": None}]}
    text, _, report = prepare(row, minimind, tmp_path)
    assert text.rstrip() == render([ASK, REPLY], minimind)
    assert report.unused_columns == ("messages[].id", "messages[].time")
    for key in ("image", "images", "audio", "video", "documents", "channel", "recipient", "name", "train_detail"):
        with pytest.raises(DataError, match=rf"row 1: messages\[0\]\.{key} carries meaning"):
            prepare({"messages": [{**ASK, key: "x"}, REPLY]}, minimind, tmp_path)
        marked = {"messages": [{**ASK, key: "x"}, REPLY]}
        assert prepare(marked, minimind, tmp_path, ignore_columns=(key,))[2].unused_columns == (f"messages[].{key}",)
    for kind in ("image_url", "input_audio", None):
        with pytest.raises(DataError, match=rf"messages\[0\]\.content\[0\] is of type {kind!r}"):
            prepare({"messages": [{**ASK, "content": [{"type": kind}]}, REPLY]}, minimind, tmp_path)
    twice = {**REPLY, "reasoning": "a", "thinking": "b"}
    with pytest.raises(DataError, match=r"messages\[1\]\.thinking differs from what the turn says under another name"):
        prepare({"messages": [ASK, twice]}, minimind, tmp_path)


def test_what_is_ignored_is_not_used_either(minimind: PreTrainedTokenizerBase, tmp_path: Path, caplog):
    """Columns and keys that hft would train on, too; a name that stands nowhere is said."""
    plain = prepare({"messages": TWICE}, minimind, tmp_path)[:2]
    row = {"messages": [{**turn, "weight": 0} for turn in TWICE], "system": "Be curt.", "tools": [TOOL]}
    *found, report = prepare(row, minimind, tmp_path, ignore_columns=("weight", "system", "tools"))
    assert tuple(found) == plain
    assert report.unused_columns == ("messages[].weight", "system", "tools")
    assert not caplog.records
    prepare(row, minimind, tmp_path, ignore_columns=("weight", "wieght"))
    assert "no row has what data.ignore_columns names: wieght" in caplog.text


def test_inputs_that_are_not_text(tmp_path: Path):
    row = {"instruction": "Add one.", "input": 0, "output": "1"}
    with pytest.raises(DataError, match="row 1: field 'input' is of type int, expected str"):
        read_rows(write_jsonl(tmp_path / "rows.jsonl", [row]))
    for blank in (None, "", "  "):
        [made], _ = read_rows(write_jsonl(tmp_path / "rows.jsonl", [{**row, "input": blank}]))
        assert made == {"messages": [say("user", "Add one."), say("assistant", "1")]}


def test_columns_that_contradict_each_other_are_refused(tmp_path: Path):
    messages = [say("system", "Be curt."), ASK, REPLY]
    cases = [
        ({"messages": messages, "system": "Be kind."}, "column 'system' and the conversation's own system turn differ"),
        ({"messages": [ASK, REPLY], "system": "a", "system_prompt": "b"}, "columns system and system_prompt differ"),
        (
            {"messages": [ASK, REPLY], "tools": [TOOL], "functions": [CALL["function"]]},
            "columns 'tools' and 'functions' differ",
        ),
        ({"messages": [ASK, REPLY], "history": [["a"]]}, r"history\[0\] has 1 texts, expected a question and its answer"),
        ({"messages": [ASK, REPLY], "tools": "{"}, "field 'tools' is not JSON"),
    ]
    for row, message in cases:
        with pytest.raises(DataError, match=message):
            read_rows(write_jsonl(tmp_path / "rows.jsonl", [row]))
    same = {"messages": messages, "system": "Be curt."}
    assert read_rows(write_jsonl(tmp_path / "rows.jsonl", [same]))[0] == [{"messages": messages}]


def test_the_other_names_for_roles_and_keys(tmp_path: Path):
    row = {"conversations": [ASK, REPLY]}  # ShareGPT's column with the messages of the other format
    assert read_rows(write_jsonl(tmp_path / "rows.jsonl", [row]))[0] == [{"messages": [ASK, REPLY]}]
    section = DataSection(path=str(tmp_path / "rows.jsonl"))
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": [say("ipython", "a"), REPLY]}])
    with pytest.raises(DataError, match=r"messages\[0\]\.role' is 'ipython'"):
        read_rows(section)
