"""The rows of a search, divided: to train on, held out, to keep by the ways of training, and to ask."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hftcli import runners
from hftcli.data.formats import convert_row, detect_format
from hftcli.data.sources import find_place, name_path_alone
from hftcli.data.turns import Lost
from hftcli.errors import DataError, InputError
from hftcli.recipe.sections import SourceSection
from hftcli.recipe.starter import read_max_positions
from hftcli.runs.files import write_text
from hftcli.tasks.general import convert_closed_book
from hftcli.tasks.keys import ANSWER_KEYS, QUESTION_KEYS, refuse_keys

NUM_HELD_OUT = (8, 100)  # rows, at least and at most; a tenth of all between
NUM_ASKED = 100  # rows to keep that are asked, at most
FORM = 'give all rows as {"question": "...", "answers": ["..."]}, {"messages": [...]} or {"prompt": "...", "completion": "..."}'
LEAST_ROWS = 40
NUM_TEXTS, NUM_TEXT_TOKENS, LEAST_TEXT_TOKENS = 32, 64, 6  # of the model's own texts, of which a third is given
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Order:
    """What is searched for.

    Attributes:
        keep: file of what must not be lost; None takes texts that the model writes of itself.
        limit: what may be lost of it, in nats per token of its answers.
        seconds: that the search may take.
        num_seeds: fresh seeds on which the best is trained.
        overrides: `key=value` of every run.
    """

    model: str
    data: str
    keep: str | None
    limit: float
    seconds: float
    num_seeds: int
    overrides: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Rows:
    """The rows of a search.

    Attributes:
        trained: file of the rows to train on.
        named: file of rows to keep for the ways of training; None where there are none.
        num_named: how many they are.
        settings: `key=value` of every run, for all that is asked.
    """

    num_rows: int
    num_trained: int
    num_held_out: int
    trained: Path
    named: Path | None
    num_named: int
    settings: tuple[str, ...]


def divide_rows(order: Order) -> Rows:
    """Divide rows, and what must not be lost, into files of the search's folder; the same every time.

    Raises:
        InputError: too few rows, or another search's folder.
        DataError: rows that do not read, or that cannot be asked.
    """
    folder = order.folder / "rows"
    rows = read_raw(order.data, "--data")
    if len(rows) < LEAST_ROWS:
        raise InputError(f"{order.data}: too few rows, {len(rows)}", f"{LEAST_ROWS} are the least that can be divided")
    given = [] if order.keep is None else read_raw(order.keep, "--keep")
    kept = drop_doubled([as_asked(row, f"{order.keep}: row {number}") for number, row in enumerate(given, start=1)], drop_marks)
    if len({tuple(row) for row in kept}) > 1:
        raise DataError(f"{order.keep}: rows of several forms, which are asked in several ways", FORM)
    rows = drop_doubled(rows)
    asked = {
        "model": order.model, "data": order.data, "keep": order.keep, "limit": order.limit, "set": list(order.overrides),
        "rows": hashlib.sha256(json.dumps([rows, kept], default=str).encode()).hexdigest(),
    }  # fmt: skip
    claim = order.folder / "order.json"
    if claim.exists() and json.loads(claim.read_text(encoding="utf-8")) != asked:
        raise InputError(f"{order.folder} holds another search, or one with other rows", "give another --output")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    num_held_out = min(max(len(rows) // 10, NUM_HELD_OUT[0]), NUM_HELD_OUT[1])
    held_out, trained = rows[:num_held_out], rows[num_held_out:]
    random.Random(SHUFFLE_SEED).shuffle(kept)
    named, known = kept[::2], kept[1::2][:NUM_ASKED]
    if kept and not known:
        raise InputError(f"{order.keep} has one row", "one half is for training, the other is asked: give two or more")
    batch = 32 if len(rows) >= 1000 else 8
    folder.mkdir(parents=True, exist_ok=True)
    write_text(claim, json.dumps(asked))
    paths = {name: folder / f"{name}.jsonl" for name in ("trained", "held-out", "named", "known")}
    write_rows(paths["trained"], trained)
    write_rows(paths["held-out"], held_out)
    settings = [
        f"eval.held_out.path={json.dumps(str(paths['held-out']))}", "eval.generate=false", f"train.global_batch_size={batch}",
        f"train.per_device_train_batch_size={min(batch, 8)}",
        f"data.max_length={min(1024, read_max_positions(order.model) or 1024)}",
    ]  # fmt: skip
    settings.append(f"eval.tasks=[{json.dumps(str(paths['known']))}]")
    if kept:
        in_turns = has_template(order)
        write_rows(paths["named"], [as_lesson(row, in_turns) for row in named])
        write_rows(paths["known"], [drop_marks(row) for row in known])
    else:
        write_own_texts(order.model, paths["known"])
    named_path = paths["named"] if kept else None
    return Rows(len(rows), len(trained), num_held_out, paths["trained"], named_path, len(named), tuple(settings))


def drop_doubled(rows: list[dict[str, Any]], show: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> list[dict[str, Any]]:
    """Each row once: what is asked must not be trained on as well.

    Args:
        show: what tells a row from others.
    """
    return list({json.dumps(show(row), sort_keys=True, default=str): row for row in rows}.values())


def read_raw(path: str, option: str) -> list[dict[str, Any]]:
    """Rows as they stand.

    Args:
        option: what gives their place, and nothing of it besides.

    Raises:
        DataError: one does not read.
    """
    rows = []
    try:
        read = list(find_place(SourceSection(path=path)).read())
    except DataError as error:
        raise name_path_alone(error, option) from None
    for number, row in enumerate(read, start=1):
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: a row is an object with keys, and this is none")
        rows.append(row)
    return rows


def as_asked(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row of what must not be lost as it is asked: a question with its right answers, a conversation, or how a text goes on.

    An answer of a conversation that is not to be trained, by a mark or as a part of the prompt, comes with `train: false`.

    Raises:
        DataError: it is none of these, says more than would be asked, or its last answer is marked as not to be trained.
    """
    if isinstance(row.get("question"), str) and isinstance(row.get("answers"), list) and row["answers"]:
        refuse_keys(row, (*QUESTION_KEYS, *ANSWER_KEYS), place)
        return {"question": row["question"], "answers": row["answers"]}
    try:
        found = convert_row(row, detect_format(list(row), "sft"), Lost())
    except DataError as error:
        raise DataError(f"{place}: {error.message}", FORM) from None
    if isinstance(found.get("prompt"), str):
        return {"text": found["prompt"], "continuation": found["completion"]}
    turns = found.get("messages") or [*found.get("prompt", ()), *found.get("completion", ())]
    further = sorted({key for turn in turns for key, value in turn.items() if value} - {"role", "content"})
    if found.get("tools") or further:
        lost = "a list of tools" if found.get("tools") else further[0]
        raise DataError(
            f"{place}: {lost} carries meaning that would not be asked",
            "write it into the question, or take it out of the rows",
        )
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(f"{place}: what must not be lost is an answer, and this row ends with none", FORM)
    untrained = {*range(len(found.get("prompt", ()))), *found.get("untrained", ())}
    if len(turns) - 1 in untrained:
        raise DataError(
            f"{place}: the last answer is what would be asked, and it is marked as not to be trained",
            "take the mark off, or leave the row out",
        )
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    for index in untrained:
        if messages[index]["role"] == "assistant":
            messages[index]["train"] = False
    return {"messages": messages}


def drop_marks(row: dict[str, Any]) -> dict[str, Any]:
    """What is asked without what says how it is trained."""
    if "messages" not in row:
        return row
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]}


def as_lesson(row: dict[str, Any], has_template: bool) -> dict[str, Any]:
    """What is asked as a row to train on, laid out as it is asked."""
    if "messages" in row:
        return row
    if "text" in row:
        return {"prompt": row["text"], "completion": row["continuation"]}
    asked = convert_closed_book(row, "")
    if not has_template:
        return {"prompt": asked.text, "completion": asked.answer}
    turns = ("user", asked.text), ("assistant", asked.answer.removeprefix(" "))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def has_template(order: Order) -> bool:
    """Whether what is asked is asked in turns."""
    from hftcli.models.description import fetch_checkpoint, load_tokenizer

    if any(given.startswith("model.chat_template=") for given in order.overrides):
        return True
    return load_tokenizer(fetch_checkpoint(runners.resolve_start(order.model).path)).chat_template is not None


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSONL; what JSON has no form for, as a date, becomes text."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def write_own_texts(model: str, path: Path) -> None:
    """What a model writes of itself, the first third of each text and how it goes on; once."""
    import torch

    from hftcli.measuring.asking import MEASURING_SEED
    from hftcli.measuring.drift import draw_texts
    from hftcli.models.checkpoint import load_finished
    from hftcli.models.description import fetch_checkpoint, load_tokenizer
    from hftcli.models.device import find_device

    if path.exists():
        return
    start, device = fetch_checkpoint(runners.resolve_start(model).path), find_device(num_ranks=1, rank=0)
    tokenizer = load_tokenizer(start)
    base = load_finished(start, torch.float32, device)
    texts = draw_texts(base, tokenizer, device, NUM_TEXTS, NUM_TEXT_TOKENS, MEASURING_SEED)
    parts = [
        tuple(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[: len(ids) // 3], ids))
        for ids, _ in texts
        if len(ids) >= LEAST_TEXT_TOKENS
    ]
    rows = [
        {"text": beginning, "continuation": rest}
        for beginning, text in parts
        if text.startswith(beginning) and beginning.strip() and (rest := text.removeprefix(beginning)).strip()
    ]
    if not rows:
        raise InputError(f"{model} writes no texts of its own that are long enough to ask for", "give --keep")
    write_rows(path, drop_doubled(rows))
