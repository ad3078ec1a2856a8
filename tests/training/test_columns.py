"""Columns: which are frozen, two steps by hand, what is proved, resumed, referred to and refused."""

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
    make_spec,
    make_start,
    read_all_losses,
    read_batch,
    read_inputs,
    read_model,
    read_weights,
    run,
    run_with_steps,
    train_by_hand,
)  # fmt: skip

from hftcli.errors import ModelError
from hftcli.measuring.drift import draw_texts
from hftcli.models.description import load_tokenizer
from hftcli.models.division import draw_choices
from hftcli.models.proof import verify_round
from hftcli.runs.run import Round

COLUMNS = {"grain": "columns"}
READERS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "heads": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "inner": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("columns") / "start")


@pytest.fixture(scope="module")
def done(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    return run_with_steps(tmp_path_factory.mktemp("columns") / "00", start, COLUMNS)


@pytest.fixture(scope="module")
def squares(start: Path) -> dict[str, np.ndarray]:
    """Mean squares of what each matrix reads of the model's own samples, by the name of its weight."""
    model = read_model(start)
    texts = [ids for ids, _ in draw_texts(model, load_tokenizer(start), torch.device("cpu"))]
    names = {f"model.layers.{layer}.{name}.weight": f"model.layers.{layer}.{name}" for layer in (0, 1)
             for names in READERS.values() for name in names}  # fmt: skip
    return {name: np.square(read).mean(0) for name, read in read_inputs(model, names, texts).items()}


def score(weight: np.ndarray, squares: np.ndarray, part: str) -> np.ndarray:
    if part == "ssu":
        return np.abs(weight).sum(0) * np.sqrt(squares)
    return np.sqrt(np.square(weight).sum(0)) * squares if part == "ssu-code" else squares


@pytest.mark.parametrize("part", ["ssu", "ssu-code", "quiet"])
def test_the_columns_that_matter_most_are_frozen(start: Path, squares: dict, tmp_path: Path, part: str):
    """Scores and energies as numpy has them, and every frozen column as it was, bit for bit."""
    rule = COLUMNS | ({"part": part} if part != "ssu" else {})
    round_ = run(tmp_path / "00", make_spec(start, rule, train={"max_steps": 1}))
    plan, chosen = round_.read_plan(), load_file(round_.bases_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, round_.checkpoint))
    assert plan.columns.keys() == squares.keys()
    energy = round_.read_result().earlier.closed_energy
    for name, columns in plan.columns.items():
        scores = score(before[name].double().numpy(), squares[name], part)
        ranked = np.argsort(scores)
        half = len(scores) // 2
        assert scores[ranked[half]] - scores[ranked[half - 1]] > 1e-6 * scores.max()  # no tie that rounding would decide
        trained = np.sort(ranked[:half])
        np.testing.assert_array_equal(chosen[columns.choice].numpy(), trained, err_msg=name)
        assert columns.choice == (columns.input if part == "quiet" else name)
        frozen = np.sort(ranked[half:])
        assert torch.equal(before[name][:, frozen].view(torch.int32), after[name][:, frozen].view(torch.int32))
        assert (before[name][:, trained] != after[name][:, trained]).any(0).all()
        assert energy[columns.choice] == pytest.approx(squares[name][frozen].sum() / squares[name].sum(), abs=1e-5)
    verification = round_.read_result().verification
    assert verification.passed
    assert verification.num_frozen_columns == sum(len(values) // 2 for values in squares.values())


def test_columns_at_random_are_others_for_every_seed(start: Path, tmp_path: Path):
    round_ = run(tmp_path / "00", make_spec(start, COLUMNS | {"part": "random", "seed": 7}, train={"max_steps": 1}))
    plan, found = round_.read_plan(), load_file(round_.bases_path)
    drawn = [draw_choices(plan.parts, torch.float32, *seeds) for seeds in ((7, 0), (8, 0), (7, 1))]
    for name, columns in found.items():
        assert len(set(columns.tolist())) == len(columns) == plan.columns[name].num_columns
        assert torch.equal(columns, drawn[0][name])
        assert not torch.equal(columns, drawn[1][name])
        assert not torch.equal(columns, drawn[2][name])
    assert not torch.equal(*(found[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk"))


def test_two_steps_by_hand(start: Path, tmp_path: Path):
    values = {"max_steps": 2, "global_batch_size": 16, "per_device_train_batch_size": 16, "weight_decay": 0.1}
    round_ = run(tmp_path / "00", make_spec(start, COLUMNS, train=values))
    chosen = load_file(round_.bases_path)
    columns = round_.read_plan().columns
    train_by_hand(round_, {name: (slice(None), chosen[part.choice].numpy()) for name, part in columns.items()}, 0.1)


def test_the_whole_share_is_full_fine_tuning(start: Path, tmp_path: Path):
    full = {"trainable_fraction": 1.0}
    losses = read_all_losses(tmp_path, start, full, COLUMNS | full)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_change_is_found(tmp_path: Path, dtype: torch.dtype):
    """One unit in the last place of one weight in a frozen column."""
    round_ = run(tmp_path / "00", make_spec(make_start(tmp_path / "start", dtype), COLUMNS))
    assert verify_round(round_).passed
    path = round_.checkpoint / "model.safetensors"
    weights, name = load_file(path), next(iter(round_.read_plan().columns))
    chosen = load_file(round_.bases_path)[round_.read_plan().columns[name].choice].tolist()
    frozen = next(number for number in range(32) if number not in chosen)
    weights[name].view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[3, frozen] ^= 1
    save_file(weights, path, {"format": "pt"})
    assert verify_round(round_).moved_columns == (f"{name} (1 of 16 frozen columns)",)


@OTHER_WAYS
def test_other_ways_end_in_the_same_weights(done: Round, start: Path, tmp_path: Path, values: dict):
    round_ = run(tmp_path / "00", make_spec(start, COLUMNS, **values))
    assert verify_round(round_).passed
    compare_weights(round_, read_weights(done), 2e-6)


def test_a_round_that_was_killed_ends_in_the_same_bits(done: Round, tmp_path: Path):
    assert_goes_on(done, 2, tmp_path / "00", "quiet/bases.safetensors", "quiet/moments.safetensors")


def test_a_round_goes_on_from_what_the_last_one_read(done: Round, squares: dict, tmp_path: Path):
    """The next round scores by the samples and the rows of the round before, weighed alike; directions need other moments."""
    second = run(tmp_path / "01", make_spec(done.checkpoint, COLUMNS | {"part": "quiet"}, 1, (done.folder,)))
    model, texts, name = read_model(done.checkpoint), read_batch(done), "model.layers.1.mlp.down_proj"
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(texts["input_ids"], texts["attention_mask"], strict=True)]
    expected = (squares[f"{name}.weight"] + np.square(read_inputs(model, {"x": name}, rows)["x"]).mean(0)) / 2
    chosen = load_file(second.bases_path)["layers.1.inner"].numpy()
    assert expected[chosen].max() <= np.delete(expected, chosen).min() * (1 + 1e-4)
    with pytest.raises(ModelError, match="moments of inputs in other blocks"):
        run(tmp_path / "02", make_spec(done.checkpoint, {"grain": "directions"}, 1, (done.folder,)))


def test_preferences_refer_to_the_start(start: Path, tmp_path: Path):
    """The shared reference copies what trains."""
    round_ = compare_references(tmp_path, start, COLUMNS)
    assert round_.read_result().reference.num_bytes == 4 * round_.read_plan().num_trainable
