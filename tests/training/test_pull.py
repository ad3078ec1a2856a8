"""The decay to the start, and the way back at the end: by hand, without effect at 0, resumed, on pieces, and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.quiet_rounds import (
    LEARNING_RATE,
    ONCE,
    compare_weights,
    go_back,
    launch,
    make_spec,
    make_start,
    read_batch,
    read_model,
    read_weights,
    run,
)  # fmt: skip

from hftcli.errors import InputError
from hftcli.launching.planning import check_pull
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.models.proof import verify_round
from hftcli.recipe.methods import EwcSection, MethodSection
from hftcli.recipe.sections import CheckpointSection, LaunchSection
from hftcli.runs.run import Round
from hftcli.training.round import run_round

PULL = {"pull": {"strength": 20.0}}
HELD = ({"average": 0.7}, {"average": 0.7, "interpolate": 0.5})
WEIGHTS = "model.safetensors"
TWICE = ONCE.model_copy(update={"every_steps": 2})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("pull") / "start")


@pytest.fixture(scope="module")
def plain(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    return run(tmp_path_factory.mktemp("plain") / "00", make_spec(start, {}))


@pytest.mark.parametrize("selective", [False, True])
def test_three_steps_by_hand(start: Path, tmp_path: Path, selective: bool):
    """AdamW, and before it the way back: lr times strength is 0.06 of the distance; half of all tensors, where selected."""
    values = {"max_steps": 3, "global_batch_size": 16, "per_device_train_batch_size": 16}
    freeze = {"pull": PULL["pull"] | {"selective": selective}}
    round_ = run(tmp_path / "00", make_spec(start, freeze, train=values))
    plan, model, batch = round_.read_plan(), read_model(start), read_batch(round_)
    begun = {name: value.detach().double().numpy().copy() for name, value in model.named_parameters()}
    states: dict[str, list[np.ndarray]] = {}
    num_pulled = 0
    for step in (1, 2, 3):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, value in model.named_parameters():
            if name not in plan.trained:
                continue
            gradient = value.grad.double().numpy()
            first, second = states.setdefault(name, [np.zeros_like(gradient) for _ in range(2)])
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            values = value.detach().double().numpy()
            if not selective or (-gradient * (values - begun[name])).sum() < 0:
                values = values - LEARNING_RATE * 20.0 * (values - begun[name])
                num_pulled += step > 1
            values = values - LEARNING_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            value.data = torch.from_numpy(values).float()
    assert (num_pulled == 2 * len(plan.trained)) is not selective
    after = read_weights(round_)
    for name, value in model.named_parameters():
        largest = np.abs(after[name].double().numpy() - value.detach().double().numpy()).max()
        assert largest < 2e-5, (name, largest)


def test_no_strength_is_no_pull(start: Path, plain: Round, tmp_path: Path):
    weights, others = read_weights(plain), read_weights(run(tmp_path / "00", make_spec(start, {"pull": {"strength": 0}})))
    assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-6


@pytest.mark.parametrize("launch", [{}, {"offload": "optimizer"}], ids=["device", "host"])
def test_a_round_that_was_killed_ends_in_the_same_bits(start: Path, plain: Round, tmp_path: Path, launch: dict):
    policy = CheckpointSection(save_steps=1, keep=9)
    spec = make_spec(start, PULL, checkpoint=policy, launch=LaunchSection(num_processes=1, **launch))
    done = run(tmp_path / "00", spec)
    resumed = go_back(done, 2, tmp_path / "01")
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    weights, others, free = read_weights(done), read_weights(resumed), read_weights(plain)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert done.read_plan() == plain.read_plan()
    begun = load_file(start / "model.safetensors")
    moved, moved_free = (sum((found[name] - begun[name]).square().sum() for name in begun) for found in (weights, free))
    assert moved < 0.95 * moved_free


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "rule"), [(1, PULL), (2, PULL), (3, PULL), (2, {"average": 0.7}), (3, {"average": 0.7})],
    ids=["1 pull", "2 pull", "3 pull", "2 average", "3 average"],
)  # fmt: skip
def test_pieces_are_held_as_the_whole_is(start: Path, tmp_path: Path, stage: int, rule: dict):
    spec = make_spec(start, rule, launch=LaunchSection(num_processes=2, zero_stage=stage))
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"per_device_train_batch_size": 4})})
    compare_weights(launch(tmp_path / "01", spec), read_weights(run(tmp_path / "00", make_spec(start, rule))), 2e-5)


def test_a_part_of_the_way_is_kept(start: Path, plain: Round, tmp_path: Path):
    round_ = run(tmp_path / "00", make_spec(start, {"interpolate": 0.3}))
    begun, ended, found = load_file(start / "model.safetensors"), read_weights(plain), read_weights(round_)
    for name in begun:
        assert torch.allclose(found[name], 0.7 * begun[name] + 0.3 * ended[name], rtol=0, atol=1e-6), name
    assert verify_round(round_).passed


def test_the_moving_average_is_left_and_goes_on(start: Path, tmp_path: Path):
    """By hand, out of the weights that step checkpoints hold; killed and resumed, the same bits."""
    policy = CheckpointSection(save_steps=1, keep=9)
    done = run(tmp_path / "00", make_spec(start, {"average": 0.7}, checkpoint=policy))
    begun, found = load_file(start / "model.safetensors"), read_weights(done)
    steps = [load_file(done.steps / str(step) / "trained.safetensors") for step in (1, 2, 3, 4)]
    for name in done.read_plan().trained:
        mean = begun[name].double()
        for weights in steps:
            mean = 0.7 * mean + 0.3 * weights[name].double()
        assert torch.allclose(found[name].double(), mean, rtol=0, atol=1e-6), name
    assert verify_round(done).passed
    for step in (2, 4):
        resumed = go_back(done, step, tmp_path / str(step))
        run_round(resumed, StopRequest(resumed))
        assert resumed.read_result().resumed_from == step
        weights = read_weights(resumed)
        assert all(torch.equal(found[name], weights[name]) for name in found)


def test_an_average_whose_share_is_measured(start: Path, tmp_path: Path):
    """By hand in float64, with Adam's steps; both kinds of share are met; killed and resumed, the same bits."""
    policy = CheckpointSection(save_steps=1, keep=9)
    values = {"max_steps": 5, "global_batch_size": 16, "per_device_train_batch_size": 16}
    done = run(tmp_path / "00", make_spec(start, {"average": "dynamic"}, checkpoint=policy, train=values))
    model, batch = read_model(start), read_batch(done)
    named = {name: value for name, value in model.named_parameters() if name in done.read_plan().trained}
    means = {name: value.detach().double().numpy().copy() for name, value in named.items()}
    states = {name: [np.zeros_like(mean) for _ in range(2)] for name, mean in means.items()}
    earlier, shares = {}, []
    for step in range(1, 6):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, value in named.items():
            gradient, before = value.grad.double().numpy().copy(), value.detach().double().numpy()
            first, second = states[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            after = before - LEARNING_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            share = 0.01
            if name in earlier:
                slope, curvature = np.abs(gradient).sum(), np.abs(gradient - earlier[name]).sum() / np.abs(after - before).sum()
                shares.append(slope / (curvature * np.abs(after - means[name]).sum()))
                share = shares[-1] if shares[-1] < 1 else 0.01
            means[name] += share * (after - means[name])
            earlier[name], value.data = gradient, torch.from_numpy(after).float()
    assert min(shares) < 0.7 < 1 < max(shares)
    found = read_weights(done)
    for name, mean in means.items():
        assert np.abs(found[name].double().numpy() - mean).max() < 2e-5, name
    assert verify_round(done).passed
    for step in (1, 3, 5):
        resumed = go_back(done, step, tmp_path / str(step))
        run_round(resumed, StopRequest(resumed))
        assert resumed.read_result().resumed_from == step
        weights = read_weights(resumed)
        assert all(torch.equal(found[name], weights[name]) for name in found)


@pytest.mark.parametrize("rule", HELD, ids=["average", "both"])
def test_what_is_measured_within_the_round_is_what_would_be_saved(start: Path, tmp_path: Path, rule: dict):
    """And nothing of the training: the same weights, after a stop too."""
    policy = CheckpointSection(save_steps=1, keep=9)
    plain = run(tmp_path / "plain", make_spec(start, rule))
    half = run(tmp_path / "half", make_spec(start, rule, scoring=ONCE, train={"max_steps": 2}))
    done = run(tmp_path / "done", make_spec(start, rule, scoring=TWICE, checkpoint=policy))
    resumed = go_back(done, 3, tmp_path / "resumed")
    run_round(resumed, StopRequest(resumed))
    for round_ in (done, resumed):
        scores = round_.read_scores()
        assert [point.step for point in scores.points] == [2, 4]
        assert [point.scores for point in scores.points] == [half.read_scores().after, scores.after]
        assert scores.points[0].scores != scores.before
        assert (round_.checkpoint / WEIGHTS).read_bytes() == (plain.checkpoint / WEIGHTS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pieces_are_measured_as_they_would_be_saved(start: Path, tmp_path: Path, stage: int):
    """As one process measures; and a round that was killed after its last step leaves the same."""
    launched = {"launch": LaunchSection(num_processes=2, zero_stage=stage), "train": {"per_device_train_batch_size": 4}}
    spec = make_spec(start, HELD[1], scoring=TWICE, checkpoint=CheckpointSection(save_steps=1, keep=9), **launched)
    done, alone = launch(tmp_path / "two", spec), run(tmp_path / "one", make_spec(start, HELD[1], scoring=TWICE))
    compare_weights(done, read_weights(alone), 2e-5)
    for own, other in zip(done.read_scores().points, alone.read_scores().points, strict=True):
        assert {name: score.nll for name, score in own.scores.items()} == pytest.approx(
            {name: score.nll for name, score in other.scores.items()}, rel=1e-4
        )
    resumed = go_back(done, 4, tmp_path / "resumed")
    launch_round(resumed, spec.launch, lambda progress: None)
    assert resumed.read_result().resumed_from == 4
    assert (resumed.checkpoint / WEIGHTS).read_bytes() == (done.checkpoint / WEIGHTS).read_bytes()


def test_fisher_information_is_taken_of_the_model_that_is_left(start: Path, tmp_path: Path):
    """All of the way is taken back, or none was gone."""
    ewc = MethodSection(ewc=EwcSection(num_examples=4))
    found = [
        load_file(run(tmp_path / str(rate), make_spec(start, rule, method=ewc, train={"learning_rate": rate})).fisher_path)
        for rate, rule in ((LEARNING_RATE, {"interpolate": 1e-9}), (1e-12, {}), (LEARNING_RATE / 2, {}))
    ]
    same, other = (max((found[0][name] - found[place][name]).abs().max() for name in found[0]) for place in (1, 2))
    assert same < 1e-5 < 1e-3 < other


def test_shares_of_whole_tensors_are_refused_for_pieces(start: Path):
    for stage in (1, 2, 3):
        with pytest.raises(InputError, match="freeze.average: dynamic measures whole tensors"):
            check_pull(make_spec(start, {"average": "dynamic"}, launch=LaunchSection(num_processes=2, zero_stage=stage)))
    check_pull(make_spec(start, {"average": 0.9}, launch=LaunchSection(num_processes=2, zero_stage=3)))


def test_selection_by_whole_tensors_is_refused_for_pieces(start: Path):
    freeze = {"pull": {"strength": 1.0, "selective": True}}
    for stage in (1, 2, 3):
        with pytest.raises(InputError, match="freeze.pull.selective looks at whole tensors"):
            check_pull(make_spec(start, freeze, launch=LaunchSection(num_processes=2, zero_stage=stage)))
    check_pull(make_spec(start, freeze, launch=LaunchSection(num_processes=2, zero_stage=0)))
