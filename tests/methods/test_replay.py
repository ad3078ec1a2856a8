"""Replay: which rows of earlier tasks come, when, and in which order."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from methods.rounds import make_rows, make_spec, make_trainer

from hftcli.data.shards import ShardWriter, open_shards
from hftcli.data.tokens import TOKEN_FEATURES
from hftcli.launching.carrying import check_method
from hftcli.methods import make_methods
from hftcli.methods.method import draw_rows
from hftcli.methods.replay import order_passes
from hftcli.recipe.sections import LaunchSection, TrainSection


def list_firsts(rows: Dataset) -> list[int]:
    return [ids[0] for ids in rows["input_ids"]]


def replay(dataset: Dataset, rows: dict[str, Dataset], earlier: tuple[str, ...], **settings: object) -> Dataset:
    train = settings.pop("train", {})
    spec = make_spec({"replay": settings}, tuple((task, Path()) for task in earlier), **train)
    (method,) = make_methods(spec)
    assert set(method.needed_tasks) == rows.keys() - {"new"}
    return method.prepare_rows(dataset, rows)


def test_replay_mixes_in_a_share_of_each_earlier_task():
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140)), "b": make_rows(*range(200, 220))}
    firsts = list_firsts(replay(rows["new"], rows, ("a", "b"), fraction=0.25))
    from_a, from_b = firsts[10:20], firsts[20:]
    assert firsts[:10] == list(range(10))
    assert len(set(from_a) & set(range(100, 140))) == 10  # a quarter of 40, each once
    assert len(set(from_b) & set(range(200, 220))) == 5
    assert from_a != list(range(100, 110))  # at random, not the first ones


def test_replay_draws_the_same_rows_of_a_task_in_every_round():
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140)), "b": make_rows(*range(200, 240))}
    second = list_firsts(replay(rows["new"], {"new": rows["new"], "a": rows["a"]}, ("a",), fraction=0.1))
    third = list_firsts(replay(rows["new"], rows, ("a", "b"), fraction=0.1))
    assert second[10:] == third[10:14]
    assert [first - 100 for first in third[10:14]] != [first - 200 for first in third[14:]]  # each task has a draw of its own


def test_replay_after_the_task_is_one_pass_behind_all_epochs(tmp_path):
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140)), "lima": make_rows(*range(300, 307))}
    settings = {"fraction": 0.1, "when": "after", "extra": "lima", "train": {"num_train_epochs": 2.5}}
    firsts = list_firsts(replay(rows["new"], rows, ("a",), **settings))
    assert len(firsts) == 25 + 4 + 7
    assert sorted(firsts[:10]) == sorted(firsts[10:20]) == list(range(10))
    assert firsts[:10] != firsts[10:20]
    assert len(set(firsts[20:25]) & set(range(10))) == 5
    assert set(firsts[25:]) > set(range(300, 307))
    assert firsts[25:] != sorted(firsts[25:])


def test_replay_after_the_task_leaves_the_tokens_of_earlier_ones_in_the_cache_alone(tmp_path):
    """An earlier hft wrote the order of what it replayed beside them, and read that as tokens from then on."""
    writer = ShardWriter(tmp_path, TOKEN_FEATURES)
    writer.write(make_rows(*range(100, 140)).to_dict())
    writer.close()
    new = make_rows(*range(10))
    found = replay(new, {"new": new, "a": open_shards(tmp_path)}, ("a",), fraction=0.5, when="after")
    assert len(found) == 10 + 20
    assert [file.name for file in tmp_path.iterdir()] == ["tokens-00000.arrow"]
    open_shards(tmp_path).shuffle(1)
    assert len([*tmp_path.iterdir()]) == 2
    assert list_firsts(open_shards(tmp_path)) == list(range(100, 140))


def test_the_order_after_which_replay_comes_goes_by_the_seed_of_the_data():
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140))}
    first, same, other, drawn = (
        list_firsts(replay(rows["new"], rows, ("a",), fraction=0.2, when="after", train=train))
        for train in ({}, {"data_seed": 42}, {"data_seed": 0}, {"seed": 0, "data_seed": 42})
    )
    assert first == same  # train.seed is 42
    assert first[:10] != other[:10]
    assert first[10:] != other[10:]
    assert sorted(first) == sorted(other)  # which rows are replayed goes by train.seed
    assert first[:10] == drawn[:10]


def test_the_trainer_takes_the_rows_after_the_task_in_their_order(tmp_path):
    spec = make_spec({"replay": {"when": "after", "fraction": 1.0}}, (("a", Path()),), num_train_epochs=2, global_batch_size=4)
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 104))}
    trainer = make_trainer(spec, rows, tmp_path)
    seen = [first for batch in trainer.get_train_dataloader() for first in batch["input_ids"][:, 0].tolist()]
    assert sorted(seen[:20]) == sorted([*range(10), *range(10)])
    assert sorted(seen[20:]) == list(range(100, 104))


def test_steps_that_are_given_are_steps_on_the_task():
    order = order_passes(10, TrainSection(max_steps=6, global_batch_size=4, num_train_epochs=99), seed=0)
    assert len(order) == 24
    assert np.bincount(order[:20]).tolist() == [2] * 10


def test_without_earlier_tasks_replay_leaves_the_rows_alone():
    rows = {"new": make_rows(*range(10))}
    assert replay(rows["new"], rows, ()) is rows["new"]


def test_more_rows_than_there_are_is_all_of_them():
    assert list_firsts(draw_rows(make_rows(1, 2, 3), 9, "a", 0)) == [1, 2, 3]


def test_replay_goes_with_every_launch():
    spec = make_spec({"replay": {}})
    check_method(spec.model_copy(update={"launch": LaunchSection(num_processes=8, zero_stage=3)}))
