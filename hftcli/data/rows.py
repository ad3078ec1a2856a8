"""Where rows are, and the formats people write them in.

A row comes out in one of three canonical forms: `{"messages": [{"role", "content"}, ...]}`; `{"prompt", "completion"}`, both
plain text or both messages; or, for preferences, `{"prompt", "chosen", "rejected"}`, all plain text or all messages. Every
fault names the file, the row and the field.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset

from hftcli import PACKAGE
from hftcli.data.fingerprints import hash_rows
from hftcli.errors import DataError
from hftcli.recipe.recipe import Objective
from hftcli.recipe.sections import QUICK_START, DataSection
from hftcli.runs.records import Source

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
UNRENDERED_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # parts of a turn that would be lost

Messages = list[dict[str, str]]
Row = dict[str, Any]


def find_sources(data: DataSection) -> tuple[Source, ...]:
    """What the rows come from, hashed, with no row read."""
    file = find_file(data)
    if file is None:
        return (Source(path=data.path, fingerprint=hash_rows(_load_hub_dataset(data)), num_bytes=None),)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return (Source(path=str(file), fingerprint=digest, num_bytes=file.stat().st_size),)


def load_rows(data: DataSection, objective: Objective = "sft") -> tuple[Dataset, str]:
    """Read rows and bring them into canonical form.

    Returns:
        The rows (columns `messages`, or `prompt` and `completion`, or `prompt`, `chosen` and `rejected`), and the name of the
        format they had.

    Raises:
        DataError: naming the file, the row and the field.
    """
    file = find_file(data)
    with closing(READERS[file.suffix](file)) if file else nullcontext(_load_hub_dataset(data)) as found:
        return _convert_rows(islice(found, data.max_examples), describe_place(data), objective)


def _convert_rows(found: Iterator[Row], place: str, objective: Objective) -> tuple[Dataset, str]:
    first = next(found, None)
    if first is None:
        raise DataError(f"{place}: there are no rows in it")
    with naming_row(place, 1):
        _check_type(first, dict, "a row")
        format_name = detect_format(list(first), objective)
    rows = []
    for number, row in enumerate(chain([first], found), start=1):
        with naming_row(place, number):
            rows.append(convert_row(row, format_name))
            if is_conversation(rows[-1]) != is_conversation(rows[0]):
                kinds = ("messages", "plain text") if is_conversation(rows[-1]) else ("plain text", "messages")
                raise DataError(f"it holds {kinds[0]}, and row 1 {kinds[1]}")
    return Dataset.from_list(rows), format_name


def describe_place(data: DataSection) -> str:
    """The file that holds the rows, or the hub id."""
    return str(find_file(data) or data.path)


@contextmanager
def naming_row(place: str, number: int) -> Iterator[None]:
    """Put the place of a row before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: row {number}: {error.message}", error.fix) from None


def find_file(data: DataSection) -> Path | None:
    """The file that holds the rows; None where the path is a hub id.

    Raises:
        DataError: the path can only mean a file, and there is none.
    """
    path = Path(data.path).expanduser()
    if data.path.startswith(f"{QUICK_START}/"):  # a folder of the user's own by that name is ./tinyworld
        path = PACKAGE / path
    if path.is_dir():
        path = _choose_file(path, data.split)
    if not path.exists():
        if not _looks_local(data.path, path):
            return None
        raise DataError(f"data.path {data.path}: no such file or folder", _suggest_neighbor(path))
    if path.suffix not in READERS:
        raise DataError(f"{path} is of no type that hft reads", f"give one of: {', '.join(READERS)}")
    if data.name is not None:
        raise DataError(f"data.name is {data.name}, a configuration of a hub dataset, but {path} is a file", "drop it")
    return path


def _choose_file(folder: Path, split: str) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in READERS)
    chosen = [file for file in files if file.stem == split] or files
    if len(chosen) != 1:
        found = ", ".join(file.name for file in files) or f"none that ends in {', '.join(READERS)}"
        raise DataError(f"{folder}: not one file for data.split {split}, it holds: {found}", "set data.split, or give a file")
    return chosen[0]


def _looks_local(given: str, path: Path) -> bool:
    """Whether a missing path was meant for this machine: a hub id is `name` or `owner/name`."""
    is_file_name = path.suffix[1:].isalpha()  # the suffix of `owner/name-v1.5` is no file's
    is_deep = len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    return given.startswith((".", "~")) or path.is_absolute() or is_file_name or is_deep


def _suggest_neighbor(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    guess = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / guess[0]}?" if guess else f"look in {path.parent}"


def _load_hub_dataset(data: DataSection) -> Dataset:
    try:
        return datasets.load_dataset(data.path, data.name, split=data.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"data.path {data.path}: no such file or folder, and the hub does not give it: {reason}",
            "give a file, a folder, or a hub id with its data.name and data.split",
        ) from None


def read_json(file: Path) -> Iterator[Row]:
    """Rows of a JSON array, or of one object on each line.

    Read with the standard library, so that a fault has a line and a column may hold values of several types.
    """
    with file.open(encoding="utf-8-sig") as stream:
        try:
            first = next((line for line in stream if not line.isspace()), "")
            stream.seek(0)
            if first.lstrip().startswith("["):
                yield from json.load(stream)
                return
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield _parse_line(line, f"{file}:{number}")
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None


def _parse_line(line: str, place: str) -> Row:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None


def read_parquet(file: Path) -> Iterator[Row]:
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a Parquet file: {error}") from None


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
        raise DataError(f"{message} for `hft sft`: they are preference pairs", "train on them with `hft dpo`")
    known = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in formats.items())
    raise DataError(f"{message} for `hft {objective}`", f"rename them to one of these: {known}")


def convert_row(row: Row, format_name: str) -> Row:
    """Check a row of a known format and bring it into canonical form.

    Raises:
        DataError: naming the field; where the row stands, the caller knows.
    """
    _check_type(row, dict, "a row")
    return FORMATS[format_name].convert(row)


def is_conversation(row: Row) -> bool:
    """Whether a canonical row holds messages, which a chat template renders."""
    return "messages" in row or isinstance(row["prompt"], list)


def convert_messages(row: Row) -> Row:
    return {"messages": check_conversation(read_messages(row.get("messages"), "messages"))}


def convert_sharegpt(row: Row) -> Row:
    messages = read_messages(row.get("conversations"), "conversations", "from", "value", SHAREGPT_ROLES)
    return {"messages": check_conversation(messages)}


def convert_prompt_completion(row: Row) -> Row:
    if not isinstance(row.get("prompt"), list):
        return {name: read_text(row.get(name), name) for name in ("prompt", "completion")}
    prompt, completion = (read_messages(row.get(name), name) for name in ("prompt", "completion"))
    if completion[0]["role"] != "assistant":
        raise DataError(f"field 'completion' starts with the {completion[0]['role']}'s turn, not with the assistant's")
    check_conversation(prompt + completion)
    return {"prompt": prompt, "completion": completion}


def convert_alpaca(row: Row) -> Row:
    question = read_text(row.get("instruction"), "instruction")
    if row.get("input"):
        question += "\n\n" + read_text(row["input"], "input")
    return make_conversation(question, read_text(row.get("output"), "output"))


def convert_prompt_answer(row: Row) -> Row:
    return {"prompt": read_text(row.get("prompt"), "prompt"), "completion": read_text(row.get("answer"), "answer")}


def convert_question_answer(row: Row) -> Row:
    return make_conversation(read_text(row.get("question"), "question"), read_text(row.get("answer"), "answer"))


def convert_pair(row: Row) -> Row:
    """An explicit prompt; answers that repeat it, as UltraFeedback's do, are whole conversations."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(prompt, str) and isinstance(chosen, str):
        return check_pair({name: read_text(row.get(name), name) for name in ("prompt", "chosen", "rejected")})
    if isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1:
        pair = convert_implicit_pair(row)
        if prompt not in (message["content"] for message in pair["prompt"]):
            raise DataError("field 'prompt' differs from the prompt within 'chosen' and 'rejected'")
        return pair
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = read_messages(prompt, "prompt")
    return check_pair(
        {"prompt": prompt, "chosen": read_answer(chosen, "chosen"), "rejected": read_answer(rejected, "rejected")}
    )


def convert_implicit_pair(row: Row) -> Row:
    """Two whole conversations that part at their last turn, as messages or as hh-rlhf writes them."""
    turns = {name: _read_conversation(row.get(name), name) for name in ("chosen", "rejected")}
    if turns["chosen"][:-1] != turns["rejected"][:-1]:
        raise DataError("'chosen' and 'rejected' differ in their prompt, not only in the answer", "drop the row, or mend it")
    if len(turns["chosen"]) == 1:
        raise DataError("'chosen' and 'rejected' have no prompt", "give a field 'prompt'")
    return check_pair({"prompt": turns["chosen"][:-1], **{name: messages[-1:] for name, messages in turns.items()}})


def convert_sharegpt_pair(row: Row) -> Row:
    prompt = read_messages(row.get("conversations"), "conversations", "from", "value", SHAREGPT_ROLES)
    answers = {name: read_answer(row.get(name), name, "from", "value", SHAREGPT_ROLES) for name in ("chosen", "rejected")}
    return check_pair({"prompt": prompt, **answers})


def read_answer(
    value: Any, name: str, role_key: str = "role", content_key: str = "content", roles: dict[str, str] = ROLES
) -> Messages:
    """One turn of the assistant: its text, its message, or a list with its message."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": read_text(value, name)}]
    messages = read_messages([value] if isinstance(value, dict) else value, name, role_key, content_key, roles)
    if len(messages) > 1 or messages[0]["role"] != "assistant":
        found = ", ".join(message["role"] for message in messages)
        raise DataError(f"field '{name}' has the turns {found}, expected one turn of the assistant")
    return messages


def _read_conversation(value: Any, name: str) -> Messages:
    if isinstance(value, str):
        parts = re.split(r"\n\n(Human|Assistant): ?", read_text(value, name))
        if parts[0].strip() or len(parts) == 1:
            raise DataError(f"field '{name}' is text that does not start with a turn of hh-rlhf", "give a field 'prompt'")
        roles = {"Human": "user", "Assistant": "assistant"}
        value = [{"role": roles[role], "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)]
    return check_conversation(read_messages(value, name))


def check_pair(pair: Row) -> Row:
    """A canonical pair whose answers are not the same."""
    if isinstance(pair["prompt"], list) and pair["prompt"][-1]["role"] == "assistant":
        raise DataError("the prompt ends with the assistant's turn, and the answers are another one", "join the two turns")
    if pair["chosen"] == pair["rejected"]:
        raise DataError("fields 'chosen' and 'rejected' are equal: there is no preference to learn", "drop the row")
    return pair


def make_conversation(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def read_text(value: Any, name: str) -> str:
    _check_type(value, str, f"field '{name}'")
    if not value.strip():
        raise DataError(f"field '{name}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise DataError(f"field '{name}' holds a broken character at position {error.start}") from None
    return value


def read_messages(
    value: Any, name: str, role_key: str = "role", content_key: str = "content", roles: dict[str, str] = ROLES
) -> Messages:
    """Messages with a known role and a content; only the system's may be empty."""
    _check_type(value, list, f"field '{name}'")
    if not value:
        raise DataError(f"field '{name}' is empty")
    messages = []
    for index, message in enumerate(value):
        turn = f"{name}[{index}]"
        _check_type(message, dict, turn)
        if (role := message.get(role_key)) not in roles:
            raise DataError(f"field '{turn}.{role_key}' is {role!r}, expected one of {', '.join(roles)}")
        if lost := [key for key in UNRENDERED_KEYS if message.get(key)]:
            raise DataError(f"{turn} has {lost[0]}, which hft does not render", f"write it into the {content_key}")
        content = message.get(content_key)
        if content != "" or roles[role] != "system":
            read_text(content, f"{turn}.{content_key}")
        messages.append({"role": roles[role], "content": content})
    return messages


def check_conversation(messages: Messages) -> Messages:
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"the conversation ends with the {messages[-1]['role']}'s turn, and nothing is learned from that",
            "end it with the assistant's",
        )
    return messages


def _check_type(value: Any, kind: type, what: str) -> None:
    if value is None:
        raise DataError(f"{what} is missing")
    if not isinstance(value, kind):
        raise DataError(f"{what} is of type {type(value).__name__}, expected {kind.__name__}")


READERS = {".json": read_json, ".jsonl": read_json, ".parquet": read_parquet}


@dataclass(frozen=True)
class Format:
    """How people write rows: the columns it is known by, the way to canonical form, and what is trained on them."""

    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    objective: Objective = "sft"


FORMATS = {
    "messages": Format(("messages",), convert_messages),
    "sharegpt": Format(("conversations",), convert_sharegpt),
    "prompt-completion": Format(("prompt", "completion"), convert_prompt_completion),
    "alpaca": Format(("instruction", "output"), convert_alpaca),
    "prompt-answer": Format(("prompt", "answer"), convert_prompt_answer),
    "question-answer": Format(("question", "answer"), convert_question_answer),
    "sharegpt-pair": Format(("conversations", "chosen", "rejected"), convert_sharegpt_pair, "dpo"),
    "prompt-pair": Format(("prompt", "chosen", "rejected"), convert_pair, "dpo"),
    "conversation-pair": Format(("chosen", "rejected"), convert_implicit_pair, "dpo"),
}
