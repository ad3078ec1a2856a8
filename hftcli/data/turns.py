"""The turns of a conversation, as people write them, read into the messages that chat templates take.

A message comes out with its `role` and `content`, and where the row has them with `tool_calls`, `reasoning_content`, `name` and
`tool_call_id`, in the forms that transformers documents. What a turn holds besides is never dropped in silence: it is refused
where it is known to carry meaning, and otherwise listed as not used.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hftcli.errors import DataError

Message = dict[str, Any]
Messages = list[Message]

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = {
    **ROLES, "human": "user", "gpt": "assistant", "observation": "tool", "tool_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's turns whose text is a call of a tool, as JSON

# Whether the assistant's turn is trained, as true and false or as 1 and 0.
MARKS = ("train", "weight", "loss_mask", "loss", "training", "trainable", "train_on", "train_on_turn")
# Marks of other tools whose meaning is another: which value says that a turn is trained, or how much it counts.
OTHER_MARKS = (
    "mask", "masked", "ignore", "ignored", "skip", "no_train", "no_loss", "label", "labels", "weights", "loss_scale",
    "loss_weight",
)  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
ARGUMENTS = ("arguments", "parameters", "args", "input")  # of a call, as OpenAI, Llama, LangChain and Anthropic name them
CALL_KEYS = ("id", "type")  # of a call, beside its function; in `type` each of these writes another word
IDLE_CALL_KEYS = ("index", "description", "status")  # of a call, and say nothing of what is called
TOOL_KEYS = ("name", "tool_call_id")
# Parts of a turn that would be lost.
UNSUPPORTED_KEYS = (
    "image", "images", "video", "videos", "audio", "audios", "documents", "citations", "refusal", "channel", "recipient",
    "train_detail", "training_detail", "tool_responses", "name", "tools", "functions", "function_calls", "tool_call",
    "tool_choice", "thought", "thoughts", *CALLS, *REASONING, *OTHER_MARKS,
)  # fmt: skip
EMPTY_JSON = ("[]", "{}")  # what says nothing where lists and objects are written as text


@dataclass(frozen=True)
class Keys:
    """What a format calls the role and the content of a turn, and its roles."""

    role: str = "role"
    content: str = "content"
    roles: dict[str, str] = field(default_factory=lambda: ROLES)


MESSAGE_KEYS = Keys()
SHAREGPT_KEYS = Keys("from", "value", SHAREGPT_ROLES)


@dataclass
class Lost:
    """What rows hold that is not used.

    Attributes:
        ignored: columns and keys that are left out on purpose, whatever they carry.
        unused: those that were met and not used.
    """

    ignored: tuple[str, ...] = ()
    unused: set[str] = field(default_factory=set)

    def leave(self, key: str, value: Any, listed: str, place: str | None = None) -> None:
        """Note a column or a key that is not used.

        Args:
            listed: the name under which it is listed.
            place: of one that carries meaning, where it stands; None for any other.

        Raises:
            DataError: it carries meaning, and says something.
        """
        says_nothing = is_empty(value) or (isinstance(value, str) and value.strip() in EMPTY_JSON)
        if place is not None and not says_nothing:
            raise DataError(
                f"{place} carries meaning that hft does not train on",
                f"write it into the text, or set data.ignore_columns: [{key}] to leave it out",
            )
        self.unused.add(listed)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing. The number 0 says something."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


@dataclass(frozen=True)
class Turns:
    """Messages, and what the rows say of training on each: None where they say nothing."""

    messages: Messages
    marks: list[bool | None]

    def __add__(self, other: "Turns") -> "Turns":
        return Turns(self.messages + other.messages, self.marks + other.marks)


def read_turns(value: Any, name: str, lost: Lost, keys: Keys = MESSAGE_KEYS) -> Turns:
    """Turns with a known role and a content; only the system's and a tool's may be empty.

    Raises:
        DataError: naming the turn and the field.
    """
    check_type(value, list, f"field '{name}'")
    if not value:
        raise DataError(f"field '{name}' is empty")
    if isinstance(value[0], dict) and keys.role not in value[0] and "role" in value[0]:
        keys = Keys(roles=keys.roles)  # a column by the one format's name with turns of the other's form
    messages, marks = [], []
    for index, turn in enumerate(value):
        place = f"{name}[{index}]"
        check_type(turn, dict, place)
        ignored = {key for key in turn if key in lost.ignored and key not in (keys.role, keys.content)}
        lost.unused |= {f"{name}[].{key}" for key in ignored}
        turn = {key: value for key, value in turn.items() if key not in ignored}
        messages.append(_read_message(turn, place, keys, lost))
        marks.append(_read_mark(turn, place))
        if messages[-1]["role"] != "assistant" and marks[-1]:
            raise DataError(
                f"{place} is the {messages[-1]['role']}'s and marked to be trained, and hft trains the assistant's turns",
                "take the mark off",
            )
        _leave_rest(turn, place, keys, messages[-1]["role"], lost)
    return Turns(messages, marks)


def read_messages(value: Any, name: str) -> Messages:
    """The turns of a conversation that is to be answered.

    Raises:
        DataError: naming the turn and the field that is none, or that would not be asked; or the assistant has the last word.
    """
    try:
        messages = read_turns(value, name, Lost()).messages
    except DataError as error:
        raise DataError(error.message, 'give turns like {"role": "user", "content": "..."}') from None
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{name}[{len(messages) - 1}], the last turn, is the assistant's: the answer would be shown", "drop it")
    return messages


def _read_message(turn: Message, place: str, keys: Keys, lost: Lost) -> Message:
    given = turn.get(keys.role)
    if not isinstance(given, str) or given not in keys.roles:
        raise DataError(f"field '{place}.{keys.role}' is {given!r}, expected one of {', '.join(keys.roles)}")
    message: Message = {"role": keys.roles[given]}
    where = f"{place}.{keys.content}"
    said = _read_assistant(turn, place, lost) if message["role"] == "assistant" else {}
    if given in CALL_ROLES:
        calls = read_calls(_read_json(turn.get(keys.content), where), where, lost)
        if said.get("tool_calls", calls) != calls:
            raise DataError(f"{where} differs from the calls that the turn has under another name", "drop one of the two")
        return {**message, "content": "", **said, "tool_calls": calls}
    message |= said
    if message["role"] == "tool":
        message |= {key: turn[key] for key in TOOL_KEYS if not is_empty(turn.get(key))}
    content = read_parts(turn.get(keys.content), where, lost)
    if content is None and "tool_calls" in message:
        content = ""
    if content != "" or (message["role"] not in ("system", "developer", "tool") and "tool_calls" not in message):
        read_text(content, where)
    return {"role": message["role"], "content": content, **message}


def _read_assistant(turn: Message, place: str, lost: Lost) -> Message:
    """What the assistant thought and which tools it called, under whichever names they stand."""
    found: Message = {}
    for name, keys in (("reasoning_content", REASONING), ("tool_calls", CALLS)):
        for key in keys:
            if is_empty(turn.get(key)):
                continue
            where = f"{place}.{key}"
            value = read_text(turn[key], where) if keys is REASONING else read_calls(turn[key], where, lost)
            if found.setdefault(name, value) != value:
                raise DataError(f"{place}.{key} differs from what the turn says under another name", "drop one of the two")
    return found


def read_parts(value: Any, name: str, lost: Lost) -> Any:
    """A content that is a list of text parts as the text that they make; any other as it is.

    Raises:
        DataError: a part is of another kind, or says more than its text: a mark, too, as only turns have them.
    """
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
            continue
        check_type(part, dict, f"{name}[{index}]")
        if part.get("type") != "text":
            raise DataError(f"{name}[{index}] is of type {part.get('type')!r}, and hft trains on text", "drop the row")
        check_type(part.get("text"), str, f"field '{name}[{index}].text'")
        texts.append(part["text"])
        _leave_keys(part, ("type", "text"), f"{name}[{index}]", lost, (*UNSUPPORTED_KEYS, *MARKS))
    return "".join(texts)


def _read_mark(turn: Message, place: str) -> bool | None:
    """Whether a turn is marked as one to train on, or as one not to."""
    found = None
    for key in MARKS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # also False and True
            raise DataError(
                f"{place}.{key} is {value!r}, and hft trains on a turn or does not", "give true or false, or 1 or 0"
            )
        if found is not None and found != bool(value):
            raise DataError(f"{place} is marked both to be trained and not to be: {key} is {value!r}", "drop one of the marks")
        found = bool(value)
    return found


def _leave_rest(turn: Message, place: str, keys: Keys, role: str, lost: Lost) -> None:
    used = {keys.role, keys.content, *MARKS}
    used |= {"assistant": {*REASONING, *CALLS}, "tool": set(TOOL_KEYS)}.get(role, set())
    _leave_keys(turn, used, place, lost, UNSUPPORTED_KEYS)


def _leave_keys(given: Message, used: Collection[str], place: str, lost: Lost, refused: Collection[str]) -> None:
    """Note the keys of an object that are not used; of those that say something, the refused ones raise DataError."""
    for key in given:
        listed = f"{re.sub(r'[0-9]+(?=])', '', place)}.{key}"  # the same for all turns
        if key in used or is_empty(given[key]):
            continue
        if key in lost.ignored:
            lost.unused.add(listed)
        else:
            lost.leave(key, given[key], listed, f"{place}.{key}" if key in refused else None)


def read_calls(value: Any, name: str, lost: Lost) -> list[Message]:
    """Calls of tools as `{"type": "function", "function": {"name", "arguments"}}`, the arguments as an object.

    Raises:
        DataError: a call says more than this.
    """
    calls = [value] if isinstance(value, dict) else value
    check_type(calls, list, f"field '{name}'")
    found = []
    for index, call in enumerate(calls):
        place = f"{name}[{index}]" if isinstance(value, list) else name
        check_type(call, dict, place)
        function = call.get("function", call)
        check_type(function, dict, f"{place}.function")
        read_text(function.get("name"), f"{place}.name")
        arguments = _read_arguments(function, place)
        used: tuple[str, ...] = ("name", *ARGUMENTS)
        if function is not call:
            _leave_keys(function, used, f"{place}.function", lost, function.keys() - set(IDLE_CALL_KEYS))
            used = ("function",)
        _leave_keys(call, (*used, *CALL_KEYS), place, lost, call.keys() - set(IDLE_CALL_KEYS))
        identity = {"id": call["id"]} if call.get("id") else {}
        found.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _read_arguments(function: Message, place: str) -> Message:
    """What a call gives its tool, under whichever name it stands."""
    found: Message | None = None
    for key in ARGUMENTS:
        if is_empty(function.get(key)):
            continue
        value = _read_json(function[key], f"{place}.{key}")
        check_type(value, dict, f"{place}.{key}")
        if found not in (None, value):
            raise DataError(f"{place}.{key} differs from what the call says under another name", "drop one of the two")
        found = value
    return found or {}


def read_tools(value: Any, name: str) -> list[Message]:
    """The list of tools, as JSON or as the objects, each as `{"type": "function", "function": {...}}`."""
    value = _read_json(value, f"field '{name}'")
    check_type(value, list, f"field '{name}'")
    tools = []
    for index, tool in enumerate(value):
        tool = _read_json(tool, f"{name}[{index}]")
        check_type(tool, dict, f"{name}[{index}]")
        function = tool.get("function", tool)
        check_type(function, dict, f"{name}[{index}].function")
        read_text(function.get("name"), f"{name}[{index}].name")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def _read_json(value: Any, name: str) -> Any:
    """A value that people write as an object or as the text of one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error.msg} at column {error.colno}") from None


def read_history(value: Any, name: str) -> Turns:
    """Earlier questions with their answers: `[["question", "answer"], ...]`."""
    check_type(value, list, f"field '{name}'")
    messages = []
    for index, pair in enumerate(value):
        check_type(pair, list, f"{name}[{index}]")
        if len(pair) != 2:
            raise DataError(f"{name}[{index}] has {len(pair)} texts, expected a question and its answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": read_text(text, f"{name}[{index}]")})
    return Turns(messages, [None] * len(messages))


def read_text(value: Any, name: str) -> str:
    """A text that says something, in characters that UTF-8 has."""
    check_type(value, str, f"field '{name}'")
    if not value.strip():
        raise DataError(f"field '{name}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise DataError(f"field '{name}' holds a broken character at position {error.start}") from None
    return value


def check_type(value: Any, kind: type, what: str) -> None:
    """Raises: DataError: the value is missing, or of another type."""
    if value is None:
        raise DataError(f"{what} is missing")
    if not isinstance(value, kind):
        raise DataError(f"{what} is of type {type(value).__name__}, expected {kind.__name__}")
