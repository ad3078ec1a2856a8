"""Calls of tools and parts of contents as people write them: what they say is trained on, or refused, or listed."""

import json
from pathlib import Path
from typing import Any

import pytest
from data.written_rows import ASK, CALL, REPLY, TOOL, prepare, read_rows, render, say, write_jsonl
from transformers import PreTrainedTokenizerBase

from hftcli.errors import DataError


def test_calls_of_tools_in_every_form(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    thanks, result = say("assistant", "It is a bird."), say("tool", "A bird.")
    expected = render([ASK, {**say("assistant", ""), "tool_calls": [CALL]}, result, thanks], minimind, tools=[TOOL])
    written = {"name": "look_up", "arguments": '{"word": "heron"}'}
    parts = [{"type": "text", "text": "A "}, {"type": "text", "text": "bird."}]
    called = [
        [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": written}]},
            say("tool", "A bird.", tool_call_id="1"),
        ],
        [say("assistant", "", tool_calls=[written]), say("tool", "A bird.", name="look_up")],
        [
            {"role": "assistant", "content": None, "function_call": written},
            {"role": "function", "name": "look_up", "content": parts},
        ],
    ]
    for turns in called:
        text, trained, report = prepare({"messages": [ASK, *turns, thanks], "tools": [TOOL]}, minimind, tmp_path)
        assert text.rstrip() == expected
        assert trained.endswith("</tool_call><|im_end|>It is a bird.<|im_end|>")
        assert not report.unused_columns
    for call, observation in (("function_call", "observation"), ("tool_call", "tool_response")):
        turns = [("human", ASK["content"]), (call, json.dumps(written)), (observation, "A bird."), ("gpt", "It is a bird.")]
        row = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": json.dumps([TOOL])}
        assert prepare(row, minimind, tmp_path)[0].rstrip() == expected


@pytest.mark.parametrize(
    "call",
    [
        {"name": "look_up", "args": {"word": "heron"}, "id": "1", "type": "tool_call"},  # LangChain's
        {"type": "tool_use", "id": "1", "name": "look_up", "input": {"word": "heron"}},  # Anthropic's
        {"name": "look_up", "arguments": None, "parameters": {"word": "heron"}},
        {"type": "function", "function": {"name": "look_up", "arguments": {}, "parameters": '{"word": "heron"}'}},
    ],
)
def test_the_arguments_of_a_call_under_every_name(call: dict, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    row = {"messages": [ASK, say("assistant", "", tool_calls=[call]), say("tool", "A bird."), REPLY], "tools": [TOOL]}
    text, _, report = prepare(row, minimind, tmp_path)
    assert '<tool_call>\n{"name": "look_up", "arguments": {"word": "heron"}}\n</tool_call>' in text
    assert not report.unused_columns


def test_what_a_call_says_besides(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    given, flat = CALL["function"], {**CALL["function"], "index": 0}

    def write(call: dict) -> dict:
        return {"messages": [ASK, say("assistant", "", tool_calls=[call]), say("tool", "A bird."), REPLY], "tools": [TOOL]}

    cases = [
        ({"name": "look_up", "kwargs": {"word": "heron"}}, r"tool_calls\[0\]\.kwargs carries meaning"),
        ({**CALL, "result": "A bird."}, r"tool_calls\[0\]\.result carries meaning"),
        ({**CALL, "name": "look_up"}, r"tool_calls\[0\]\.name carries meaning"),
        ({"function": {**given, "output": 1}}, r"tool_calls\[0\]\.function\.output carries meaning"),
        ({**given, "args": {"word": "a"}}, r"tool_calls\[0\]\.args differs from what the call says under another name"),
    ]
    for call, message in cases:
        with pytest.raises(DataError, match=message):
            prepare(write(call), minimind, tmp_path)
    plain = prepare(write(CALL), minimind, tmp_path)[:2]
    *found, report = prepare(write(flat), minimind, tmp_path)
    assert (tuple(found), report.unused_columns) == (plain, ("messages[].tool_calls[].index",))
    *found, report = prepare(write({**CALL, "result": "x"}), minimind, tmp_path, ignore_columns=("result",))
    assert (tuple(found), report.unused_columns) == (plain, ("messages[].tool_calls[].result",))


def test_what_a_part_of_a_content_says_besides(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    def write(**more: Any) -> dict:
        part = {"type": "text", "text": REPLY["content"], "image_url": None, **more}
        return {"messages": [ASK, say("assistant", [part])]}

    for key, value in (("train", False), ("weight", 0), ("loss_scale", 0.5), ("citations", ["x"]), ("tool_calls", [CALL])):
        with pytest.raises(DataError, match=rf"row 1: messages\[1\]\.content\[0\]\.{key} carries meaning"):
            prepare(write(**{key: value}), minimind, tmp_path)
    text, _, report = prepare(write(cache_control={"type": "ephemeral"}, annotations=[1]), minimind, tmp_path)
    assert text.rstrip() == render([ASK, REPLY], minimind)
    assert report.unused_columns == ("messages[].content[].annotations", "messages[].content[].cache_control")


def test_tools_and_calls_that_a_turn_has_for_itself(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    """Some templates print the tools of the system's turn, and calls by another name; the others would drop them."""
    written = json.dumps([TOOL])
    turns = [say("system", "Use tools."), ASK, REPLY]
    plain = prepare({"messages": turns}, minimind, tmp_path)[:2]
    cases = [
        (0, "tools", written), (0, "tools", [TOOL]), (0, "functions", written), (2, "function_calls", "look_up(word='a')"),
        (2, "tool_call", CALL), (1, "tool_choice", "required"), (2, "thought", "Hm."), (2, "thoughts", ["Hm."]),
    ]  # fmt: skip
    for index, key, value in cases:
        row = {"messages": [{**turn, key: value} if place == index else turn for place, turn in enumerate(turns)]}
        with pytest.raises(DataError, match=rf"row 1: messages\[{index}\]\.{key} carries meaning"):
            prepare(row, minimind, tmp_path)
        *found, report = prepare(row, minimind, tmp_path, ignore_columns=(key,))
        assert (tuple(found), report.unused_columns) == (plain, (f"messages[].{key}",))
        for nothing in (None, "", [], "[]", " {} "):
            row["messages"][index][key] = nothing
            assert prepare(row, minimind, tmp_path)[:2] == plain


def test_what_a_turn_that_calls_says_besides(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    """ShareGPT's turn whose text is the call: what was thought before it is trained, and a second call is refused."""

    def write(**more: Any) -> dict:
        call = {"from": "function_call", "value": json.dumps(CALL["function"]), **more}
        turns = [("human", ASK["content"]), call, ("observation", "A bird."), ("gpt", "A heron.")]
        return {
            "conversations": [turn if turn is call else dict(zip(("from", "value"), turn, strict=True)) for turn in turns],
            "tools": [TOOL],
        }

    called = {**say("assistant", "", reasoning_content="I look."), "tool_calls": [CALL]}
    [row], _ = read_rows(write_jsonl(tmp_path / "rows.jsonl", [write(reasoning="I look.", tool_calls=[CALL])]))
    assert row["messages"] == [ASK, called, say("tool", "A bird."), REPLY]
    other = {"name": "look_up", "arguments": {"word": "crane"}}
    with pytest.raises(DataError, match=r"conversations\[1\]\.value differs from the calls that the turn has under another"):
        prepare(write(tool_calls=[other]), minimind, tmp_path)
