"""Rows of the formats people have, turned into the tokens that TRL's SFTTrainer takes as they are.

    row -> a conversation, or a prompt and its completion -> text, and which of its characters are trained
        -> tokens and labels -> cut to max_length -> rows with nothing left to learn dropped -> packed, where asked
        -> cached on disk

Every format goes this one way. A row has one of two canonical forms: `{"messages": [{"role", "content"}, ...]}`, or
`{"prompt", "completion"}`, both plain text or both messages. What is trained is settled on the characters, where it
can be read and checked; a token is trained when it covers a trained character, so one that straddles a border belongs
to the completion.
"""

import difflib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl import pack_dataset
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hftcli.errors import DataError, ModelError
from hftcli.recipe import PACKAGE, DataSection, Section, TrainSection
from hftcli.run import read_model, write_model

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not trained
BATCH_SIZE = 1000  # rows tokenized at once; the tokenizer spreads them over the cores
REPORT_NAME = "report.json"
TOKEN_FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")), labels=datasets.List(datasets.Value("int32"))
)
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
UNRENDERED_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # parts of a turn that would be lost

Messages = list[dict[str, str]]
Row = dict[str, Any]
Span = tuple[int, int]  # characters [start, end)


class Source(Section):
    """Where rows came from."""

    path: str
    """The file, or the hub id."""
    fingerprint: str
    """sha256 of the file's bytes; of a hub dataset, the fingerprint that `datasets` gives it."""
    num_bytes: int | None
    """Size of the file; null for a hub dataset."""


class DataReport(Section):
    """What became of the rows."""

    format: str
    """Format of the rows, as detected."""
    num_rows: int
    """Rows read."""
    num_used: int
    """Rows trained on."""
    num_dropped: int
    """Rows left out because the cut to `data.max_length` took all of their trained tokens."""
    num_truncated: int
    """Rows trained on without their end, which the cut took."""
    num_sequences: int
    """Sequences: rows, or packs of rows."""
    num_tokens: int
    """Tokens in all sequences."""
    num_trained_tokens: int
    """Tokens that count in the loss."""
    length_percentiles: dict[str, int]
    """Tokens of a row before the cut: `p50`, `p90`, `p99`, `max`."""
    sources: tuple[Source, ...]
    """Where the rows came from."""
    key: str
    """Name of the entry in the cache: a hash of all that shapes the tokens."""


def prepare_dataset(
    data: DataSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Dataset, DataReport]:
    """Turn rows into sequences of `input_ids` and `labels` (and `seq_lengths`, when packed), or find them in the cache.

    Args:
        cache: folder with one folder for each key.
        on_progress: called with rows done and in all.

    Raises:
        DataError: a row or a file is not what it should be.
        ModelError: the tokenizer or its chat template does not serve.
    """
    datasets.disable_progress_bars()  # hft shows its own
    sources = find_sources(data)
    key = make_key(data, train, tokenizer, sources)
    entry = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):  # the ranks of a round come here together: the first works, the others wait
        if not (entry / REPORT_NAME).exists():
            rows, format_name = load_rows(data)
            tokens, counts = tokenize_dataset(rows, data, train, tokenizer, on_progress)
            sequences = _pack(tokens, data.max_length) if train.packing else tokens
            report = DataReport(
                format=format_name, num_rows=len(rows), num_sequences=len(sequences), sources=sources, key=key, **counts
            )
            _write_entry(entry, sequences, report)
        report = read_model(entry / REPORT_NAME, DataReport)
        # The same bytes may have been read at another place.
        return datasets.load_from_disk(str(entry)), report.model_copy(update={"sources": sources})


def default_cache() -> Path:
    """Where tokens are kept: `$HFT_CACHE`, or `~/.cache/hft`."""
    return Path(os.environ.get("HFT_CACHE", "~/.cache/hft")).expanduser() / "tokens"


def check_positions(max_length: int, max_positions: int | None) -> None:
    """Raises: DataError: sequences would be longer than the model has positions for."""
    if max_positions is not None and max_length > max_positions:
        raise DataError(
            f"data.max_length is {max_length}, but the model has {max_positions} positions",
            f"set data.max_length to {max_positions} or less",
        )


def decode_sample(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, index: int) -> list[tuple[str, bool]]:
    """The text of one sequence in pieces, each with whether it is trained; together they are the whole text."""
    row = dataset[index]
    trained = [label != IGNORED for label in row["labels"]]
    pieces, done = [], ""
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[end - 1]:
            # Decoded from the start each time: a decoder may treat the beginning of a text unlike its middle.
            text = tokenizer.decode(row["input_ids"][:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((text[len(done) :], trained[end - 1]))
            done = text
    return pieces


# ---- Where the rows are --------------------------------------------------------------------------


def find_sources(data: DataSection) -> tuple[Source, ...]:
    """What the rows come from, hashed, with no row read."""
    file = find_file(data)
    if file is None:
        return (Source(path=data.path, fingerprint=_load_hub_dataset(data)._fingerprint, num_bytes=None),)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return (Source(path=str(file), fingerprint=digest, num_bytes=file.stat().st_size),)


def load_rows(data: DataSection) -> tuple[Dataset, str]:
    """Read rows and bring them into canonical form.

    Returns:
        The rows (columns `messages`, or `prompt` and `completion`), and the name of the format they had.

    Raises:
        DataError: naming the file, the row and the field.
    """
    file, place = find_file(data), describe_place(data)
    found = islice(READERS[file.suffix](file) if file else _load_hub_dataset(data), data.max_examples)
    first = next(found, None)
    if first is None:
        raise DataError(f"{place}: there are no rows in it")
    with naming_row(place, 1):
        _check_type(first, dict, "a row")
        format_name = detect_format(list(first))
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
    if not path.exists() and path.parts[:1] == ("tinyworld",):
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


# ---- One row in canonical form -------------------------------------------------------------------


def detect_format(columns: list[str]) -> str:
    """The first format whose columns are all there.

    Raises:
        DataError: none is.
    """
    for name, known in FORMATS.items():
        if set(known.columns) <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise DataError(f"the columns {', '.join(columns)} are of no known format", f"rename them to one of these: {known}")


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


# ---- Text, and which of its characters are trained -----------------------------------------------


@dataclass(frozen=True)
class Rendering:
    """The text of a row.

    Attributes:
        spans: the trained characters.
        is_plain: no chat template made it, so the tokenizer adds what it puts before every text.
    """

    text: str
    spans: list[Span]
    is_plain: bool


@dataclass(frozen=True)
class Template:
    """A chat template with the special tokens it may print."""

    source: str
    special_tokens: dict[str, str]

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text, and the characters between generation markers."""
        return self._render(messages, return_assistant_tokens_mask=True)

    def _render(self, messages: Messages, **options: bool) -> tuple[str, list[Span]]:
        try:
            texts, marked = render_jinja_template([messages], chat_template=self.source, **options, **self.special_tokens)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template does not render the conversation: {error}") from None
        return texts[0], marked[0] if marked else []


def find_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The tokenizer's chat template, or TRL's variant of it that marks what the assistant says; None if it has none."""
    if tokenizer.chat_template is None:
        return None
    try:
        variant = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none for this template
        variant = None
    return Template(variant or tokenizer.get_chat_template(), tokenizer.special_tokens_map)


def render_row(row: Row, tokenizer: PreTrainedTokenizerBase, template: Template | None, train: TrainSection) -> Rendering:
    """Render a canonical row.

    Raises:
        DataError: the template does not render it, or not so that the assistant's part can be told.
        ModelError: the tokenizer has no chat template for a conversation, or no end token for plain text.
    """
    if not is_conversation(row):
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no end token, so a model could not learn to stop", "give its eos_token")
        return render_plain(row["prompt"], row["completion"], tokenizer.eos_token, train)
    if template is None:
        raise ModelError(
            "the rows are conversations, but the tokenizer has no chat template",
            f"set model.chat_template to {', '.join(CHAT_TEMPLATES)} or a Jinja file",
        )
    if "messages" in row:
        return render_conversation([], row["messages"], template, train)
    return render_conversation(row["prompt"], row["completion"], template, train)


def render_plain(prompt: str, completion: str, eos_token: str, train: TrainSection) -> Rendering:
    text = prompt + completion.removesuffix(eos_token) + eos_token
    start = len(prompt) if train.completion_only_loss else 0
    return Rendering(text, [(start, len(text))], is_plain=True)


def render_conversation(prompt: Messages, completion: Messages, template: Template, train: TrainSection) -> Rendering:
    """Render messages; those of the prompt, where there is one, are not trained under `completion_only_loss`."""
    messages = prompt + completion
    if train.assistant_only_loss:
        text, spans = find_assistant_spans(messages, template)
    else:
        text = template.render(messages)
        spans = [(0, len(text))]
    if prompt and train.completion_only_loss:
        border = _measure_prefix(text, template.render(prompt, add_generation_prompt=True))
        spans = [(max(start, border), end) for start, end in spans if end > border]
    return Rendering(text, spans, is_plain=False)


def find_assistant_spans(messages: Messages, template: Template) -> tuple[str, list[Span]]:
    """The text, and in it the contents of the assistant's turns with their end tokens.

    Neither what the generation prompt gives the model, nor white space after the end token, is part of a span.
    """
    if has_generation_markers(template.source):
        return _find_marked_spans(messages, template)
    return _find_turns(messages, template)


def _find_marked_spans(messages: Messages, template: Template) -> tuple[str, list[Span]]:
    text, marked = template.render_marked(messages)
    header = _render_header(messages, template)
    spans = []
    for start, end in _join_adjacent(marked):
        # Some templates put their markers around the header as well, or around a part of it.
        found = text.rfind(header, max(start - len(header), 0), start + len(header))
        start = start if found < 0 else found + len(header)
        if spoken := text[start:end].rstrip():
            spans.append((start, start + len(spoken)))
    return text, spans


def _render_header(messages: Messages, template: Template) -> str:
    """What the generation prompt adds before the assistant's first turn."""
    roles = [message["role"] for message in messages]
    before = messages[: roles.index("assistant")]
    if not before:
        return ""
    asked = template.render(before, add_generation_prompt=True)
    return asked.removeprefix(template.render(before))


def _join_adjacent(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start, _ = joined.pop()
        joined.append((start, end))
    return joined


def _find_turns(messages: Messages, template: Template) -> tuple[str, list[Span]]:
    """Without markers: a turn lies between the generation prompt before it and the end of the conversation up to it."""
    text = template.render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _measure_prefix(text, template.render(messages[:index], add_generation_prompt=True))
            end = _measure_prefix(text, template.render(messages[: index + 1]).rstrip())
            spans.append((start, end))
    return text, spans


def _measure_prefix(text: str, prefix: str) -> int:
    if not text.startswith(prefix):
        raise DataError(
            "the chat template renders the beginning of a conversation differently when more turns follow, so what the "
            "assistant says cannot be told apart",
            "set model.chat_template to a Jinja file with {% generation %} and {% endgeneration %} around that part",
        )
    return len(prefix)


# ---- Tokens and labels ---------------------------------------------------------------------------


def tokenize_dataset(
    rows: Dataset,
    data: DataSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenize canonical rows, cut them to `data.max_length` and drop those that lose every trained token.

    Returns:
        The tokens of the rows that are left, and the counts of a `DataReport` that do not depend on packing.
    """
    template, place = find_template(tokenizer), describe_place(data)
    parts, lengths = [], []
    counts = {"num_used": 0, "num_truncated": 0, "num_tokens": 0, "num_trained_tokens": 0}
    for start in range(0, len(rows), BATCH_SIZE):
        on_progress(start, len(rows))
        batch = rows.skip(start).take(BATCH_SIZE).to_list()
        tokenized = tokenize_rows(batch, place, start + 1, tokenizer, template, train)
        if start == 0 and is_conversation(batch[0]) and train.assistant_only_loss:
            _warn_if_endless(tokenized[0][1], tokenizer)
        kept: dict[str, list] = {"input_ids": [], "labels": []}
        for ids, labels in tokenized:
            lengths.append(len(ids))
            cut_ids, cut_labels = ids[: data.max_length], labels[: data.max_length]
            if num_trained := int((cut_labels != IGNORED).sum()):
                kept["input_ids"].append(cut_ids)
                kept["labels"].append(cut_labels)
                counts["num_used"] += 1
                counts["num_truncated"] += len(cut_ids) < len(ids)
                counts["num_tokens"] += len(cut_ids)
                counts["num_trained_tokens"] += num_trained
        parts.append(Dataset.from_dict(kept, features=TOKEN_FEATURES))
    on_progress(len(rows), len(rows))
    if not counts["num_used"]:
        raise DataError(
            f"{place}: none of the {len(rows)} rows has a trained token among its first {data.max_length} tokens",
            "raise data.max_length",
        )
    percentiles = {f"p{share}": int(np.percentile(lengths, share, method="nearest")) for share in (50, 90, 99)}
    return datasets.concatenate_datasets(parts), {
        **counts,
        "num_dropped": len(rows) - counts["num_used"],
        "length_percentiles": {**percentiles, "max": max(lengths)},
    }


def tokenize_rows(
    rows: list[Row],
    place: str,
    first_number: int,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    train: TrainSection,
) -> list[tuple[list[int], np.ndarray]]:
    """Token ids and labels of canonical rows, whole.

    Args:
        place: where the rows are from; with `first_number`, the number of the first of them, it names a bad one.
    """
    renderings = []
    for number, row in enumerate(rows, start=first_number):
        with naming_row(place, number):
            renderings.append(render_row(row, tokenizer, template, train))
    encodings = get_backend(tokenizer).encode_batch(
        [rendering.text for rendering in renderings], add_special_tokens=renderings[0].is_plain
    )
    tokenized = []
    for number, (rendering, encoding) in enumerate(zip(renderings, encodings, strict=True), start=first_number):
        ids, labels = label_tokens(rendering, encoding)
        if not rendering.is_plain and train.assistant_only_loss:
            with naming_row(place, number):
                _check_mask(labels)
        tokenized.append((ids, labels))
    return tokenized


def tokenize_answer(prompt: str | Messages, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of a question and its answer, as in training: the answer and its end have labels."""
    completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    row = {"prompt": prompt, "completion": completion}
    rendering = render_row(row, tokenizer, find_template(tokenizer), TrainSection())
    ids, labels = label_tokens(rendering, get_backend(tokenizer).encode(rendering.text, add_special_tokens=rendering.is_plain))
    return ids, labels.tolist()


def label_tokens(rendering: Rendering, encoding: tokenizers.Encoding) -> tuple[list[int], np.ndarray]:
    """Token ids, and labels (T,): the ids of tokens that cover a trained character, `IGNORED` for the others."""
    ids = np.array(encoding.ids)
    starts, ends = np.array(encoding.offsets).T
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in rendering.spans:
        trained |= (ends > start) & (starts < end)
    # The text brings its own end token, so one that the tokenizer adds would be the second.
    length = len(ids) - encoding.special_tokens_mask[-1]
    return encoding.ids[:length], np.where(trained, ids, IGNORED)[:length]


def get_backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """The Rust tokenizer, which knows the characters of each token, set to neither cut nor pad.

    Raises:
        ModelError: there is none.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer {tokenizer.name_or_path} has no tokenizer.json", "convert it to a fast one")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_mask(labels: np.ndarray) -> None:
    trained = (labels != IGNORED).nonzero()[0]
    if not len(trained):
        reason = "none of its tokens is trained: the chat template marks nothing as the assistant's"
    elif len(trained) == trained[-1] + 1:  # white space at the end is never trained
        reason = "all of its tokens are trained: the chat template marks everything as the assistant's"
    else:
        return
    raise DataError(reason, "mend the {% generation %} markers of the template, or set train.assistant_only_loss: false")


def _warn_if_endless(labels: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so when no end token is among what is trained."""
    if labels[labels != IGNORED][-1] not in tokenizer.get_added_vocab().values():
        logger.warning(
            "the chat template of %s ends the assistant's turn with no special token: the model will not learn to stop",
            tokenizer.name_or_path or "the tokenizer",
        )


def _pack(tokens: Dataset, max_length: int) -> Dataset:
    """Lay rows side by side into sequences of `max_length` tokens; `seq_lengths` tells them apart."""
    return pack_dataset(tokens, max_length, "bfd", {"keep_in_memory": True})


# ---- The cache -----------------------------------------------------------------------------------


def make_key(data: DataSection, train: TrainSection, tokenizer: PreTrainedTokenizerBase, sources: tuple[Source, ...]) -> str:
    """A hash of all that shapes the tokens. What it left out would be trained on stale."""
    template = find_template(tokenizer)
    shaping = {
        "sources": [source.fingerprint for source in sources],
        "data": data.model_dump(exclude={"path"}),
        "train": train.model_dump(include={"packing", "assistant_only_loss", "completion_only_loss"}),
        "tokenizer": get_backend(tokenizer).to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "template": template and template.source,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "trl")},
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def _write_entry(entry: Path, sequences: Dataset, report: DataReport) -> None:
    temporary = entry.with_name(f".{entry.name}")
    for leftover in (temporary, entry):
        shutil.rmtree(leftover, ignore_errors=True)
    sequences.save_to_disk(str(temporary))
    write_model(temporary / REPORT_NAME, report)
    temporary.replace(entry)


# ---- The tables ----------------------------------------------------------------------------------


def set_chat_template(tokenizer: PreTrainedTokenizerBase, value: str | None) -> None:
    """Give the tokenizer a template of `CHAT_TEMPLATES`, or one from a Jinja file; None leaves its own.

    Raises:
        ModelError: there is no such template, it is not Jinja, or the tokenizer lacks its end token.
    """
    if value is None:
        return
    if value in CHAT_TEMPLATES:
        end_token = "<|im_end|>" if value == "chatml" else tokenizer.eos_token
        if end_token not in tokenizer.get_added_vocab():
            raise ModelError(
                f"model.chat_template {value} ends turns with {end_token or 'an end token'}; the tokenizer has none",
                "take another template",
            )
        tokenizer.chat_template = CHAT_TEMPLATES[value]
        return
    if not Path(value).is_file():
        known = ", ".join(CHAT_TEMPLATES)
        raise ModelError(f"model.chat_template {value}: no such file", f"give a Jinja file, or one of: {known}")
    source = Path(value).read_text(encoding="utf-8")
    try:
        render_jinja_template([], chat_template=source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{value}:{error.lineno}: not a Jinja template: {error.message}") from None
    tokenizer.chat_template = source


CHAT_TEMPLATES = {
    "chatml": r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    # As Tulu 2 was trained: the beginning token first, where the model has one.
    "tulu": r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}""",
}

READERS = {".json": read_json, ".jsonl": read_json, ".parquet": read_parquet}


@dataclass(frozen=True)
class Format:
    """How people write rows: the columns it is known by, and the way to canonical form."""

    columns: tuple[str, ...]
    convert: Callable[[Row], Row]


FORMATS = {
    "messages": Format(("messages",), convert_messages),
    "sharegpt": Format(("conversations",), convert_sharegpt),
    "prompt-completion": Format(("prompt", "completion"), convert_prompt_completion),
    "alpaca": Format(("instruction", "output"), convert_alpaca),
    "prompt-answer": Format(("prompt", "answer"), convert_prompt_answer),
    "question-answer": Format(("question", "answer"), convert_question_answer),
}
