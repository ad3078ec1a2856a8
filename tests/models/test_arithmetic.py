"""Models made of other models: the files to the byte, the mean by hand, the planned half and no other."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models.small_models import SIZES, TOKENIZER, assert_same, draw, read_all, train
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hftcli.errors import InputError, ModelError
from hftcli.freezing.rule import FreezeRule
from hftcli.models.arithmetic import interpolate_models, merge_delta, reset_half, sparsify_model, write_weights
from hftcli.models.reader import CheckpointReader
from hftcli.reporting.card import describe_making


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def tuned(base) -> Path:
    """Every weight of the base moved, as by full fine-tuning."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.rand_like(parameter)
    return save(model, base.parent / "tuned")


def assert_same_files(one: Path, two: Path, *more: str) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()} | set(more)
    for file in two.iterdir():
        assert (one / file.name).read_bytes() == file.read_bytes(), file.name


def test_every_chat_template_comes_along(base, tuned, tmp_path):
    templates = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools: {{ tools }}"}
    for folder in (base, tuned):
        shutil.copytree(folder, tmp_path / folder.name)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(tmp_path / "tuned")
    interpolate_models(tmp_path / "base", tmp_path / "tuned", 0.5, tmp_path / "mean")
    assert AutoTokenizer.from_pretrained(tmp_path / "mean").chat_template == templates


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2)),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merged_delta_is_the_full_checkpoint_byte_by_byte(tmp_path, family, dtype):
    torch.manual_seed(0)
    save(MODELS[family](), tmp_path / "base")
    train(tmp_path / "base", tmp_path / "full", tmp_path / "delta", dtype=dtype)
    manifest = merge_delta(tmp_path / "delta", tmp_path / "merged", tmp_path / "base")
    assert_same_files(tmp_path / "merged", tmp_path / "full", "merge.json")
    assert manifest.inputs["base"].path == str(tmp_path / "base")


def test_a_merged_chain_is_the_full_checkpoint(base, tmp_path):
    train(base, tmp_path / "full0", tmp_path / "delta0")
    train(tmp_path / "full0", tmp_path / "full1", tmp_path / "aside", 1)
    train(tmp_path / "delta0", tmp_path / "aside", tmp_path / "delta1", 1)
    manifest = merge_delta(tmp_path / "delta1", tmp_path / "merged")
    assert_same_files(tmp_path / "merged", tmp_path / "full1", "merge.json")
    assert manifest.inputs["base"].path == str(tmp_path / "delta0")


def test_shards_and_their_index_are_those_of_transformers(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    reader = CheckpointReader(base, ())
    (tmp_path / "ours").mkdir()
    write_weights(reader, reader.read_tensors, tmp_path / "ours", max_shard_size="10KB")
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    for file in (tmp_path / "ours").iterdir():
        assert file.read_bytes() == (tmp_path / "theirs" / file.name).read_bytes()
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) == len(list((tmp_path / "ours").glob("*.safetensors"))) > 1


def test_the_mean_of_two_models_by_hand(base, tuned, tmp_path):
    manifest = interpolate_models(base, tuned, 0.3, tmp_path / "mean")
    old, new, mean = (read_all(folder) for folder in (base, tuned, tmp_path / "mean"))
    for name, values in mean.items():
        assert values.dtype == torch.bfloat16
        exact = 0.7 * old[name].double() + 0.3 * new[name].double()
        assert torch.allclose(values.double(), exact, rtol=2**-8, atol=0)  # the rounding to bfloat16
    assert (manifest.kind, manifest.weight) == ("interpolation", 0.3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mean").num_parameters() > 0


def test_the_ends_of_the_interpolation_are_the_two_models_bit_for_bit(base, tuned, tmp_path):
    """With values on which arithmetic shows: signed zero, infinity."""
    shutil.copytree(base, tmp_path / "odd")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    save_file(weights, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    for weight, expected in ((0.0, tmp_path / "odd"), (1.0, tuned)):
        output = tmp_path / str(weight)
        interpolate_models(tmp_path / "odd", tuned, weight, output)
        assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.005, 0.3])
def test_the_largest_changes_are_kept_and_the_rest_is_the_base(tmp_path, dtype, density):
    """As numpy sorts them, of all tensors together, the former of equal ones first; one tensor does not move."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    save(model, tmp_path / "base")
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.weight"):
            parameter.data += (0.1 * torch.randn_like(parameter).float() * torch.rand(1)).to(dtype)
    save(model, tmp_path / "tuned")
    manifest = sparsify_model(tmp_path / "base", tmp_path / "tuned", density, tmp_path / "out")
    old, new, out = (read_all(tmp_path / folder) for folder in ("base", "tuned", "out"))
    order = list(CheckpointReader(tmp_path / "tuned", tuple(old)).layout.places)
    before, after, found = (np.concatenate([part[name].float().numpy().ravel() for name in order]) for part in (old, new, out))
    changes = np.abs(after - before)
    largest = np.argsort(-changes, kind="stable")[: round(density * len(changes))]
    expected = before.copy()
    expected[largest] = after[largest]
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))
    assert (manifest.density, manifest.num_weights) == (density, len(changes))
    assert manifest.num_kept == np.count_nonzero(found != before) == len(largest)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["num_kept"] == len(largest)


def test_the_ends_of_sparsification_are_the_two_models_bit_for_bit(base, tuned, tmp_path):
    for density, expected in ((0.0, base), (1.0, tuned)):
        sparsify_model(base, tuned, density, tmp_path / str(density))
        assert (tmp_path / str(density) / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    train(base, tmp_path / "full", tmp_path / "delta")
    sparsify_model(base, tmp_path / "delta", 1.0, tmp_path / "of a delta")
    assert_same(read_all(tmp_path / "of a delta"), read_all(tmp_path / "full"))


def test_models_of_other_data_types_are_not_sparsified(base, tmp_path):
    save(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "wide")
    with pytest.raises(ModelError, match="BF16 in .* and F32 in the tuned model"):
        sparsify_model(base, tmp_path / "wide", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interpolation_and_reset_take_deltas(base, tuned, tmp_path):
    train(base, tmp_path / "full", tmp_path / "delta")
    for form in ("full", "delta"):
        interpolate_models(base, tmp_path / form, 0.5, tmp_path / f"mean-{form}")
        with pytest.raises(InputError, match="none of the .* has moved"):  # the round froze just these
            reset_half(base, tmp_path / form, FreezeRule(), tmp_path / f"reset-{form}")
        assert not (tmp_path / f"reset-{form}").exists()
        manifest = reset_half(base, tmp_path / form, FreezeRule(seed=7), tmp_path / f"reset-{form}")
        assert manifest.num_moved == len(set(manifest.plan.frozen) & set(draw(base).trained)) > 0
    assert_same(read_all(tmp_path / "mean-full"), read_all(tmp_path / "mean-delta"))
    assert_same(read_all(tmp_path / "reset-full"), read_all(tmp_path / "reset-delta"))


@pytest.mark.parametrize("rule", [FreezeRule(), FreezeRule(group="layer", seed=7, embeddings="freeze", head="freeze")])
def test_a_reset_resets_exactly_the_planned_half(base, tuned, tmp_path, rule):
    manifest = reset_half(base, tuned, rule, tmp_path / "reset")
    plan = manifest.plan
    assert plan.rule == rule
    assert manifest.num_moved == len(plan.frozen)  # every weight of the tuned model had moved
    assert f"{len(plan.frozen)} of these {len(plan.frozen)} parameters had moved" in describe_making(manifest)
    assert set(plan.frozen) | set(plan.trained) == read_all(base).keys()
    found, old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "reset", base, tuned))
    assert_same(found, {name: old[name] if name in plan.frozen else new[name] for name in new})
    assert not any(torch.equal(old[name], new[name]) for name in new)
    assert json.loads((tmp_path / "reset" / "merge.json").read_text())["plan"]["fingerprint"] == plan.fingerprint
    if rule == FreezeRule():
        assert plan == draw(base)
        # The paper's half: of each layer 2 of 4 attention matrices, 1 or 2 of 3 of the mlp, 1 of 2 norms.
        for layer in range(SIZES["num_hidden_layers"]):
            inside = [name for name in plan.frozen if f"layers.{layer}." in name]
            assert sum("self_attn" in name for name in inside) == 2
            assert sum("mlp" in name for name in inside) in (1, 2)


def test_two_models_that_are_not_one_are_refused(base, tmp_path):
    save(LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 40})), tmp_path / "other")
    with pytest.raises(ModelError, match=r"embed_tokens.weight: \(32, 16\) and \(40, 16\)"):
        interpolate_models(base, tmp_path / "other", 0.5, tmp_path / "out")
    with pytest.raises(ModelError, match="are not two states of one model"):
        reset_half(base, tmp_path / "other", FreezeRule(), tmp_path / "out")
    with pytest.raises(ModelError, match="is not a delta"):
        merge_delta(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_what_is_there_is_never_written_over(base, tuned, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is already there"):
        interpolate_models(base, tuned, 0.5, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_what_is_hidden_under_the_name_stays(base, tuned, tmp_path):
    (tmp_path / ".mean").mkdir()
    (tmp_path / ".mean" / "thesis.txt").write_text("precious")
    interpolate_models(base, tuned, 0.5, tmp_path / "mean")
    assert (tmp_path / ".mean" / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mean", "mean"]
    assert (tmp_path / "mean").stat().st_mode == (tmp_path / ".mean").stat().st_mode


def test_a_merge_that_fails_leaves_nothing(base, tmp_path):
    train(base, tmp_path / "full", tmp_path / "delta")
    (tmp_path / "delta" / "delta.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is damaged"):
        merge_delta(tmp_path / "delta", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "full"]
