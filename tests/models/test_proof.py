"""The proof of what moved: byte by byte, and each fault by its name."""

import shutil

import pytest
import torch
from models.small_models import SIZES, draw
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from hftcli.errors import ModelError
from hftcli.models.proof import measure_updates, verify_checkpoint
from hftcli.models.reader import Start
from hftcli.recipe.sections import ModelSection


def change(path, names: tuple[str, ...], amount: float, target) -> None:
    """A copy of a checkpoint with some tensors changed by a relative amount."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = (parameter.data.float() * (1 + amount) + (amount if "norm" not in name else 0)).to(parameter.dtype)
    model.save_pretrained(target)


def test_verification_passes_when_just_the_trained_half_moved(folder, tmp_path):
    plan = draw(folder)
    change(folder, plan.trained, 0.5, tmp_path)
    found = verify_checkpoint(folder, tmp_path, plan, {})
    assert found.passed
    assert (found.num_trained, found.num_frozen) == (len(plan.trained), len(plan.frozen))


def test_verification_names_what_should_not_have_moved_and_what_should(folder, tmp_path):
    plan = draw(folder)
    change(folder, (*plan.trained[1:], plan.frozen[0]), 0.5, tmp_path)
    found = verify_checkpoint(folder, tmp_path, plan, {})
    assert found.violations == plan.frozen[:1]
    assert found.unmoved == plan.trained[:1]
    assert not found.passed


def test_one_flipped_bit_is_a_violation_even_where_the_values_are_equal(folder, tmp_path):
    """0.0 and -0.0 compare equal."""
    plan = draw(folder)
    name = plan.frozen[0]
    for path, zero in ((tmp_path / "a", 0.0), (tmp_path / "b", -0.0)):
        path.mkdir()
        shutil.copy(folder / "config.json", path)
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[0] = zero
        save_file(weights, path / "model.safetensors")
    assert verify_checkpoint(tmp_path / "a", tmp_path / "b", plan, dict.fromkeys(plan.trained, 1.0)).violations == (name,)


def test_a_move_that_bfloat16_cannot_hold_is_told_from_no_move(folder, tmp_path):
    plan = draw(folder)
    norm = next(name for name in plan.trained if "layernorm" in name)
    change(folder, tuple(name for name in plan.trained if name != norm), 0.5, tmp_path)
    stored = load_file(folder / "model.safetensors")
    masters = {name: stored[name].float() for name in plan.trained}
    masters[norm] = masters[norm] + 1e-4
    updates = measure_updates(masters, Start(ModelSection(path=str(folder)), folder, plan.trained)).updates
    assert updates[norm] == pytest.approx(1e-4, rel=0.01)
    assert verify_checkpoint(folder, tmp_path, plan, updates).below_resolution == (norm,)
    assert verify_checkpoint(folder, tmp_path, plan, updates | {norm: 0.0}).unmoved == (norm,)


def test_experts_that_files_keep_apart_are_compared_as_the_model_has_them(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "start")
    plan = draw(tmp_path / "start")
    change(tmp_path / "start", plan.trained, 0.5, tmp_path / "end")
    assert any("experts" in name for name in plan.frozen)
    assert verify_checkpoint(tmp_path / "start", tmp_path / "end", plan, {}).passed
    assert len(verify_checkpoint(tmp_path / "start", tmp_path / "start", plan, {}).unmoved) == len(plan.trained)


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_checkpoint_is_named(folder, tmp_path, damage):
    whole = (folder / "model.safetensors").read_bytes()
    damaged = {"cut": whole[:-1], "header": b"x" * 64, "empty": b""}[damage]
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(ModelError, match="model.safetensors is damaged"):
        verify_checkpoint(folder, tmp_path, draw(folder), {})


def test_a_checkpoint_that_lacks_a_tensor_is_named(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    name = draw(folder).frozen[0]
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=f"lacks 1 parameters, the first is {name}"):
        verify_checkpoint(folder, tmp_path, draw(folder), {})
