"""The formats people write rows in, and what each column of them means.

A row comes out in one of four canonical forms: `{"messages": [...]}`; `{"prompt", "completion"}`, both plain text or both
messages; `{"text"}`; or, for preferences, `{"prompt", "chosen", "rejected"}`, all plain text or all messages. Messages may
come with `tools`, the list of tools, and with `untrained`, the numbers of the turns that are marked as not to be trained,
counted from 0 over the prompt and what follows it.

What a format knows is used. Of the other columns, those that are known to carry meaning are refused, and the rest is listed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hftcli.data.turns import (
    MESSAGE_KEYS,
    SHAREGPT_KEYS,
    Keys,
    Lost,
    Messages,
    Turns,
    check_type,
    is_empty,
    read_history,
    read_text,
    read_tools,
    read_turns,
)
from hftcli.errors import DataError
from hftcli.recipe.recipe import Objective

Row = dict[str, Any]

# Columns beside those of a format that a conversation is made of.
SYSTEM_COLUMNS, TOOL_COLUMNS = ("system", "system_prompt"), ("tools", "functions")
DIALOGUE = (*SYSTEM_COLUMNS, "history", *TOOL_COLUMNS)
# Columns that carry meaning in other tools, and that would be lost here.
UNSUPPORTED_COLUMNS = (
    *DIALOGUE, "image", "images", "video", "videos", "audio", "audios", "documents", "chat_template_kwargs", "function_call",
    "function_calls", "tool_call", "tool_calls", "weight", "weights", "sample_weight", "loss_mask", "mask", "train",
    "rejected_response", "rejected_messages", "rejected_images", "kto_tag",
)  # fmt: skip
# And beside a question, what it is about.
UNSUPPORTED_CONTEXT = ("context", "passage", "choices", "options", "reasoning", "reasoning_content", "thinking")
LABELLED = (*UNSUPPORTED_CONTEXT, "label")
# And beside a text, what it is an example of.
BESIDE_TEXT = (*LABELLED, "labels", "prompt", "question", "answer", "completion", "response", "summary")
PAIRS_FIX = "train on them with `hft dpo`"


@dataclass(frozen=True)
class Format:
    """How people write rows.

    Attributes:
        columns: those that it is known by.
        convert: the way to canonical form; what the row holds besides is left with `Lost`.
        optional: other columns that it takes.
        refused: columns that carry meaning in this format alone.
    """

    columns: tuple[str, ...]
    convert: Callable[[Row, Lost], Row]
    objective: Objective = "sft"
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def detect_format(columns: list[str], objective: Objective = "sft") -> str:
    """The first format of the objective whose columns are all there.

    Raises:
        DataError: none is.
    """
    formats = {name: known for name, known in FORMATS.items() if known.objective == objective}
    for name, known in formats.items():
        if set(known.columns) <= set(columns):
            return name
    message = f"the columns {', '.join(columns)} are of no known format"
    if objective == "sft" and {"chosen", "rejected"} <= set(columns):
        raise DataError(f"{message} for `hft sft`: they are preference pairs", PAIRS_FIX)
    listed = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in formats.items())
    raise DataError(f"{message} for `hft {objective}`", f"rename them to one of these: {listed}")


def convert_row(row: Row, format_name: str, lost: Lost) -> Row:
    """Check a row of a known format and bring it into canonical form.

    Raises:
        DataError: naming the field; where the row stands, the caller knows.
    """
    check_type(row, dict, "a row")
    known = FORMATS[format_name]
    ignored = {column for column in row if column in lost.ignored and column not in known.columns}
    lost.unused |= ignored
    row = {column: value for column, value in row.items() if column not in ignored}
    converted = known.convert(row, lost)
    used = {*known.columns, *known.optional} if is_conversation(converted) else set(known.columns)
    for column in row:
        if column not in used:
            is_refused = column in UNSUPPORTED_COLUMNS or column in known.refused
            lost.leave(column, row[column], column, f"column {column!r}" if is_refused else None)
    return converted


def is_conversation(row: Row) -> bool:
    """Whether a canonical row holds messages, which a chat template renders."""
    return "messages" in row or ("prompt" in row and isinstance(row["prompt"], list))


# ---- Conversations --------------------------------------------------------------------------------


def convert_messages(row: Row, lost: Lost) -> Row:
    """Messages as chat models take them."""
    return make_conversation(row, read_turns(row.get("messages"), "messages", lost))


def convert_sharegpt(row: Row, lost: Lost) -> Row:
    """Conversations as ShareGPT writes them: `from` and `value`."""
    return make_conversation(row, read_turns(row.get("conversations"), "conversations", lost, SHAREGPT_KEYS))


def convert_alpaca(row: Row, lost: Lost) -> Row:
    """A task, perhaps with an input that stands below it."""
    question = read_text(row.get("instruction"), "instruction")
    if (given := row.get("input")) is not None:
        check_type(given, str, "field 'input'")
        if given.strip():
            question += "\n\n" + read_text(given, "input")
    return make_conversation(row, ask(question, read_text(row.get("output"), "output")))


def convert_question_answer(row: Row, lost: Lost) -> Row:
    """One question with its answer."""
    question, answer = read_text(row.get("question"), "question"), read_text(row.get("answer"), "answer")
    return make_conversation(row, ask(question, answer))


def ask(question: str, answer: str) -> Turns:
    """A question and its answer as turns."""
    return Turns([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], [None, None])


def make_conversation(row: Row, turns: Turns) -> Row:
    """A conversation that ends with the assistant, with the system prompt, history and tools of the row's other columns."""
    turns = open_dialogue(row, turns)
    if turns.messages[-1]["role"] != "assistant":
        raise DataError(
            f"the conversation ends with the {turns.messages[-1]['role']}'s turn, and nothing is learned from that",
            "end it with the assistant's",
        )
    return {"messages": turns.messages, **find_untrained(turns), **take_tools(row)}


def open_dialogue(row: Row, turns: Turns) -> Turns:
    """The turns after the system prompt and the history that stand in columns of their own."""
    given = {column: row[column] for column in SYSTEM_COLUMNS if not is_empty(row.get(column))}
    opening = Turns([], [])
    for column, value in given.items():
        system = {"role": "system", "content": read_text(value, column)}
        if turns.messages[0]["role"] in ("system", "developer"):
            if turns.messages[0]["content"] != system["content"]:
                raise DataError(f"column '{column}' and the conversation's own system turn differ", "drop one of the two")
        elif system not in opening.messages:
            opening += Turns([system], [None])
    if len(opening.messages) > 1:
        raise DataError(f"columns {' and '.join(given)} differ", "drop one of the two")
    if is_empty(row.get("history")):
        return opening + turns
    num_own = int(turns.messages[0]["role"] in ("system", "developer"))
    own = Turns(turns.messages[:num_own], turns.marks[:num_own])
    rest = Turns(turns.messages[num_own:], turns.marks[num_own:])
    return opening + own + read_history(row["history"], "history") + rest


def take_tools(row: Row) -> Row:
    """The list of tools that stands in a column of its own."""
    given = {column: read_tools(row[column], column) for column in TOOL_COLUMNS if not is_empty(row.get(column))}
    if len(given) > 1 and given["tools"] != given["functions"]:
        raise DataError("columns 'tools' and 'functions' differ", "drop one of the two")
    tools = next(iter(given.values()), [])
    return {"tools": tools} if tools else {}


def find_untrained(turns: Turns, num_prompt: int = 0) -> Row:
    """The turns that are marked as not to be trained: not all of the assistant's after the prompt's."""
    untrained = [index for index, mark in enumerate(turns.marks) if mark is False]
    answers = {index for index, message in enumerate(turns.messages) if index >= num_prompt and message["role"] == "assistant"}
    if answers <= set(untrained):
        raise DataError("every turn of the assistant is marked as not to be trained", "drop the row, or a mark")
    return {"untrained": untrained} if untrained else {}


# ---- Prompts and completions, and plain text -------------------------------------------------------


def convert_prompt_completion(row: Row, lost: Lost) -> Row:
    """A prompt and what follows it, both plain text or both messages."""
    if not isinstance(row.get("prompt"), list):
        return {name: read_text(row.get(name), name) for name in ("prompt", "completion")}
    prompt = open_dialogue(row, read_prompt(row.get("prompt"), "prompt", lost))
    completion = read_turns(row.get("completion"), "completion", lost)
    if completion.messages[0]["role"] != "assistant":
        raise DataError(f"field 'completion' starts with the {completion.messages[0]['role']}'s turn, not with the assistant's")
    num_prompt = len(prompt.messages)
    whole = make_conversation({}, prompt + completion)["messages"]
    untrained = find_untrained(prompt + completion, num_prompt)
    return {"prompt": whole[:num_prompt], "completion": whole[num_prompt:], **untrained, **take_tools(row)}


def read_prompt(value: Any, name: str, lost: Lost, keys: Keys = MESSAGE_KEYS) -> Turns:
    """The turns of a prompt, none of which is trained."""
    return check_prompt(read_turns(value, name, lost, keys), name)


def check_prompt(turns: Turns, name: str) -> Turns:
    """The turns of a prompt, with no mark that asks to train on one."""
    if True in turns.marks:
        place = f"{name}[{turns.marks.index(True)}]"
        raise DataError(f"{place} is marked to be trained, and a prompt is not", "take the mark off")
    return turns


def convert_prompt_answer(row: Row, lost: Lost) -> Row:
    """A prompt and its answer, as plain text."""
    return {"prompt": read_text(row.get("prompt"), "prompt"), "completion": read_text(row.get("answer"), "answer")}


def convert_text(row: Row, lost: Lost) -> Row:
    """Plain text, all of which is trained."""
    return {"text": read_text(row.get("text"), "text")}


# ---- Preferences -----------------------------------------------------------------------------------


def convert_pair(row: Row, lost: Lost) -> Row:
    """An explicit prompt; answers that repeat it, as UltraFeedback's do, are whole conversations."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(prompt, str) and isinstance(chosen, str):
        return check_pair({name: read_text(row.get(name), name) for name in ("prompt", "chosen", "rejected")})
    if isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1:
        pair = convert_implicit_pair(row, lost)
        if prompt not in (message["content"] for message in pair["prompt"]):
            raise DataError("field 'prompt' differs from the prompt within 'chosen' and 'rejected'")
        return pair
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = open_dialogue(row, read_prompt(prompt, "prompt", lost))
    answers = {"chosen": read_answer(chosen, "chosen", lost), "rejected": read_answer(rejected, "rejected", lost)}
    return check_pair({"prompt": turns.messages, **answers, **take_tools(row)})


def convert_implicit_pair(row: Row, lost: Lost) -> Row:
    """Two whole conversations that part at their last turn, as messages or as hh-rlhf writes them."""
    whole = {name: open_dialogue(row, _read_conversation(row.get(name), name, lost)) for name in ("chosen", "rejected")}
    turns = {name: read.messages for name, read in whole.items()}
    if turns["chosen"][:-1] != turns["rejected"][:-1]:
        raise DataError("'chosen' and 'rejected' differ in their prompt, not only in the answer", "drop the row, or mend it")
    if len(turns["chosen"]) == 1:
        raise DataError("'chosen' and 'rejected' have no prompt", "give a field 'prompt'")
    answers = {name: check_answer(Turns(read.messages[-1:], read.marks[-1:]), name) for name, read in whole.items()}
    return check_pair({"prompt": turns["chosen"][:-1], **answers, **take_tools(row)})


def convert_sharegpt_pair(row: Row, lost: Lost) -> Row:
    """A conversation as ShareGPT writes it, and two answers to it."""
    prompt = open_dialogue(row, read_prompt(row.get("conversations"), "conversations", lost, SHAREGPT_KEYS))
    answers = {name: read_answer(row.get(name), name, lost, SHAREGPT_KEYS) for name in ("chosen", "rejected")}
    return check_pair({"prompt": prompt.messages, **answers, **take_tools(row)})


def read_answer(value: Any, name: str, lost: Lost, keys: Keys = MESSAGE_KEYS) -> Messages:
    """One turn of the assistant: its text, its message, or a list with its message."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": read_text(value, name)}]
    return check_answer(read_turns([value] if isinstance(value, dict) else value, name, lost, keys), name)


def check_answer(turns: Turns, name: str) -> Messages:
    """The messages of an answer that is one turn of the assistant."""
    if len(turns.messages) > 1 or turns.messages[0]["role"] != "assistant":
        found = ", ".join(message["role"] for message in turns.messages)
        raise DataError(f"field '{name}' has the turns {found}, expected one turn of the assistant")
    if turns.marks[0] is False:
        raise DataError(f"field '{name}' is marked as not to be trained, and both answers of a pair are", "drop the row")
    return turns.messages


def _read_conversation(value: Any, name: str, lost: Lost) -> Turns:
    if isinstance(value, str):
        parts = re.split(r"\n\n(Human|Assistant): ?", read_text(value, name))
        if parts[0].strip() or len(parts) == 1:
            raise DataError(f"field '{name}' is text that does not start with a turn of hh-rlhf", "give a field 'prompt'")
        roles = {"Human": "user", "Assistant": "assistant"}
        value = [{"role": roles[role], "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    turns = read_turns(value, name, lost)
    make_conversation({}, turns)
    check_prompt(Turns(turns.messages[:-1], turns.marks[:-1]), name)
    return turns


def check_pair(pair: Row) -> Row:
    """A canonical pair whose answers are not the same."""
    if isinstance(pair["prompt"], list) and pair["prompt"][-1]["role"] == "assistant":
        raise DataError("the prompt ends with the assistant's turn, and the answers are another one", "join the two turns")
    if pair["chosen"] == pair["rejected"]:
        raise DataError("fields 'chosen' and 'rejected' are equal: there is no preference to learn", "drop the row")
    return pair


FORMATS = {
    "messages": Format(("messages",), convert_messages, optional=DIALOGUE, refused=("label",)),
    "sharegpt": Format(("conversations",), convert_sharegpt, optional=DIALOGUE, refused=("label",)),
    "prompt-completion": Format(("prompt", "completion"), convert_prompt_completion, optional=DIALOGUE, refused=LABELLED),
    "alpaca": Format(("instruction", "output"), convert_alpaca, optional=("input", *DIALOGUE), refused=LABELLED),
    "prompt-answer": Format(("prompt", "answer"), convert_prompt_answer, refused=LABELLED),
    "question-answer": Format(("question", "answer"), convert_question_answer, optional=DIALOGUE, refused=LABELLED),
    "text": Format(("text",), convert_text, refused=BESIDE_TEXT),
    "sharegpt-pair": Format(("conversations", "chosen", "rejected"), convert_sharegpt_pair, "dpo", DIALOGUE),
    "prompt-pair": Format(("prompt", "chosen", "rejected"), convert_pair, "dpo", DIALOGUE),
    "conversation-pair": Format(("chosen", "rejected"), convert_implicit_pair, "dpo", DIALOGUE),
}
