"""What a round is going to do, known before it has weights, and what of it would come to nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
from training.quiet_rounds import KNOWN, LEARNED, ONCE, make_spec, make_start

from hftcli.errors import InputError
from hftcli.measuring.questions import hold_out
from hftcli.methods.redraw import Redraw
from hftcli.recipe.evaluation import StopSection
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import CheckpointSection
from hftcli.runs.spec import EarlierRound
from hftcli.training.draws import settle_draws
from hftcli.training.outlook import look_ahead
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.stages import Assignment, Rows

LAYERS = {"group": "layer", "embeddings": "freeze", "head": "freeze"}  # of two: each a block of its own


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("outlook") / "start")


def read(start: Path, freeze: dict, **values: object) -> tuple[Assignment, Rows]:
    task = read_assignment(make_spec(start, freeze, **values))
    return task, tokenize_rows(task, lambda done, total: None)


@pytest.mark.parametrize(
    ("stop", "best", "deciding"),
    [
        ({"by": "nll", "max_forgetting": 0.1}, None, [KNOWN, LEARNED]),
        ({"by": "nll", "min_learning": 0.1}, None, [LEARNED]),
        ({"by": "nll"}, "learning", [LEARNED]),
        ({"by": "score", "max_forgetting": 0.1}, None, []),
    ],
)
def test_what_decides_by_likelihood_has_right_answers(start: Path, stop: dict, best: str | None, deciding: list[str]):
    """As IFEval has none, whose rules tell what is right."""
    scoring = ONCE.model_copy(update={"every_steps": 2})
    values = {"scoring": scoring, "stop": StopSection(**stop), "checkpoint": CheckpointSection(best=best)}
    task, rows = read(start, {}, **values)
    look_ahead(task, rows)
    for name in (KNOWN, LEARNED):
        unread = replace(rows, asked={**rows.asked, name: replace(rows.asked[name], rows=[], questions=[])})
        if name not in deciding:
            look_ahead(task, unread)
            continue
        with pytest.raises(InputError, match=f"stop.by is nll, and {name} has no right answers"):
            look_ahead(task, unread)


@pytest.mark.parametrize(
    ("stop", "best", "deciding"),
    [
        ({"max_forgetting": 0.1}, None, [KNOWN]),
        ({"max_forgetting": 0.1}, "learning", [KNOWN, LEARNED]),
        ({"min_learning": 0.1}, None, [LEARNED]),
        ({}, "learning", [LEARNED]),
        ({"by": "nll", "max_forgetting": 0.1, "min_learning": 0.1}, None, []),
        ({}, None, []),
    ],
)
def test_what_decides_by_score_has_one(start: Path, stop: dict, best: str | None, deciding: list[str]):
    """As a conversation has none, whose last answer is read alone."""
    scoring = ONCE.model_copy(update={"every_steps": 2})
    values = {"scoring": scoring, "stop": StopSection(**stop), "checkpoint": CheckpointSection(best=best)}
    task, rows = read(start, {}, **values)
    look_ahead(task, rows)
    for name in (KNOWN, LEARNED):
        told = replace(rows.asked[name], task=replace(rows.asked[name].task, metric="none"))
        unscored = replace(rows, asked={**rows.asked, name: told})
        if name not in deciding:
            look_ahead(task, unscored)
            continue
        with pytest.raises(InputError, match=f"stop.by is score, and {name} has none, but a likelihood") as caught:
            look_ahead(task, unscored)
        assert caught.value.fix.startswith("set stop.by: nll, or ")


def test_of_what_is_learned_one_score_is_enough(start: Path):
    """Held-out rows, which have none, may stand beside it."""
    scoring = ONCE.model_copy(update={"every_steps": 2, "learned": (LEARNED, KNOWN), "known": ()})
    task, rows = read(start, {}, scoring=scoring, stop=StopSection(min_learning=0.1))
    look_ahead(task, replace(rows, asked={**rows.asked, KNOWN: hold_out(rows.own)}))


QUIET = {"grain": "directions", "keep": {"path": KNOWN}}
CLOSED = "nothing is closed at freeze.trainable_fraction 1"


@pytest.mark.parametrize(
    ("freeze", "keys"),
    [
        (QUIET, "freeze.keep"),
        (QUIET | {"blocks": 2}, "freeze.keep and freeze.blocks"),
        ({"grain": "columns", "part": "random"}, "freeze.part"),
        ({"grain": "entries", "part": "magnitude"}, "freeze.part"),
        ({"rank": "magnitude"}, "freeze.rank"),
        ({"rank": "fisher", "importance": {"path": KNOWN}}, "freeze.rank"),
        ({"grain": "directions"}, None),
        ({}, None),
    ],
)
def test_where_all_trains_nothing_chooses(start: Path, freeze: dict, keys: str | None, caplog):
    for share in (0.5, 1.0):
        look_ahead(*read(start, freeze | {"trainable_fraction": share}))
        assert (CLOSED in caplog.text) == (share == 1 and keys is not None)
    if keys is not None:
        assert f"{keys}: {CLOSED}" in caplog.text


def test_quiet_adapters_close_directions_where_all_trains(start: Path, caplog):
    freeze = {"trainable_fraction": 1.0, "keep": {"path": KNOWN}}
    look_ahead(*read(start, freeze, method=MethodSection.model_validate({"lora": {"quiet": True}})))
    assert CLOSED not in caplog.text


@pytest.mark.parametrize(("schedule", "step"), [("step", 2), ("cycle", 3)])
def test_a_schedule_is_tried_as_often_as_it_goes_on(start: Path, schedule: str, step: int):
    """A rate that rises from its first step on: of four steps, or of two cycles of two."""
    train = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}
    redraw = {"redraw": {"every": 1, "order": "cyclic", "schedule": schedule}}
    with pytest.raises(InputError, match=f"the learning rate is .* in step {step} of 4, and train.learning_rate, its peak"):
        look_ahead(*read(start, LAYERS | redraw, train=train))


def test_a_schedule_of_one_cycle_has_one_rate(start: Path):
    train = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}, "max_steps": 2}
    redraw = {"redraw": {"every": 1, "order": "cyclic", "schedule": "cycle"}}
    assert look_ahead(*read(start, LAYERS | redraw, train=train)).num_steps == 2


@pytest.mark.parametrize("when", ["mixed", "after"])
def test_blocks_take_turns_by_one_pass_over_the_rows(start: Path, tmp_path: Path, when: str):
    """Of 16 rows in batches of 8, which BAdam's rule raises to 50 steps a block; replay after the task lays out 200 passes."""
    redraw = {"redraw": {"every": "auto", "order": "cyclic"}}
    values = {"method": MethodSection(replay={"when": when}), "train": {"max_steps": 400}}
    spec = make_spec(start, LAYERS | redraw, place=1, **values)
    task = read_assignment(spec.model_copy(update={"earlier": (EarlierRound(task=LEARNED, folder=str(tmp_path)),)}))
    rows = tokenize_rows(task, lambda done, total: None)
    assert len(rows.train) == {"mixed": 16, "after": 400 * 8}[when] + 2  # a tenth of 16 is replayed
    (found,) = [method for method in settle_draws(task, rows).methods if isinstance(method, Redraw)]
    assert found.every == 50
    assert look_ahead(task, rows).num_steps == {"mixed": 400, "after": 401}[when]
