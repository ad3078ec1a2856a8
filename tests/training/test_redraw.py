"""What trains changes within a round: by hand, when all trains, killed and resumed, as planned, proved, and refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from freezing.families import CONFIGS, build_units
from training.quiet_rounds import (
    LEARNING_RATE,
    go_back,
    launch,
    make_spec,
    make_start,
    read_all_losses,
    read_batch,
    read_model,
    read_weights,
    run,
)  # fmt: skip

from hftcli.errors import InputError, ModelError
from hftcli.freezing.redrawing import list_blocks, list_draws, plan_largest, settle_every
from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.planning import check_pull, make_budget
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.models.proof import verify_round
from hftcli.recipe.sections import CheckpointSection, LaunchSection
from hftcli.training.outlook import look_ahead
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.round import run_round

LAYERS = {"group": "layer", "embeddings": "freeze", "head": "freeze"}  # of two: each a block of its own


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("redraw") / "start")


@pytest.mark.parametrize(
    ("every", "states"), [(2, "drop"), (1, "keep"), (1, "drop")], ids=["BAdam", "HiFT", "from nothing in every step"]
)
def test_four_steps_by_hand(start: Path, tmp_path: Path, every: int, states: str):
    """The first layer and then the second, each for so many steps of Adam, whose moments go on or begin anew."""
    values = {"global_batch_size": 16, "per_device_train_batch_size": 16}
    redraw = {"every": every, "order": "ascending", "states": states}
    round_ = run(tmp_path / "00", make_spec(start, LAYERS | {"redraw": redraw}, train=values))
    model, batch = read_model(start), read_batch(round_)
    moments: dict[str, list] = {}
    for step in range(4):
        model.zero_grad()
        model(**batch).loss.backward()
        layer = step // every % 2
        if states == "drop":
            moments = {name: kept for name, kept in moments.items() if f"layers.{layer}." in name}
        for name, value in model.named_parameters():
            if f"layers.{layer}." not in name:
                continue
            gradient = value.grad.double().numpy()
            kept = moments.setdefault(name, [0, np.zeros_like(gradient), np.zeros_like(gradient)])
            kept[0] += 1
            kept[1] += 0.1 * (gradient - kept[1])
            kept[2] += 0.001 * (gradient**2 - kept[2])
            moved = (kept[1] / (1 - 0.9 ** kept[0])) / (np.sqrt(kept[2] / (1 - 0.999 ** kept[0])) + 1e-8)
            value.data = torch.from_numpy(value.detach().double().numpy() - LEARNING_RATE * moved).float()
    after = read_weights(round_)
    for name, value in model.named_parameters():
        largest = np.abs(after[name].double().numpy() - value.detach().double().numpy()).max()
        assert largest < 2e-5, (name, largest)
    assert verify_round(round_).passed
    found = [(draw.first_step, draw.last_step, draw.trained) for draw in round_.read_result().redraws]
    turns = [(1, 2, "layer 0"), (3, 4, "layer 1")]
    assert found == (turns if every == 2 else [(step, step, f"layer {(step - 1) % 2}") for step in (1, 2, 3, 4)])


@pytest.mark.parametrize("rule", [{"redraw": {"every": 1}}, {"group": "layer", "redraw": {"every": 2, "order": "cyclic"}}])
def test_all_at_once_is_full_fine_tuning_and_said_to_be(start: Path, tmp_path: Path, rule: dict, caplog):
    full = {"trainable_fraction": 1.0}
    task = read_assignment(make_spec(start, full | rule))
    look_ahead(task, tokenize_rows(task, lambda done, total: None))
    assert "every draw is the same: with freeze.trainable_fraction 1, nothing waits for another" in caplog.text
    losses = read_all_losses(tmp_path, start, full, full | rule)
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(("share", "is_said"), [(1.0, True), (0.9, True), (0.5, False)])
def test_draws_that_are_all_the_same_are_said_to_be(start: Path, share: float, is_said: bool, caplog):
    """With embeddings and head frozen, something always waits, but for no draw; 0.9 of two layers are both."""
    rule = {"group": "layer", "embeddings": "freeze", "head": "freeze", "redraw": {"every": 1}}
    task = read_assignment(make_spec(start, rule | {"trainable_fraction": share}))
    look_ahead(task, tokenize_rows(task, lambda done, total: None))
    assert ("every draw is the same" in caplog.text) == is_said


@pytest.mark.parametrize("states", ["drop", "keep"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_round_that_was_killed_ends_in_the_same_bits(tmp_path: Path, states: str, bf16: bool):
    """Killed between two draws of HFT's own half, of which every step has another."""
    start = make_start(tmp_path / "start", torch.bfloat16 if bf16 else torch.float32)
    policy, redraw = CheckpointSection(save_steps=1, keep=9), {"redraw": {"every": 1, "states": states}}
    done = run(tmp_path / "00", make_spec(start, redraw, checkpoint=policy, train={"bf16": bf16}))
    assert verify_round(done).passed
    resumed = go_back(done, 2, tmp_path / "01")
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    for path in ("checkpoint/model.safetensors", "masters.safetensors"):
        if (done.folder / path).exists():
            assert (done.folder / path).read_bytes() == (resumed.folder / path).read_bytes(), path
    assert done.read_result().updates == resumed.read_result().updates
    assert done.read_result().optimizer_bytes == resumed.read_result().optimizer_bytes


def test_what_no_draw_trains_is_frozen_and_a_device_holds_the_largest_draw(start: Path, tmp_path: Path):
    rule = {"group": "layer", "redraw": {"every": 3, "order": "descending"}}
    round_ = run(tmp_path / "00", make_spec(start, rule))
    plan, result = round_.read_plan(), round_.read_result()
    assert [draw.trained for draw in result.redraws] == ["final norm, head", "layer 1"]
    names = {name for name, _ in read_model(start).named_parameters()}
    expected = {name for name in names if "layers.1." in name or name in ("model.norm.weight", "lm_head.weight")}
    assert set(plan.trained) == expected
    assert set(plan.frozen) == names - expected
    assert verify_round(round_).passed
    task = read_assignment(round_.read_spec())  # whose plan is that of the largest of all: the embeddings, or the head
    assert task.plan.num_trainable == 704 * 32 + 32
    assert result.gradient_bytes == 4 * task.plan.num_trainable
    assert result.optimizer_bytes == 8 * task.plan.num_trainable


@pytest.mark.parametrize(
    ("redraw", "meant"), [({"every": 4}, "4"), ({"every": "auto", "order": "cyclic"}, "auto, which is 50 here")]
)
def test_a_round_that_ends_with_its_first_draw_is_refused(start: Path, redraw: dict, meant: str):
    """Of four steps; of three steps to a draw there is a second."""
    for rule in (redraw, {**redraw, "every": 3}):
        task = read_assignment(make_spec(start, LAYERS | {"redraw": rule}))
        rows = tokenize_rows(task, lambda done, total: None)
        if rule["every"] == 3:
            assert look_ahead(task, rows).num_steps == 4
            continue
        with pytest.raises(InputError, match=f"freeze.redraw.every is {meant}, and the round has 4 steps"):
            look_ahead(task, rows)


def test_a_rate_that_goes_on_once_a_cycle(start: Path, tmp_path: Path):
    """Two cycles of two blocks: transformers' linear schedule of two steps."""
    rule = LAYERS | {"redraw": {"every": 1, "order": "cyclic", "schedule": "cycle"}}
    spec = make_spec(start, rule, train={"lr_scheduler_type": "linear", "logging_steps": 1})
    rates = [row["learning_rate"] for row in run(tmp_path / "00", spec).read_metrics()]
    assert rates == pytest.approx([LEARNING_RATE, LEARNING_RATE, LEARNING_RATE / 2, LEARNING_RATE / 2])


def test_layers_are_drawn_as_often_as_lisa_says():
    """Two of twelve layers, without replacement, by chance: each in a sixth of the draws; and in turns, once in a cycle."""
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 12})
    layers = {parameter.name: unit.layer for unit in units for parameter in unit.parameters}
    rule = FreezeRule(group="layer", trainable_fraction=1 / 6, redraw={"every": 20})
    draws = [{layers[name] for name in draw} for draw in list_draws(units, rule, 0, 1000)]
    assert {len(draw) for draw in draws} == {3}  # two layers, and what is in none
    counts = Counter(layer for draw in draws for layer in draw)
    assert counts.pop(None) == 1000
    assert all(abs(counts[layer] - 1000 / 6) < 4 * (1000 * 1 / 6 * 5 / 6) ** 0.5 for layer in range(12))
    first = make_plan(units, FreezeRule(group="layer", trainable_fraction=1 / 6), 0)
    assert list_draws(units, rule, 0, 1) == [frozenset(first.trained)]

    turns = FreezeRule(group="layer", trainable_fraction=1 / 12, embeddings="freeze", head="freeze",
                       redraw={"every": "auto", "order": "cyclic"})  # fmt: skip
    cycles = [{layers[name] for name in draw} for draw in list_draws(units, turns, 0, 36)]
    orders = [[next(iter(draw)) for draw in cycles[begin : begin + 12]] for begin in (0, 12, 24)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [settle_every(turns, units, num_rows, 8) for num_rows in (100, 12 * 8 * 70, 10**6)] == [50, 70, 100]
    assert list(list_blocks(units, FreezeRule(group="layer", redraw={"every": 1, "order": "ascending"}))) == [
        "embeddings", "layers 0 to 5", "layers 6 to 11", "head",
    ]  # fmt: skip
    assert plan_largest(units, turns, 0).num_trainable == sum(unit.num_parameters for unit in units if unit.layer == 0)


@pytest.mark.parametrize(
    ("rule", "first", "last"),
    [
        ({}, {"embed", "bridge"}, {"norm", "head"}),
        ({"embeddings": "freeze"}, {"up"}, {"norm", "head"}),
        ({"head": "freeze"}, {"embed", "bridge"}, {"up1"}),
        ({"embeddings": "freeze", "head": "freeze"}, {"up"}, {"up1"}),
    ],
)
def test_what_stands_beside_embeddings_and_head_takes_its_turn_with_them_or_none(rule: dict, first: set, last: set):
    places = (("embed", "embedding"), ("bridge", "bridge"), ("up", "mlp"), ("norm", "final_norm"), ("head", "head"))
    units = [Unit(name, role, 0 if role == "mlp" else None, (Parameter(name, (4, 4)),)) for name, role in places]
    units.insert(3, Unit("up1", "mlp", 1, (Parameter("up1", (4, 4)),)))
    blocks = list(list_blocks(units, FreezeRule(group="layer", redraw={"every": 1, "order": "ascending"}, **rule)).values())
    assert (set(blocks[0]), set(blocks[-1])) == (first, last)
    assert len(blocks) == 2 + ("embed" in first) + ("head" in last)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"redraw": {"every": "auto"}}, "count blocks in turns"),
        ({"redraw": {"every": 5, "order": "cyclic"}}, "set group: layer"),
        ({"redraw": {"every": 5}, "grain": "columns"}, "draws whole matrices"),
        ({"redraw": {"every": 5}, "pull": {"strength": 1}}, "one draw a round"),
        ({"redraw": {"every": 0}}, "greater than or equal to 1"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(rule: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        FreezeRule(**rule)


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "cyclic"])
@pytest.mark.parametrize("key", ["embeddings", "head"])
def test_tied_embeddings_and_head_train_alike_or_are_refused(order: str, key: str):
    units = build_units("llama", **CONFIGS["llama"], tie_word_embeddings=True)
    rule = FreezeRule(group="layer", redraw={"every": 5, "order": order}, **{key: "freeze"})
    with pytest.raises(ModelError, match="embeddings and head are one tensor in this model"):
        list_draws(units, rule, 0, 2)


def test_several_processes_are_refused(start: Path):
    with pytest.raises(InputError, match="freeze.redraw changes what trains within the round, and under launch.zero_stage 1"):
        check_pull(make_spec(start, {"redraw": {"every": 5}}, launch=LaunchSection(num_processes=2, zero_stage=1)))


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on(start: Path, tmp_path: Path):
    """Data parallel, without pieces; HFT's own half, another in every step."""
    rule, policy = {"redraw": {"every": 1, "states": "keep"}}, CheckpointSection(save_steps=1, keep=9)
    spec = make_spec(
        start, rule, launch=LaunchSection(num_processes=2, zero_stage=0), train={"per_device_train_batch_size": 4},
        checkpoint=policy,
    )  # fmt: skip
    round_ = launch(tmp_path / "01", spec)
    alone, both = read_weights(run(tmp_path / "00", make_spec(start, rule))), read_weights(round_)
    assert max((alone[name] - both[name]).abs().max().item() for name in alone) < 2e-5
    resumed = go_back(round_, 2, tmp_path / "02")
    launch_round(resumed, spec.launch, lambda progress: None)
    assert resumed.read_result().resumed_from == 2
    weights = read_weights(resumed)
    assert all(torch.equal(both[name], weights[name]) for name in both)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"trainable_fraction": 0.25, "redraw": {"every": 2}},
        {"trainable_fraction": 0.125, "embeddings": "freeze", "head": "freeze", "redraw": {"every": 1, "order": "cyclic"}},
        {"trainable_fraction": 0.125, "redraw": {"every": 1, "order": "ascending", "states": "keep", "schedule": "cycle"}},
    ],
    ids=["LISA", "BAdam", "HiFT"],
)
def test_a_real_model_holds_what_is_planned(shared: Path, tmp_path: Path, rule: dict):
    """Ten steps, a cycle of the longest: gradients and states are those of the largest draw."""
    start = shared / "models" / "MiniMind2-Small"
    train = {"max_steps": 10, "global_batch_size": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-4}
    spec = make_spec(start, {"group": "layer"} | rule, train=train)
    if rule.get("embeddings") is None and rule["redraw"].get("order"):
        assert len(list_blocks(read_assignment(spec).network.units, spec.freeze)) <= 10
    round_ = run(tmp_path / "00", spec)
    assert verify_round(round_).passed
    task, result = read_assignment(spec), round_.read_result()
    planned = make_budget(task.spec, task.network, task.plan, 1, False, False).half
    assert result.gradient_bytes == pytest.approx(planned.gradients_bytes, rel=0.02)
    assert result.optimizer_bytes == pytest.approx(planned.optimizer_bytes, rel=0.02)
    sizes = (result.gradient_bytes, planned.gradients_bytes, result.optimizer_bytes, planned.optimizer_bytes)
    print("measured and planned, gradients and states:", *sizes)
