"""Entries: which are frozen, two steps by hand, what is planned, proved, resumed, referred to and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training.quiet_rounds import (
    OTHER_WAYS,
    assert_goes_on,
    compare_references,
    compare_weights,
    launch,
    make_spec,
    make_start,
    read_all_losses,
    read_weights,
    run,
    run_with_steps,
    train_by_hand,
)  # fmt: skip

from hftcli.errors import ModelError
from hftcli.models.arithmetic import merge_delta
from hftcli.models.proof import verify_round
from hftcli.recipe.sections import CheckpointSection, LaunchSection, ModelSection
from hftcli.runs.run import Round
from hftcli.training.reading import read_assignment

ENTRIES = {"grain": "entries", "trainable_fraction": 0.1}
MATRICES = 2 * 7


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("entries") / "start")


@pytest.fixture(scope="module")
def done(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    return run_with_steps(tmp_path_factory.mktemp("entries") / "00", start, ENTRIES)


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
    values = {"max_steps": 2, "global_batch_size": 16, "per_device_train_batch_size": 16, "weight_decay": 0.1}
    round_ = run(tmp_path / "00", make_spec(start, ENTRIES, train=values))
    parts = round_.read_plan().entries
    shapes = {name: (part.num_outputs, part.num_inputs) for name, part in parts.items()}
    train_by_hand(round_, {name: np.unravel_index(places, shapes[name]) for name, places in find_open(round_).items()}, 0.1)


def test_the_whole_share_is_full_fine_tuning(start: Path, tmp_path: Path):
    """At 1, matrices train whole; a little below, one entry in a thousand stays and all others are laid in."""
    full = {"trainable_fraction": 1.0}
    losses = read_all_losses(tmp_path, start, full, ENTRIES | full, ENTRIES | {"trainable_fraction": 0.999})
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


@OTHER_WAYS
def test_other_ways_end_in_the_same_weights(done: Round, start: Path, tmp_path: Path, values: dict):
    round_ = run(tmp_path / "00", make_spec(start, ENTRIES, **values))
    assert verify_round(round_).passed
    compare_weights(round_, read_weights(done), 2e-6)


def test_a_round_that_was_killed_ends_in_the_same_bits(done: Round, tmp_path: Path):
    assert_goes_on(done, 2, tmp_path / "00", "quiet/bases.safetensors")


def test_preferences_refer_to_the_start(start: Path, tmp_path: Path):
    """The shared reference copies what trains."""
    round_ = compare_references(tmp_path, start, ENTRIES)
    assert round_.read_result().reference.num_bytes == 4 * round_.read_plan().num_trainable


def test_a_delta_goes_on_no_other_base(tmp_path: Path):
    """One weight of the base in another bit, frozen as it is: neither merged nor trained on."""
    start = make_start(tmp_path / "start")
    round_ = run(
        tmp_path / "00", make_spec(start, ENTRIES, train={"max_steps": 1}, checkpoint=CheckpointSection(format="delta"))
    )
    weights = load_file(start / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    for use in (
        lambda: merge_delta(round_.checkpoint, tmp_path / "merged"),
        lambda: read_assignment(make_spec(round_.checkpoint, {})),
    ):
        with pytest.raises(ModelError, match=r"is not the base .* model.safetensors has other bytes") as caught:
            use()
        assert "bring the base back" in caught.value.fix
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_what_one_does(done: Round, start: Path, tmp_path: Path, stage: int):
    ranks = LaunchSection(num_processes=2, zero_stage=stage)
    spec = make_spec(start, ENTRIES, launch=ranks, train={"per_device_train_batch_size": 4})
    compare_weights(launch(tmp_path / "00", spec), read_weights(done), 2e-5)
