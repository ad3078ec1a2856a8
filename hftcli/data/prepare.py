"""Rows turned into the tokens that TRL's SFTTrainer and DPOTrainer take as they are, made once and kept on disk.

places (sources.py) -> rows of a file (readers.py) -> canonical rows (formats.py, turns.py, rows.py) -> text, and which of its
    characters are trained (templates.py, chat.py, contents.py, special.py) -> tokens and labels (tokens.py, encoding.py) -> cut
    to max_length, rows with nothing left to learn dropped (streaming.py), and written as they are made (shards.py) -> several
    sources mixed (mixture.py) -> packed where asked, and kept on disk (cache.py)
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hftcli.data.asked import say_special, tidy_task
from hftcli.data.cache import SAMPLES_NAME, find_or_make
from hftcli.data.mixture import describe_draw, mix, sum_counts
from hftcli.data.rows import say_left_out
from hftcli.data.shards import (
    ShardWriter,
    count_tokens,
    find_largest,
    keep_rows,
    open_shards,
    pack_shards,
)
from hftcli.data.sources import describe_place, find_places
from hftcli.data.streaming import Tally, tokenize_source
from hftcli.data.tokens import TOKEN_FEATURES, Progress, ignore_progress, measure_percentiles, tokenize_training
from hftcli.errors import DataError
from hftcli.recipe.recipe import Objective
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.runs.records import DataReport, Source
from hftcli.tasks.examples import Task

logger = logging.getLogger(__name__)

SWITCHES = ("assistant_only_loss", "completion_only_loss")  # of `train`: which part of a row is trained


def prepare_dataset(
    data: DataSection,
    train: TrainSection,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    on_progress: Progress = ignore_progress,
    is_held_out: bool = False,
) -> tuple[Dataset, DataReport]:
    """Turn rows into sequences of `input_ids` and `labels` (and `seq_lengths`, when packed), or find them in the cache.

    Args:
        cache: folder with one folder for each key.
        on_progress: called with rows done and in all; where their number is not known, with those done twice.
        is_held_out: other rows are trained on, and what `train` says is meant for those.

    Raises:
        DataError: rows or a file are not what they should be, or `train` says of them what would have no effect.
        ModelError: the tokenizer or its chat template does not serve.
    """
    options = train.model_dump(include={"packing", *SWITCHES})
    if is_held_out and not all(options[name] for name in SWITCHES):
        options["is_held_out"] = True  # not to be found by who must be told that a switch has no effect
    return _prepare_rows(data, train, "sft", options, tokenizer, cache, on_progress)


def prepare_pairs(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, cache: Path, on_progress: Progress = ignore_progress
) -> tuple[Dataset, DataReport]:
    """Turn preference rows into `prompt_ids`, `chosen_ids` and `rejected_ids`; otherwise as `prepare_dataset`."""
    pairs, report = _prepare_rows(data, TrainSection(), "dpo", {"objective": "dpo"}, tokenizer, cache, on_progress)
    if report.num_identical:
        logger.warning(
            "%s: the cut to data.max_length %d makes the answers of %d pairs the same; %s",
            describe_place(data),
            data.max_length,
            report.num_identical,
            "they are dropped" if data.drop_identical else "they teach nothing; raise it, or set data.drop_identical: true",
        )
    return pairs, report


def prepare_task(
    task: Task, data: DataSection, tokenizer: PreTrainedTokenizerBase, cache: Path, on_progress: Progress = ignore_progress
) -> tuple[Dataset, DataReport]:
    """Turn a task's questions with their answers into `input_ids` and `labels`; otherwise as `prepare_dataset`.

    Args:
        task: with the examples to train on, all of which are taken.

    Raises:
        DataError: as `tidy_task`, or no question fits into `data.max_length`.
    """
    examples = json.dumps([(row.prompt, row.answer, row.body, row.options) for row in task.examples])
    source = Source(path=task.name, fingerprint=hashlib.sha256(examples.encode()).hexdigest(), num_bytes=None)

    def make(folder: Path) -> dict[str, Any]:
        tidied, found = tidy_task(task, tokenizer, data.special_tokens_in_text)
        columns, counts = tokenize_training(tidied, data.max_length, tokenizer, on_progress)
        writer = ShardWriter(folder, TOKEN_FEATURES)
        writer.write(columns)
        writer.close()
        num_tokens, num_trained = count_tokens(tokens := open_shards(folder))
        counts |= {**found, "num_tokens": num_tokens, "num_trained_tokens": num_trained, "max_token_id": find_largest(tokens)}
        return {"format": "task", "num_rows": len(task.examples), "num_sequences": len(tokens), "sources": (source,), **counts}

    tokens, report = find_or_make((source,), data, {"cut": task.cut}, tokenizer, cache, make)
    say_special(task.name, report.num_special, report.special_tokens)
    return tokens, report


def _prepare_rows(
    data: DataSection,
    train: TrainSection,
    objective: Objective,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    on_progress: Progress,
) -> tuple[Dataset, DataReport]:
    places = find_places(data)
    sources = tuple(place.describe() for place in places)

    def make(folder: Path) -> dict[str, Any]:
        folders = [folder / f"source-{number}" for number in range(len(places))]
        made = [
            tokenize_source(place, data, train, objective, tokenizer, part, on_progress)
            for place, part in zip(places, folders, strict=True)
        ]
        parts, tallies = zip(*made, strict=True)
        if not options.get("is_held_out"):
            check_switches(data, train, tallies)
        weights = [source.weight for source in data.parts]
        mixture, drawn = mix(parts, weights, data.seed) if len(parts) > 1 else (parts[0], parts)
        (folder / SAMPLES_NAME).write_text(json.dumps([part[0] for part in parts]), encoding="utf-8")
        if train.packing:
            pack_shards(mixture, data.max_length, folder)
        elif len(parts) > 1:
            keep_rows(mixture, folder)
        else:
            for file in folders[0].iterdir():
                file.rename(folder / file.name)
        counts = sum_counts(tallies, [source.path for source in sources])
        counts["length_percentiles"] = measure_percentiles([length for tally in tallies for length in tally.lengths])
        found = [
            source.model_copy(update={"weight": weight, **describe_draw(tally, part)})
            for source, weight, tally, part in zip(sources, weights, tallies, drawn, strict=True)
        ]
        counts["max_token_id"] = find_largest(mixture)
        counts["num_tokens"] = sum(source.num_tokens for source in found)
        counts["num_trained_tokens"] = sum(source.num_trained_tokens for source in found)
        for part in folders:
            shutil.rmtree(part)
        counts["num_sequences"] = len(open_shards(folder)) * (2 if objective == "dpo" else 1)
        return {"sources": tuple(found), **counts}

    dataset, report = find_or_make(sources, data, options, tokenizer, cache, make)
    _say_notes(data, report)
    return dataset, report


def check_switches(data: DataSection, train: TrainSection, tallies: Sequence[Tally]) -> None:
    """Raises: DataError: a switch is turned off, and no row has what it is about."""
    found = {name for tally in tallies for name in tally.switches}
    formats = " + ".join(dict.fromkeys(tally.format for tally in tallies))
    for name, other in (SWITCHES, SWITCHES[::-1]):
        if not getattr(train, name) and name not in found:
            helps = other in found and getattr(train, other)
            raise DataError(
                f"{describe_place(data)}: train.{name}: false would have no effect on rows of the format {formats}",
                f"drop it, or set train.{other}: false" if helps else "drop it",
            )


def _say_notes(data: DataSection, report: DataReport) -> None:
    """What is worth a second look."""
    place = describe_place(data)
    found = {re.split(r": |\[\]\.", name)[-1] for name in report.unused_columns}
    if missing := [column for column in data.ignore_columns if column not in found]:
        logger.warning("%s: no row has what data.ignore_columns names: %s", place, ", ".join(missing))
    if report.num_bad:
        say_left_out(place, report.num_bad, report.bad_rows[0])
    if report.num_special and data.special_tokens_in_text == "keep":
        logger.warning(
            "%s: special tokens stand in the text of %d rows (%s) and end or open turns there; data.special_tokens_in_text: "
            "escape makes them text",
            place, report.num_special, ", ".join(report.special_tokens),
        )  # fmt: skip


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
