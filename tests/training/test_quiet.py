"""Directions: what is earlier and what it leaves open, two steps by hand, what is proved, resumed, chained and refused."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from training.quiet_rounds import (
    LEARNING_RATE,
    OTHER_WAYS,
    assert_goes_on,
    compare_references,
    compare_weights,
    go_back,
    make_spec,
    make_start,
    read_all_losses,
    read_batch,
    read_inputs,
    read_model,
    read_weights,
    run,
    run_with_steps,
)  # fmt: skip

from hftcli.commands.look import verify
from hftcli.errors import InputError, ModelError
from hftcli.freezing.directions import Directions
from hftcli.launching.processes import StopRequest
from hftcli.measuring.drift import draw_texts
from hftcli.models.description import load_tokenizer
from hftcli.models.division import draw_choices, write_bases
from hftcli.models.proof import read_choices, verify_round
from hftcli.recipe.loading import load_recipe
from hftcli.runners import prepare_single
from hftcli.runs.history import read_history
from hftcli.runs.run import Round
from hftcli.training.outlook import foresee_run
from hftcli.training.round import run_round

EVERYWHERE = {"grain": "directions"}
IN_BLOCKS = {"grain": ["matrices", "directions"], "blocks": 16}
Q_NAME, K_NAME, O_NAME, DOWN_NAME = (
    f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("quiet") / "start")


@pytest.fixture(scope="module")
def done(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    """In blocks, within the matrix half."""
    return run_with_steps(tmp_path_factory.mktemp("quiet") / "00", start, IN_BLOCKS)


def test_what_is_open_is_what_earlier_inputs_use_least(done: Round, start: Path):
    """Moments, directions and energies as numpy has them, from inputs that were read one text at a time."""
    model = read_model(start)
    texts = [ids for ids, _ in draw_texts(model, load_tokenizer(start), torch.device("cpu"))]
    modules = {"attention": "self_attn.k_proj", "heads": "self_attn.o_proj", "mlp": "mlp.gate_proj", "inner": "mlp.down_proj"}
    names = {f"layers.{layer}.{kind}": f"model.layers.{layer}.{path}" for layer in (0, 1) for kind, path in modules.items()}
    widths = {"attention": 32, "heads": 8, "mlp": 32, "inner": 16}
    inputs, bases = read_inputs(model, names, texts), load_file(done.bases_path)
    energy = done.read_result().earlier.closed_energy
    assert done.read_result().earlier.sources == ("the model's own samples",)
    directions = done.read_plan().directions
    assert bases.keys() == energy.keys() == {parts.input for parts in directions.values()}
    for name, basis_NWR in bases.items():
        width, is_open = widths[name.rpartition(".")[2]], 0.0
        for block, basis_WR in enumerate(basis_NWR.double().numpy()):
            own = inputs[name][:, block * width : (block + 1) * width]
            _, vectors = np.linalg.eigh(own.T @ own / len(own))
            quiet = vectors[:, : width // 2]
            np.testing.assert_allclose(basis_WR @ basis_WR.T, quiet @ quiet.T, atol=2e-4)
            is_open += np.square(own @ quiet).sum()
        assert energy[name] == pytest.approx(1 - is_open / np.square(inputs[name]).sum(), abs=1e-5)
        assert energy[name] > 0.5


def test_two_steps_by_hand(start: Path, tmp_path: Path):
    """Adam on B, whose gradient is that of the matrix times V; all else by plain Adam."""
    round_ = run(tmp_path / "00", make_spec(start, EVERYWHERE, train={"max_steps": 2, "global_batch_size": 16,
                                                                   "per_device_train_batch_size": 16}))  # fmt: skip
    plan, bases, model = round_.read_plan(), load_file(round_.bases_path), read_model(start)
    batch = read_batch(round_)
    starts = {name: value.detach().double().numpy().copy() for name, value in model.named_parameters()}
    states: dict[str, list[np.ndarray]] = {}
    for step in (1, 2):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, value in model.named_parameters():
            if name not in plan.trained:
                continue
            gradient, basis = value.grad.double().numpy(), None
            if name in plan.directions:
                basis = block_diagonal(bases[plan.directions[name].input].double().numpy())
                gradient = gradient @ basis
            first, second, moved = states.setdefault(name, [np.zeros_like(gradient) for _ in range(3)])
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            moved -= LEARNING_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            values = starts[name] + (moved @ basis.T if basis is not None else moved)
            value.data = torch.from_numpy(values).float()
    after = load_file(round_.checkpoint / "model.safetensors")
    for name, value in model.named_parameters():
        largest = np.abs(after[name].double().numpy() - value.detach().double().numpy()).max()
        assert largest < 2e-5, (name, largest)


def block_diagonal(basis_NWR: np.ndarray) -> np.ndarray:
    num_blocks, width, num_open = basis_NWR.shape
    whole = np.zeros((num_blocks * width, num_blocks * num_open))
    for block, part in enumerate(basis_NWR):
        whole[block * width : (block + 1) * width, block * num_open : (block + 1) * num_open] = part
    return whole


@pytest.mark.parametrize(
    "grain", ["directions", pytest.param(["matrices", "directions"], marks=pytest.mark.slow)], ids=["directions", "both"]
)
def test_the_whole_share_is_full_fine_tuning(start: Path, tmp_path: Path, grain: object):
    full = {"trainable_fraction": 1.0}
    losses = read_all_losses(tmp_path, start, full, full | {"grain": grain, "blocks": 16})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_change_has_the_rank_and_vanishes_elsewhere(done: Round, start: Path):
    plan, bases = done.read_plan(), load_file(done.bases_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, done.checkpoint))
    for name, parts in plan.directions.items():
        change = (after[name].double() - before[name].double()).numpy()
        basis = block_diagonal(bases[parts.input].double().numpy())
        values = np.linalg.svd(change, compute_uv=False)
        rank = min(parts.num_outputs, parts.num_blocks * parts.num_open)
        assert values[rank - 1] > 1e-4 * values[0]
        closed = change - change @ basis @ basis.T
        assert np.linalg.norm(closed) < 1e-4 * np.linalg.norm(change)
        found = done.read_result().verification.closed_change[name]
        assert found == pytest.approx(np.linalg.norm(closed) / np.linalg.norm(change), rel=0.05)
    assert done.read_result().verification.passed
    assert len(done.read_result().verification.closed_change) == len(plan.directions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_change_is_found(tmp_path: Path, dtype: torch.dtype):
    """A few units in the last place of one weight, and a small change of a whole row."""
    round_ = run(tmp_path / "00", make_spec(make_start(tmp_path / "start", dtype), IN_BLOCKS))
    assert verify_round(round_).passed
    path = round_.checkpoint / "model.safetensors"
    weights, name = load_file(path), next(iter(round_.read_plan().directions))
    whole = weights[name].clone()
    bits = weights[name].view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    bits.view(-1)[whole.abs().argmax()] += 30 if dtype == torch.bfloat16 else 100
    save_file(weights, path, {"format": "pt"})
    assert [leaked.partition(" ")[0] for leaked in verify_round(round_).leaked] == [name]
    weights[name].copy_(whole)
    weights[name][2] *= 1.05
    save_file(weights, path, {"format": "pt"})
    assert [leaked.partition(" ")[0] for leaked in verify_round(round_).leaked] == [name]


@OTHER_WAYS
def test_other_ways_end_in_the_same_weights(done: Round, start: Path, tmp_path: Path, values: dict):
    round_ = run(tmp_path / "00", make_spec(start, IN_BLOCKS, **values))
    assert verify_round(round_).passed
    compare_weights(round_, read_weights(done), 2e-6)


@pytest.mark.parametrize("step", [2, 4])
def test_a_round_that_was_killed_ends_in_the_same_bits(done: Round, tmp_path: Path, step: int):
    assert_goes_on(done, step, tmp_path / "00", "quiet/bases.safetensors", "quiet/moments.safetensors")


def test_rounds_add_what_they_read(done: Round, start: Path, tmp_path: Path):
    """The next round's directions come from the moments of the samples and of the round before, weighed alike."""
    spec = make_spec(done.checkpoint, IN_BLOCKS | {"trainable_fraction": 0.25}, 1, (done.folder,))
    second = run(tmp_path / "01", spec)
    sources = second.read_result().earlier.sources
    assert sources == ("the model's own samples", f"round {done.read_plan().fingerprint}")
    model, texts = read_model(done.checkpoint), read_batch(done)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(texts["input_ids"], texts["attention_mask"], strict=True)]
    own = [ids for ids, _ in draw_texts(read_model(start), load_tokenizer(start), torch.device("cpu"))]
    module = {"x": "model.layers.1.self_attn.k_proj"}
    parts = [read_inputs(read_model(start), module, own)["x"], read_inputs(model, module, rows)["x"]]
    expected = sum(part.T @ part / len(part) for part in parts) / 2
    found = load_file(done.moments_path)["layers.1.attention"][0].double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert read_history(second.checkpoint).rounds[-1].moments is not None
    assert second.read_result().verification.passed


def test_moments_of_another_history_are_refused(done: Round, tmp_path: Path):
    other = go_back(done, 4, tmp_path / "00")
    run_round(other, StopRequest(other))
    spec = make_spec(other.checkpoint, IN_BLOCKS, 1, (other.folder,))
    content = bytearray(other.moments_path.read_bytes())
    content[-1] ^= 1
    other.moments_path.write_bytes(content)
    with pytest.raises(InputError, match="do not belong to the rounds behind"):
        run(tmp_path / "01", spec)
    other.moments_path.unlink()
    with pytest.raises(InputError, match=r"moments\.safetensors.* is missing"):
        run(tmp_path / "01", spec)


@pytest.mark.parametrize("freeze", ["{grain: directions}", "{}"])
def test_moments_that_are_missing_are_foreseen(done: Round, tmp_path: Path, freeze: str):
    """A dry run says so; a round that does not go by them needs none."""
    other = Round(shutil.copytree(done.folder, tmp_path / "00"))
    other.moments_path.unlink()
    given = [f"model.path={other.checkpoint}", f"freeze={freeze}", "data.max_length=64", "eval.tasks=[]", "train.bf16=false"]
    recipe = load_recipe("tinyworld", [*given, f"output={tmp_path / 'run'}"])
    prepared, _ = prepare_single(recipe)
    prepared.lock.release()
    with pytest.raises(InputError, match=r"moments\.safetensors.* is missing") if "grain" in freeze else nullcontext():
        foresee_run(recipe, prepared, lambda *count: None)


def test_a_bases_file_of_another_plan_is_refused(done: Round, tmp_path: Path):
    other = go_back(done, 4, tmp_path / "00")
    run_round(other, StopRequest(other))
    parts = {"x.weight": Directions(input="x", num_outputs=2, num_blocks=1, width=4, num_open=2)}
    write_bases(other.bases_path, draw_choices(parts, torch.float32), {})
    assert verify_round(other).damaged_parts == ("quiet/bases.safetensors has other bytes than were written",)
    with pytest.raises(ModelError, match="does not hold the parts of matrices of plan"):
        read_choices(other.read_plan(), other.bases_path)


@pytest.mark.parametrize("how", ["missing", "cut", "no header"])
@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", "checkpoint/config.json", "quiet/bases.safetensors"])
def test_a_damaged_file_is_a_failed_verification(done: Round, tmp_path: Path, name: str, how: str, capsys):
    """Of which the file is said, though nothing can be compared with it; what is no round at all is a wrong input."""
    round_ = Round(shutil.copytree(done.folder, tmp_path / "00"))
    content = (round_.folder / name).read_bytes()
    if how == "missing":
        (round_.folder / name).unlink()
    else:
        (round_.folder / name).write_bytes(content[:-1] if how == "cut" else b"\xff" * 9 + content[9:])
    with pytest.raises(typer.Exit) as caught:
        verify(round_.folder)
    assert caught.value.exit_code == 3
    assert f"damaged: {name} {'is missing' if how == 'missing' else 'has '}" in " ".join(capsys.readouterr().out.split())
    (round_.folder / "round.json").unlink()
    with pytest.raises(InputError, match="neither a run nor a round"):
        verify(round_.folder)


def test_preferences_refer_to_the_start(start: Path, tmp_path: Path):
    """The shared reference copies only what trains whole."""
    round_ = compare_references(tmp_path, start, IN_BLOCKS)
    plan = round_.read_plan()
    directed = sum(parts.num_trainable for parts in plan.directions.values())
    assert round_.read_result().reference.num_bytes == 4 * (plan.num_trainable - directed)


def test_directions_at_random_are_a_control(start: Path, tmp_path: Path):
    """Orthonormal, others for every seed, and with no more of the earlier inputs' energy closed than their share."""
    round_ = run(tmp_path / "00", make_spec(start, EVERYWHERE | {"part": "random", "seed": 3}, train={"max_steps": 1}))
    plan, found = round_.read_plan(), load_file(round_.bases_path)
    other = draw_choices(plan.parts, torch.float32, 4, 0)
    for name, basis_NWR in found.items():
        for basis_WR in basis_NWR:
            torch.testing.assert_close(basis_WR.T @ basis_WR, torch.eye(basis_WR.shape[1]), rtol=0, atol=1e-5)
        assert not torch.allclose(basis_NWR, other[name])
    result = round_.read_result()
    assert np.mean(list(result.earlier.closed_energy.values())) == pytest.approx(0.5, abs=0.15)
    assert result.verification.passed
