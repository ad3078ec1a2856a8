"""Rows turned into the tokens that TRL's SFTTrainer takes as they are.

    row (rows.py) -> text, and which of its characters are trained (chat.py) -> tokens and labels -> cut to max_length
        -> rows with nothing left to learn dropped -> packed, where asked -> cached on disk

Every format goes this one way. A token is trained when it covers a trained character, so one that straddles a border belongs to
the completion.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from hftcli.chat import Rendering, Template, find_template, render_row
from hftcli.errors import DataError, ModelError
from hftcli.recipe import DataSection, TrainSection
from hftcli.rows import Messages, Row, describe_place, find_sources, is_conversation, load_rows, naming_row
from hftcli.run import DataReport, Source, read_model, write_model

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not trained
BATCH_SIZE = 1000  # rows tokenized at once; the tokenizer spreads them over the cores
REPORT_NAME = "report.json"
SHAPING_CODE = ("rows.py", "chat.py", "data.py")  # a change in one of them is a change of the tokens
TOKEN_FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")), labels=datasets.List(datasets.Value("int32"))
)


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
        "code": [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in SHAPING_CODE],
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def _write_entry(entry: Path, sequences: Dataset, report: DataReport) -> None:
    temporary = entry.with_name(f".{entry.name}")
    for leftover in (temporary, entry):
        shutil.rmtree(leftover, ignore_errors=True)
    sequences.save_to_disk(str(temporary))
    write_model(temporary / REPORT_NAME, report)
    temporary.replace(entry)
