"""Rows that do not divide by the ranks or the batch: each counts once in an epoch, and a step means the same on any number."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hftcli.runs.run import Round

NOUNS = ("heron", "willow tree by the river", "stone", "lamp", "boat with a red sail", "hill", "letter from far away")
Finish = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Seven rows of several lengths for each objective."""
    folder = tmp_path_factory.mktemp("rows")
    sft = [
        {"prompt": f"Tell of a {noun}:", "completion": f" a {noun} " + "was there " * place} for place, noun in enumerate(NOUNS)
    ]
    dpo = [{**row, "chosen": row.pop("completion"), "rejected": f" no {noun}"} for row, noun in zip(sft, NOUNS, strict=True)]
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in dpo]
    for name, found in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture(scope="module")
def finish(hft, settings, rows, tmp_path_factory) -> Finish:
    """Two epochs at a global batch of 4; the rows of metrics.jsonl."""

    def run(objective: str, num_rows: int, batch_size: int, **changes: object) -> list[dict]:
        folder = tmp_path_factory.mktemp("runs") / "run"
        values = {
            "model.path": "tinyworld", "data.path": rows / f"{objective}.jsonl", "data.max_length": 64,
            "data.max_examples": num_rows, "train.num_train_epochs": 2, "train.learning_rate": 1e-3, "train.bf16": False,
            "train.warmup_steps": 0, "train.global_batch_size": 4, "train.per_device_train_batch_size": batch_size,
            "launch.num_processes": 1, **changes,
        }  # fmt: skip
        hft(objective, "--output", folder, *settings(values))
        return Round(folder / "rounds" / f"00-{objective}").read_metrics()

    return run


def losses(metrics: list[dict]) -> list[float]:
    return [row["loss"] for row in metrics]


@pytest.fixture(scope="module")
def whole(finish) -> Callable[[str, int], list[dict]]:
    """One process and one micro-batch a step: its loss is the mean over the step by definition."""
    known: dict[tuple[str, int], list[dict]] = {}

    def get(objective: str, num_rows: int) -> list[dict]:
        if (objective, num_rows) not in known:
            known[objective, num_rows] = finish(objective, num_rows, 4)
        return known[objective, num_rows]

    return get


@pytest.mark.parametrize(
    ("objective", "num_rows", "batch_size"),
    [("sft", 7, 2), pytest.param("dpo", 7, 2, marks=pytest.mark.slow), pytest.param("dpo", 5, 1, marks=pytest.mark.slow)],
)
def test_a_part_full_step_is_the_mean_over_what_is_in_it(finish, whole, objective, num_rows, batch_size):
    expected = whole(objective, num_rows)
    found = finish(objective, num_rows, batch_size)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert len(found) == 4
    assert [row["num_tokens"] for row in found] == [row["num_tokens"] for row in expected]


ALL = [(objective, num, stage) for objective in ("sft", "dpo") for num in (5, 6, 7) for stage in (0, 1, 2, 3)]
FAST = (("sft", 5, 2), ("dpo", 5, 3))


@pytest.mark.parametrize(
    ("objective", "num_rows", "stage"),
    [pytest.param(*one, marks=() if one in FAST else pytest.mark.slow) for one in ALL],
)
def test_two_ranks_have_the_losses_of_one_process(finish, whole, objective, num_rows, stage):
    expected = whole(objective, num_rows)
    changes = {"launch.num_processes": 2, "launch.zero_stage": stage}
    found = finish(objective, num_rows, 1 + num_rows % 2, **changes)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    assert len({round(loss, 3) for loss in losses(found)}) > 2, "the losses tell the steps apart"
    assert [row["num_tokens"] for row in found] == [row["num_tokens"] for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"train.packing": True}, {"train.train_sampling_strategy": "group_by_length"}])
def test_two_ranks_agree_on_packed_rows_and_on_their_order(finish, changes):
    expected = finish("sft", 7, 4, **changes)
    found = finish("sft", 7, 2, **changes | {"launch.num_processes": 2})
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
