"""Rows that a round's start writes of itself, mixed in among those that it is taught.

They are written once, by the first process that comes, before the ranks join: it loads the start by itself. Where rows are
packed, texts are too: as many to a sequence as fit however long they are, so that it is known before they are written how many
sequences, and steps, there will be.
"""

import hashlib
import itertools
import json
from dataclasses import asdict, replace

import datasets
import torch
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from hftcli.data.cache import default_cache, hash_tokens
from hftcli.errors import ModelError
from hftcli.measuring.drift import draw_texts, identify_writer
from hftcli.measuring.turns import BareTurn, draw_conversations, find_bare_turn
from hftcli.models.checkpoint import load_finished
from hftcli.models.device import find_device, is_mixed
from hftcli.runs.spec import RoundSpec
from hftcli.training.stages import Assignment, Attempt, Rows


def add_own_rows(attempt: Attempt, task: Assignment, rows: Rows) -> Rows:
    """The rows with those that the start writes, where a method asks for some.

    Raises:
        ModelError: the start has no token to begin a text with, or writes none.
    """
    num_own = count_texts(task, rows)
    if not num_own:
        return rows
    for method in task.methods:
        method.num_given = len(rows.train)
    with attempt.clock.measure("referencing"):
        attempt.reporter.report("referencing")
        own = lay_texts(write_rows(task, rows, num_own), count_neighbours(task, rows))
    train = datasets.concatenate_datasets([rows.train, own])
    return replace(rows, train=train, tokens_digest=f"{rows.tokens_digest}+{hash_tokens(own)}")


def stand_in(task: Assignment, rows: Rows) -> Rows:
    """The rows with as many more as the start would write, for whoever counts them before it is loaded."""
    num_own = -(-count_texts(task, rows) // count_neighbours(task, rows))
    places = [number % len(rows.train) for number in range(num_own)]
    return replace(rows, train=datasets.concatenate_datasets([rows.train, rows.train.select(places)])) if places else rows


def count_texts(task: Assignment, rows: Rows) -> int:
    """Texts that the start is to write: a share of the rows, at least one."""
    section = task.spec.method.self_replay
    if section is None:
        return 0
    is_packed = "seq_lengths" in rows.train.column_names
    num_rows = sum(map(len, rows.train["seq_lengths"])) if is_packed else len(rows.train)
    return max(round(section.fraction * num_rows), 1)


def count_neighbours(task: Assignment, rows: Rows) -> int:
    """Texts to a sequence: as many as fit for certain, where rows are packed."""
    section = task.spec.method.self_replay
    if section is None or "seq_lengths" not in rows.train.column_names:
        return 1
    return task.spec.data.max_length // min(section.max_tokens, task.spec.data.max_length)


def lay_texts(texts: Dataset, num_neighbours: int) -> Dataset:
    """Texts laid side by side, so many to a sequence; the last may have fewer."""
    if num_neighbours == 1:
        return texts
    starts = range(0, len(texts), num_neighbours)
    columns = {
        name: [list(itertools.chain(*lists[start : start + num_neighbours])) for start in starts]
        for name, lists in texts.to_dict().items()
    }
    return Dataset.from_dict(columns, features=texts.features)


def find_turn(spec: RoundSpec, tokenizer: PreTrainedTokenizerBase) -> BareTurn | None:
    """What texts begin with, where they are conversations.

    Raises:
        ModelError: the chat template does not say, or has no room for a word.
    """
    section = spec.method.self_replay
    if section is None or section.begin == "nothing":
        return None
    turn, length = find_bare_turn(tokenizer), min(section.max_tokens, spec.data.max_length)
    if len(turn.before) + len(turn.after) >= length:
        raise ModelError(
            f"method.self_replay.max_tokens: the chat template alone has {len(turn.before) + len(turn.after)} tokens around a "
            f"question, and a text is cut at {length}",
            "raise method.self_replay.max_tokens, and data.max_length where that is smaller",
        )
    return turn


def write_rows(task: Assignment, rows: Rows, num_rows: int) -> Dataset:
    """What the start writes, with labels where it chose; from the cache where it has been written."""
    section = task.spec.method.self_replay
    assert section is not None  # it asks for rows
    length, turn = min(section.max_tokens, task.spec.data.max_length), find_turn(task.spec, task.tokenizer)
    identity = {
        "start": identify_writer(task.start, task.tokenizer), "num_rows": num_rows, "length": length,
        "mixed": is_mixed(task.spec), "model": task.spec.model.model_dump(include={"dtype"}),
    } | ({"turn": asdict(turn)} if turn is not None else {})  # fmt: skip
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = default_cache("own-rows") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            device = find_device()
            model = load_finished(task.start, torch.bfloat16 if is_mixed(task.spec) else torch.float32, device)
            if turn is not None:
                texts = draw_conversations(model, turn, device, num_rows, length)
            else:  # one place is the token that a text begins with, and one the end's
                texts = draw_texts(model, task.tokenizer, device, num_rows, length - 2)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(texts), encoding="utf-8")
            temporary.replace(path)
    texts = [(ids, labels) for ids, labels in json.loads(path.read_text(encoding="utf-8"))]
    columns = {"input_ids": [ids for ids, _ in texts], "labels": [labels for _, labels in texts]}
    if "seq_lengths" in rows.train.column_names:
        columns["seq_lengths"] = [[len(ids)] for ids, _ in texts]
    if not any(label >= 0 for labels in columns["labels"] for label in labels):
        raise ModelError(f"{task.start} writes nothing from nothing, so that it has no rows of its own", "drop self_replay")
    return Dataset.from_dict(columns, features=rows.train.features)
