"""Rows turned into the tokens that TRL's SFTTrainer and DPOTrainer take as they are, made once and kept on disk.

row (rows.py) -> text, and which of its characters are trained (chat.py) -> tokens and labels, cut to max_length, rows with
    nothing left to learn dropped, packed where asked (tokens.py) -> cached on disk
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import find_template
from hftcli.data.rows import describe_place, find_sources, load_rows
from hftcli.data.tokens import (
    BATCH_SIZE,
    IGNORED,
    Progress,
    get_backend,
    ignore_progress,
    logger,
    pack_rows,
    tokenize_dataset,
    tokenize_pairs,
    tokenize_training,
)
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.runs.files import read_model, write_model
from hftcli.runs.records import DataReport, Source
from hftcli.tasks.examples import Task

REPORT_NAME = "report.json"
SHAPING_CODE = ("rows.py", "chat.py", "tokens.py", "prepare.py")  # a change in one of them is a change of the tokens


def prepare_dataset(
    data: DataSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    on_progress: Progress = ignore_progress,
) -> tuple[Dataset, DataReport]:
    """Turn rows into sequences of `input_ids` and `labels` (and `seq_lengths`, when packed), or find them in the cache.

    Args:
        cache: folder with one folder for each key.
        on_progress: called with rows done and in all.

    Raises:
        DataError: a row or a file is not what it should be.
        ModelError: the tokenizer or its chat template does not serve.
    """

    def make() -> tuple[Dataset, dict[str, Any]]:
        rows, format_name = load_rows(data)
        tokens, counts = tokenize_dataset(rows, data, train, tokenizer, on_progress)
        sequences = pack_rows(tokens, data.max_length) if train.packing else tokens
        return sequences, {"format": format_name, "num_rows": len(rows), "num_sequences": len(sequences), **counts}

    options = train.model_dump(include={"packing", "assistant_only_loss", "completion_only_loss"})
    return _find_or_make(find_sources(data), data, options, tokenizer, cache, make)


def prepare_task(
    task: Task, data: DataSection, tokenizer: PreTrainedTokenizerBase, cache: Path, on_progress: Progress = ignore_progress
) -> tuple[Dataset, DataReport]:
    """Turn a task's questions with their answers into `input_ids` and `labels`; otherwise as `prepare_dataset`.

    Args:
        task: with the examples to train on, all of which are taken.
    """

    def make() -> tuple[Dataset, dict[str, Any]]:
        tokens, counts = tokenize_training(task, data.max_length, tokenizer, on_progress)
        return tokens, {"format": "task", "num_rows": len(task.examples), "num_sequences": len(tokens), **counts}

    examples = json.dumps([dataclasses.astuple(example) for example in task.examples])
    source = Source(path=task.name, fingerprint=hashlib.sha256(examples.encode()).hexdigest(), num_bytes=None)
    return _find_or_make((source,), data, {"cut": task.cut}, tokenizer, cache, make)


def prepare_pairs(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, cache: Path, on_progress: Progress = ignore_progress
) -> tuple[Dataset, DataReport]:
    """Turn preference rows into `prompt_ids`, `chosen_ids` and `rejected_ids`; otherwise as `prepare_dataset`."""

    def make() -> tuple[Dataset, dict[str, Any]]:
        rows, format_name = load_rows(data, "dpo")
        pairs, counts = tokenize_pairs(rows, data, tokenizer, on_progress)
        return pairs, {"format": format_name, "num_rows": len(rows), "num_sequences": 2 * len(pairs), **counts}

    pairs, report = _find_or_make(find_sources(data), data, {"objective": "dpo"}, tokenizer, cache, make)
    if report.num_identical:
        logger.warning(
            "%s: the cut to data.max_length %d makes the answers of %d pairs the same; %s",
            describe_place(data),
            data.max_length,
            report.num_identical,
            "they are dropped" if data.drop_identical else "they teach nothing; raise it, or set data.drop_identical: true",
        )
    return pairs, report


def deal_pairs(pairs: Dataset, batch_tokens: int, num_ranks: int) -> list[list[int]]:
    """Rows of pairs of like length together; each batch is shared by all ranks, so that they make the same number of passes.

    Args:
        batch_tokens: padded tokens of one rank's part, both answers counted.
    """
    columns = [[len(ids) for ids in pairs[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    lengths = [2 * (prompt + max(answers)) for prompt, *answers in zip(*columns, strict=True)]
    return deal_rows(lengths, batch_tokens, num_ranks)


def deal_rows(lengths: Sequence[int], batch_tokens: int, num_ranks: int) -> list[list[int]]:
    """Rows of like length together; each batch is shared by all ranks, so that they make the same number of passes.

    Args:
        lengths: tokens of each row.
        batch_tokens: padded tokens of one rank's part.
    """
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = []
    while ordered:
        size = max(batch_tokens // lengths[ordered[0]], 1) * num_ranks
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


def _find_or_make(
    sources: tuple[Source, ...],
    data: DataSection,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    make: Callable[[], tuple[Dataset, dict[str, Any]]],
) -> tuple[Dataset, DataReport]:
    """A dataset and its report from the cache, or made and put there.

    Args:
        sources: where the rows come from, hashed.
        options: what shapes the tokens besides the data and the tokenizer.
        make: gives the dataset and what its report says of it.
    """
    datasets.disable_progress_bars()  # hft shows its own
    key = make_key(data, options, tokenizer, sources)
    entry = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):  # the ranks of a round come here together: the first works, the others wait
        if not (entry / REPORT_NAME).exists():
            dataset, counts = make()
            _write_entry(entry, dataset, DataReport(sources=sources, key=key, tokens_digest=hash_tokens(dataset), **counts))
        report = read_model(entry / REPORT_NAME, DataReport)
        # The same bytes may have been read at another place.
        return datasets.load_from_disk(str(entry)), report.model_copy(update={"sources": sources})


def default_cache(kind: str = "tokens") -> Path:
    """Where tokens, or things of another kind, are kept: `$HFT_CACHE`, or `~/.cache/hft`."""
    return Path(os.environ.get("HFT_CACHE", "~/.cache/hft")).expanduser() / kind


def check_positions(max_length: int, max_positions: int | None) -> None:
    """Raises: DataError: sequences would be longer than the model has positions for."""
    if max_positions is not None and max_length > max_positions:
        raise DataError(
            f"data.max_length is {max_length}, but the model has {max_positions} positions",
            f"set data.max_length to {max_positions} or less",
        )


def decode_samples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, index: int) -> dict[str, list[tuple[str, bool]]]:
    """The text of one sequence, or of one pair's two, in pieces, each with whether it is trained."""
    row = dataset[index]
    if "labels" in row:
        return {"sample": decode_pieces(row["input_ids"], [label != IGNORED for label in row["labels"]], tokenizer)}
    return {
        name: decode_pieces(
            row["prompt_ids"] + row[f"{name}_ids"],
            [False] * len(row["prompt_ids"]) + [True] * len(row[f"{name}_ids"]),
            tokenizer,
        )
        for name in ("chosen", "rejected")
    }


def decode_pieces(ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Text in pieces, each with whether it is trained; together they are the whole text."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[end - 1]:
            # Decoded from the start each time: a decoder may treat the beginning of a text unlike its middle.
            text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((text[len(done) :], trained[end - 1]))
            done = text
    return pieces


def make_key(
    data: DataSection, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sources: tuple[Source, ...]
) -> str:
    """A hash of all that shapes the tokens. What it left out would be trained on stale."""
    template = find_template(tokenizer)
    shaping = {
        "sources": [source.fingerprint for source in sources],
        "data": data.model_dump(exclude={"path", "root"}),
        "options": options,
        "tokenizer": get_backend(tokenizer).to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "template": template and template.source,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "trl")},
        "code": [hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in SHAPING_CODE],
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def hash_tokens(dataset: Dataset) -> str:
    """A hash of what is trained on, whatever made it and however it is stored: the lengths and numbers of each column."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        lengths, numbers = hashlib.sha256(), hashlib.sha256()
        for batch in dataset.select_columns(name).with_format("arrow").iter(BATCH_SIZE):
            lists = batch[name].combine_chunks()
            lengths.update(lists.value_lengths().to_numpy().astype("<i4"))
            numbers.update(lists.flatten().to_numpy().astype("<i4"))
        digest.update(f"{name} {lengths.hexdigest()} {numbers.hexdigest()}\n".encode())
    return digest.hexdigest()


def _write_entry(entry: Path, sequences: Dataset, report: DataReport) -> None:
    temporary = entry.with_name(f".{entry.name}")
    for leftover in (temporary, entry):
        shutil.rmtree(leftover, ignore_errors=True)
    sequences.save_to_disk(str(temporary))
    write_model(temporary / REPORT_NAME, report)
    temporary.replace(entry)
