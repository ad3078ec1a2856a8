"""Which units matter, where `freeze.rank` goes by a score of the round's start: taken before the ranks join, kept in the round.

The first process that comes takes the scores and leaves them as a file, by which all of them make the plan. They are kept for
other rounds from the same start as well.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from datasets import Dataset
from filelock import FileLock

from hftcli.data.cache import default_cache, hash_tokens
from hftcli.data.tokens import IGNORED
from hftcli.freezing.directions import list_coordinates
from hftcli.freezing.rule import ImportanceRule
from hftcli.freezing.selection import RANKINGS, complete_plan, make_plan
from hftcli.measuring.drift import draw_texts, identify_writer
from hftcli.measuring.importance import (
    Lesson,
    score_fisher,
    score_gradient,
    score_magnitude,
    score_spectrum,
    score_wanda,
)  # fmt: skip
from hftcli.methods.method import draw_rows
from hftcli.models.checkpoint import load_finished
from hftcli.models.device import find_device, is_mixed
from hftcli.models.reader import Start
from hftcli.runs.files import read_model, write_model
from hftcli.runs.importance import UnitScores
from hftcli.runs.seals import seal_file
from hftcli.training.earlier import OWN, SAMPLES, list_token_ids, measure_own, measure_rows
from hftcli.training.stages import Assignment, Attempt, Rows


def settle_ranking(attempt: Attempt, task: Assignment, rows: Rows) -> Assignment:
    """The assignment with the plan that the scores of its start make, where its rule ranks by these."""
    rule, path = task.spec.freeze, attempt.round.importance_path
    if rule.rank in RANKINGS:
        return task
    attempt.reporter.report("choosing")
    key = make_key(task, rows)
    with FileLock(path.with_name(".importance.lock")):
        if not path.exists() or read_model(path, UnitScores).key != key:
            write_model(path, find_scores(task, rows, key))
    scores, units = read_model(path, UnitScores).scores, task.network.units
    plan = make_plan(units, rule, task.spec.index, task.network.num_heads, scores)
    for method in task.methods:
        plan = method.narrow_plan(plan, units, task.network.num_heads)
        method.check_start(task.start, plan)
    return replace(task, plan=complete_plan(plan, importance=seal_file(path).sha256))


def make_key(task: Assignment, rows: Rows) -> str:
    """A hash of all that the scores come from."""
    freeze = task.spec.freeze
    importance = freeze.importance or ImportanceRule()
    shaping = {
        "start": identify_writer(task.start, task.tokenizer),
        "rank": freeze.rank,
        "samples": rows.scored_digest or SAMPLES,
        "new": (hash_tokens(rows.own), importance.samples) if freeze.rank == "gradient" else None,
        "model": task.spec.model.model_dump(include={"dtype"}),
        "seed": freeze.seed,
        "mixed": is_mixed(task.spec),
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def find_scores(task: Assignment, rows: Rows, key: str) -> UnitScores:
    """The scores of a start, be they kept or taken."""
    kept = default_cache("importance") / f"{key}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        rank = task.spec.freeze.rank
        source = "the round's own rows" if rank == "gradient" else "" if rank in ("magnitude", "spectrum") else OWN
        if rows.scored is not None:
            source = f"freeze.importance {rows.scored_digest}"
        write_model(kept, UnitScores(rank=rank, source=source, key=key, scores=take_scores(task, rows)))
    return read_model(kept, UnitScores)


def take_scores(task: Assignment, rows: Rows) -> dict[str, float]:
    """Score the start's units."""
    freeze, device = task.spec.freeze, find_device()
    importance = freeze.importance or ImportanceRule()
    units = [unit for unit in task.network.units if unit.layer is not None]
    stored = Start(task.spec.model, task.start, (*task.plan.trained, *task.plan.frozen))

    def read(name: str) -> torch.Tensor:
        return stored.read_master(name).to(device)

    if freeze.rank == "magnitude":
        return score_magnitude(units, read)
    if freeze.rank == "spectrum":
        return score_spectrum(units, read)
    if freeze.rank == "wanda":
        inputs = list_coordinates(units)
        moments = measure_own(task, inputs) if rows.scored is None else measure_rows(task, inputs, rows.scored)
        return score_wanda(units, read, {name: values[:, 0, 0].to(device) for name, values in moments.items()})
    model = load_finished(task.start, torch.bfloat16 if is_mixed(task.spec) else torch.float32, device)
    if freeze.rank == "gradient":
        new = draw_rows(rows.own, importance.samples, "gradient", freeze.seed)
        return score_gradient(units, model, list_lessons(new), device)
    texts = draw_texts(model, task.tokenizer, device) if rows.scored is None else ()
    read_texts = [ids for ids, _ in texts] if rows.scored is None else list_token_ids(rows.scored)
    return score_fisher(units, model, read_texts, device, freeze.seed)


def list_lessons(rows: Dataset) -> Iterator[Lesson]:
    """What rows teach: packed ones apart; of pairs, the chosen answer, and away from the rejected one."""
    for row in rows:
        if "chosen_ids" in row:
            for sign, name in ((1.0, "chosen_ids"), (-1.0, "rejected_ids")):
                yield sign, row["prompt_ids"] + row[name], [IGNORED] * len(row["prompt_ids"]) + row[name]
            continue
        ids, labels = row["input_ids"], row["labels"]
        for length in row.get("seq_lengths", [len(ids)]):
            yield 1.0, ids[:length], labels[:length]
            ids, labels = ids[length:], labels[length:]
