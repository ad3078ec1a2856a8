"""Samples of the data, as people read them: the text of a sequence in pieces, each with whether it is trained."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hftcli.data.cache import SAMPLES_NAME
from hftcli.data.tokens import IGNORED
from hftcli.runs.records import DataReport

Pieces = list[tuple[str, bool]]


def show_samples(dataset: Dataset, report: DataReport, cache: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Pieces]:
    """The first sequence of prepared data, or its first pair's two; of a mixture, the first row of every source."""
    if len(report.sources) == 1:
        return decode_samples(dataset, tokenizer, 0)
    rows = json.loads((cache / report.key / SAMPLES_NAME).read_text(encoding="utf-8"))
    return {
        f"{name} of {source.path}": pieces
        for source, row in zip(report.sources, rows, strict=True)
        for name, pieces in decode_row(row, tokenizer).items()
    }


def decode_samples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, index: int) -> dict[str, Pieces]:
    """The text of one sequence, or of one pair's two."""
    return decode_row(dataset[index], tokenizer)


def decode_row(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Pieces]:
    """The text of a row of tokens, or of a pair's two."""
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


def decode_pieces(ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Text in pieces, each with whether it is trained; together they are the whole text."""
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[end - 1]:
            # Decoded from the start each time: a decoder may treat the beginning of a text unlike its middle.
            text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((text[len(done) :], trained[end - 1]))
            done = text
    return pieces
