"""Entries: which are frozen, two steps by hand, what is planned, proved, resumed, referred to and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training.quiet_rounds import (
    LEARNING_RATE,
    go_back,
    make_pairs_spec,
    make_spec,
    make_start,
    read_batch,
    read_model,
    run,
)  # fmt: skip

from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.models.proof import verify_round
from hftcli.models.reader import CheckpointReader
from hftcli.recipe.sections import CheckpointSection, LaunchSection, ModelSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.training.round import run_round

ENTRIES = {"grain": "entries", "trainable_fraction": 0.1}
MATRICES = 2 * 7


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("entries") / "start")


@pytest.fixture(scope="module")
def done(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    """A round with all its step checkpoints."""
    policy = CheckpointSection(save_steps=1, keep=9)
    return run(tmp_path_factory.mktemp("entries") / "00", make_spec(start, ENTRIES, checkpoint=policy))


def find_open(round_: Round) -> dict[str, np.ndarray]:
    """By matrix, the places of its entries that train."""
    chosen = load_file(round_.bases_path)
    return {name: chosen[part.choice].numpy() for name, part in round_.read_plan().entries.items()}


@pytest.mark.parametrize("part", ["random", "magnitude"])
def test_entries_train_and_all_others_are_what_they_were(start: Path, tmp_path: Path, part: str):
    """The largest as numpy sorts them; of the others every bit stays."""
    round_ = run(tmp_path / "00", make_spec(start, ENTRIES | {"part": part}))
    before, after = (load_file(folder / "model.safetensors") for folder in (start, round_.checkpoint))
    places = find_open(round_)
    assert len(places) == MATRICES
    for name, own in places.items():
        size = before[name].numel()
        assert len(own) == len(set(own.tolist())) == round(0.1 * size)
        if part == "magnitude":
            ranked = np.argsort(-np.abs(before[name].numpy().ravel()), kind="stable")
            np.testing.assert_array_equal(own, np.sort(ranked[: len(own)]))
        moved = (before[name].view(torch.int32) != after[name].view(torch.int32)).flatten().nonzero().flatten().numpy()
        assert set(moved.tolist()) <= set(own.tolist())
        assert len(moved) > 0.9 * len(own)
    result = round_.read_result()
    assert result.verification.passed
    assert result.verification.num_frozen_entries == sum(before[name].numel() - len(own) for name, own in places.items())
    assert result.earlier is None
    assert not round_.moments_path.exists()  # nothing is asked of earlier data
    trained = [name for name in round_.read_plan().trained if name not in places]
    expected = 4 * (sum(map(len, places.values())) + sum(before[name].numel() for name in trained))
    assert (result.gradient_bytes, result.optimizer_bytes) == (expected, 2 * expected)


def test_entries_at_random_are_others_for_every_seed_and_round(start: Path, done: Round, tmp_path: Path):
    train = {"max_steps": 1}
    rounds = [
        run(tmp_path / "0", make_spec(start, ENTRIES, train=train)),
        run(tmp_path / "1", make_spec(start, ENTRIES | {"seed": 7}, train=train)),
        run(tmp_path / "2", make_spec(start, ENTRIES, 1, train=train)),
    ]
    expected, *others = map(find_open, (done, *rounds))
    for name, own in expected.items():
        assert np.array_equal(own, others[0][name])
        assert not any(np.array_equal(own, other[name]) for other in others[1:])


def test_two_steps_by_hand(start: Path, tmp_path: Path):
    """AdamW on the entries alone: what is frozen does not decay either."""
    decay = 0.1
    values = {"max_steps": 2, "global_batch_size": 16, "per_device_train_batch_size": 16, "weight_decay": decay}
    round_ = run(tmp_path / "00", make_spec(start, ENTRIES, train=values))
    plan, places, model = round_.read_plan(), find_open(round_), read_model(start)
    batch = read_batch(round_)
    states: dict[str, list[np.ndarray]] = {}
    for step in (1, 2):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, value in model.named_parameters():
            if name not in plan.trained:
                continue
            own = places.get(name, slice(None))
            gradient = value.grad.double().numpy().ravel()[own]
            first, second = states.setdefault(name, [np.zeros_like(gradient) for _ in range(2)])
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            values = value.detach().double().numpy().ravel()
            if not name.endswith(("bias", "norm.weight")):
                values[own] *= 1 - LEARNING_RATE * decay
            values[own] -= LEARNING_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            value.data = torch.from_numpy(values).float().view_as(value)
    after = load_file(round_.checkpoint / "model.safetensors")
    for name, value in model.named_parameters():
        largest = np.abs(after[name].double().numpy() - value.detach().double().numpy()).max()
        assert largest < 2e-5, (name, largest)


def test_the_whole_share_is_full_fine_tuning(start: Path, tmp_path: Path):
    """At 1, matrices train whole; a little below, one entry in a thousand stays and all others are laid in."""
    losses = []
    for place, rule in enumerate(({}, ENTRIES, ENTRIES)):
        spec = make_spec(start, rule | {"trainable_fraction": (1.0, 1.0, 0.999)[place]}, train={"logging_steps": 1})
        losses.append([row["loss"] for row in run(tmp_path / str(place), spec).read_metrics()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_change_is_found(tmp_path: Path, dtype: torch.dtype):
    """One unit in the last place of one frozen entry."""
    round_ = run(tmp_path / "00", make_spec(make_start(tmp_path / "start", dtype), ENTRIES))
    assert verify_round(round_).passed
    path = round_.checkpoint / "model.safetensors"
    weights, (name, own) = load_file(path), next(iter(find_open(round_).items()))
    size = weights[name].numel()
    frozen = next(place for place in range(100, size) if place not in own)
    weights[name].view(torch.int16 if dtype == torch.bfloat16 else torch.int32).view(-1)[frozen] ^= 1
    save_file(weights, path, {"format": "pt"})
    assert verify_round(round_).moved_entries == (f"{name} (1 of {size - len(own):,} frozen entries)",)


def test_a_start_of_another_data_type_counts_as_converted_once(start: Path, tmp_path: Path):
    """Frozen entries are then the rounding of the start's, as all that is frozen."""
    model = ModelSection(path=str(start), dtype="bfloat16")
    round_ = run(tmp_path / "00", make_spec(start, ENTRIES).model_copy(update={"model": model}))
    before, after = load_file(start / "model.safetensors"), load_file(round_.checkpoint / "model.safetensors")
    for name, own in find_open(round_).items():
        is_frozen = np.ones(before[name].numel(), dtype=bool)
        is_frozen[own] = False
        expected = before[name].to(torch.bfloat16).flatten()[torch.from_numpy(is_frozen)]
        assert torch.equal(after[name].flatten()[torch.from_numpy(is_frozen)].view(torch.int16), expected.view(torch.int16))
    assert verify_round(round_).passed


@pytest.mark.parametrize(
    "values",
    [
        {"train": {"activation_checkpointing": True}},
        pytest.param({"train": {"per_device_train_batch_size": 4}}, marks=pytest.mark.slow),
        pytest.param({"checkpoint": CheckpointSection(format="delta")}, marks=pytest.mark.slow),
        {"launch": LaunchSection(num_processes=1, offload="optimizer")},
    ],
    ids=["checkpointed", "accumulated", "delta", "offloaded"],
)
def test_other_ways_end_in_the_same_weights(done: Round, start: Path, tmp_path: Path, values: dict):
    round_ = run(tmp_path / "00", make_spec(start, ENTRIES, **values))
    assert verify_round(round_).passed
    expected = load_file(done.checkpoint / "model.safetensors")
    reader = CheckpointReader(round_.checkpoint, tuple(expected))
    for name, value in expected.items():
        assert torch.allclose(reader.read(name), value, rtol=0, atol=2e-6), (name, (reader.read(name) - value).abs().max())


def test_a_round_that_was_killed_ends_in_the_same_bits(done: Round, tmp_path: Path):
    round_ = go_back(done, 2, tmp_path / "00")
    run_round(round_, StopRequest(round_))
    assert round_.read_result().resumed_from == 2
    for path in ("checkpoint/model.safetensors", "quiet/bases.safetensors"):
        assert (round_.folder / path).read_bytes() == (done.folder / path).read_bytes(), path
    assert round_.read_plan() == done.read_plan()


def test_preferences_refer_to_the_start(start: Path, tmp_path: Path):
    """Every reference gives the same losses; the shared one copies what trains."""
    losses = []
    for reference in ("precompute", "shared"):
        round_ = run(tmp_path / reference, make_pairs_spec(start, ENTRIES, reference))
        losses.append([row["loss"] for row in round_.read_metrics()])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert round_.read_result().reference.num_bytes == 4 * round_.read_plan().num_trainable


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_what_one_does(done: Round, start: Path, tmp_path: Path, stage: int):
    launch = LaunchSection(num_processes=2, zero_stage=stage)
    spec = make_spec(start, ENTRIES, launch=launch, train={"per_device_train_batch_size": 4})
    round_ = Round(tmp_path / "00")
    round_.folder.mkdir()
    write_model(round_.spec_path, spec)
    launch_round(round_, spec.launch, lambda progress: None)
    assert verify_round(round_).passed
    alone, both = (load_file(folder / "model.safetensors") for folder in (done.checkpoint, round_.checkpoint))
    for name, value in alone.items():
        assert torch.allclose(both[name], value, rtol=0, atol=2e-5), (name, (both[name] - value).abs().max())
