"""Every tensor keeps the data type and, where it is frozen, the bytes that the start's files have: read here by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from freezing.families import CONFIGS
from models.small_models import SIZES, draw, train
from raw_weights import RawTensor, flip_bit, mix_types, read_raw
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hftcli.errors import ModelError
from hftcli.freezing.roles import FAMILIES
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan
from hftcli.models.arithmetic import interpolate_models, merge_delta, reset_half
from hftcli.models.checkpoint import gather_outcome, load_finished, load_model, load_weights
from hftcli.models.layout import Layout
from hftcli.models.proof import verify_checkpoint
from hftcli.models.reader import Start
from hftcli.models.tensors import list_tensors
from hftcli.recipe.sections import ModelSection

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


OTHER_SIZES = ("qwen3_next", "qwen3_5_text", "llama4_text", "gemma3n_text", "falcon_h1", "mamba2")


def make_model(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SIZES | EXPERTS | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}
    elif family in OTHER_SIZES:
        sizes = CONFIGS[family] | {"tie_word_embeddings": False}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes | changes))


def write_start(folder: Path, family: str, **changes: object) -> Path:
    make_model(family, **changes).save_pretrained(folder)
    mix_types(folder)
    return folder


def change_files(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def find_owner(tensor: str, parameters: set[str], family: str) -> str | None:
    """The parameter that a tensor of the files is of, by rules written down here; None for what is no parameter's."""
    for name in (tensor, f"transformer.{tensor}", tensor.replace("embed_out.", "lm_head.")):
        if name in parameters:
            return name
    if "experts." in tensor:
        layer = tensor.split(".")[2]
        part = "down_proj" if tensor.split(".")[-2] in ("w2", "down_proj") else "gate_up_proj"
        return f"model.layers.{layer}.mlp.experts.{part}"
    if tensor.endswith("block_sparse_moe.gate.weight"):
        return tensor.replace("block_sparse_moe", "mlp")
    tied = {"lm_head.weight": "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"}
    return tied.get(tensor)


def assert_kept(start: dict[str, RawTensor], end: dict[str, RawTensor], plan: FreezePlan, family: str) -> None:
    """All tensors are there with their data types; what is frozen, and what is no parameter's, has its bytes."""
    parameters = {*plan.frozen, *plan.trained}
    assert end.keys() == start.keys()
    for name, (dtype, shape, content) in start.items():
        assert end[name][:2] == (dtype, shape), name
        owner = find_owner(name, parameters, family)
        assert (end[name][2] != content) == (owner in plan.trained), name


FORMS = {
    "gpt2 of old": ("gpt2", {}, lambda weights: {
        **{name.removeprefix("transformer."): values for name, values in weights.items()},
        **{f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() for layer in range(2)},
    }),
    "gpt_neox of old": ("gpt_neox", {}, lambda weights: {
        **{name.replace("lm_head.", "embed_out."): values for name, values in weights.items()},
        **{f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": torch.rand(2).half() for layer in range(4)},
        **{f"gpt_neox.layers.{layer}.attention.masked_bias": torch.tensor(-1e9) for layer in range(4)},
    }),
    "tied and stored twice": ("llama", {"tie_word_embeddings": True}, lambda weights: {
        **weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
    }),
    "tied, under the head's name": ("llama", {"tie_word_embeddings": True}, lambda weights: {
        name.replace("model.embed_tokens", "lm_head"): values for name, values in weights.items()
    }),
    "with what transformers does not know": ("qwen3", {}, lambda weights: {
        **weights, "mtp.0.proj.weight": torch.rand(4, 4), "counts": torch.arange(3), "scale": torch.tensor(2.0).double(),
    }),
}  # fmt: skip
FORMS |= {family: (family, {}, lambda weights: weights) for family in FAMILIES}


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_of_every_family_and_form_keeps_its_type_and_what_is_frozen_its_bytes(tmp_path, form):
    family, changes, change = FORMS[form]
    start = write_start(tmp_path / "start", family, **changes)
    change_files(start, change)
    before = read_raw(start)
    assert {dtype for dtype, _, _ in before.values()} >= DTYPES.keys()

    plan = train(start, tmp_path / "full", tmp_path / "delta")
    assert plan.frozen
    assert_kept(before, read_raw(tmp_path / "full"), plan, family)
    merge_delta(tmp_path / "delta", tmp_path / "merged")
    assert read_raw(tmp_path / "merged") == read_raw(tmp_path / "full")
    for form in ("full", "delta", "merged"):
        found = verify_checkpoint(start, tmp_path / form, plan, {})
        assert found.passed, found.faults
        assert (found.num_frozen, found.converted_to) == (len(plan.frozen), None)
        extras = [name for name in before if not find_owner(name, {*plan.frozen, *plan.trained}, family)]
        assert found.num_extras == len(extras)

    one, two = (load_weights(tmp_path / form, torch.float32).state_dict() for form in ("full", "delta"))
    assert all(torch.equal(values, two[name]) for name, values in one.items())
    plan = train(tmp_path / "delta", tmp_path / "aside", tmp_path / "second", 1)
    assert_kept(read_raw(tmp_path / "full"), read_raw(tmp_path / "aside"), plan, family)
    assert verify_checkpoint(tmp_path / "delta", tmp_path / "second", plan, {}).passed


@pytest.mark.parametrize("form", ["gpt2 of old", "with what transformers does not know", "mixtral", "tied and stored twice"])
def test_a_flipped_bit_and_a_changed_type_are_found_in_every_tensor(tmp_path, form):
    family, changes, change = FORMS[form]
    start = write_start(tmp_path / "start", family, **changes)
    change_files(start, change)
    plan = train(start, tmp_path / "full", tmp_path / "delta", embeddings="freeze", head="freeze")
    parameters = {*plan.frozen, *plan.trained}
    file = tmp_path / "full" / "model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    for name, values in weights.items():
        owner = find_owner(name, parameters, family)
        if owner not in plan.trained:
            flip_bit(file, name)
            found = verify_checkpoint(start, tmp_path / "full", plan, {})
            assert (found.violations if owner else found.changed_extras) == (owner or name,)
        if values.is_floating_point():
            other = torch.float32 if values.dtype != torch.float32 else torch.float64
            save_file(weights | {name: values.to(other)}, file, {"format": "pt"})
            found = verify_checkpoint(start, tmp_path / "full", plan, {})
            assert [text.partition(" ")[0] for text in found.retyped] == [name]
            assert not found.passed
        file.write_bytes(whole)
    assert verify_checkpoint(start, tmp_path / "full", plan, {}).passed


def test_a_tensor_of_the_start_that_the_checkpoint_lacks_is_named(tmp_path):
    start = write_start(tmp_path / "start", "llama")
    change_files(start, lambda weights: {**weights, "model.rotary_emb.inv_freq": torch.rand(4)})
    plan = train(start, tmp_path / "full", tmp_path / "delta")
    change_files(tmp_path / "full", lambda weights: {name: values for name, values in weights.items() if "rotary" not in name})
    found = verify_checkpoint(start, tmp_path / "full", plan, {})
    assert found.lost == ("model.rotary_emb.inv_freq",)
    assert not found.passed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_by_model_dtype_every_parameter_is_converted_once_and_that_is_said(tmp_path, dtype):
    start, given = write_start(tmp_path / "start", "qwen3"), str(dtype).removeprefix("torch.")
    change_files(start, lambda weights: {**weights, "counts": torch.arange(3), "scale": torch.rand(3)})
    plan = train(start, tmp_path / "full", tmp_path / "delta", dtype=given)
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    for name, values in before.items():
        if name not in plan.trained:
            expected = values if name in ("counts", "scale") else values.to(dtype)
            assert torch.equal(expected, after[name])
            assert expected.dtype == after[name].dtype
        else:
            assert after[name].dtype == dtype
    merge_delta(tmp_path / "delta", tmp_path / "merged")
    assert read_raw(tmp_path / "merged") == read_raw(tmp_path / "full")
    for form in ("full", "delta"):
        found = verify_checkpoint(start, tmp_path / form, plan, {}, given)
        assert (found.passed, found.converted_to) == (True, given)
    assert not verify_checkpoint(start, tmp_path / "full", plan, {}).passed  # no conversion was asked for
    again = train(tmp_path / "full", tmp_path / "second", tmp_path / "aside", 1, given)
    assert verify_checkpoint(tmp_path / "full", tmp_path / "second", again, {}, given).converted_to is None


def test_a_start_in_shards_gives_what_it_gives_in_one_file(tmp_path):
    start = write_start(tmp_path / "start", "llama")
    weights = load_file(start / "model.safetensors")
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    shutil.copytree(start, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {name: file for file, half in zip(names, halves, strict=True) for name in half}
    for file, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / "sharded" / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in ("start", "sharded"):
        train(tmp_path / folder, tmp_path / f"{folder}-full", tmp_path / f"{folder}-delta")
    assert read_raw(tmp_path / "start-full") == read_raw(tmp_path / "sharded-full")


def test_what_is_held_in_memory_keeps_the_bits_of_what_is_frozen(tmp_path):
    start = write_start(tmp_path / "start", "llama")
    plan, section, stored = draw(start), ModelSection(path=str(start)), load_file(start / "model.safetensors")
    for mixed in (False, True):
        model = load_model(section, start, plan, mixed=mixed, sharded=False)
        for name, values in model.named_parameters():
            assert torch.equal(values.to(stored[name].dtype), stored[name])
            assert torch.equal(values.float(), stored[name].float())
            is_halved = mixed and name in plan.frozen and stored[name].dtype == torch.bfloat16
            assert values.dtype == (torch.bfloat16 if is_halved else torch.float32)


def test_the_reset_half_has_the_base_s_types_and_bytes_and_the_other_the_tuned_model_s(tmp_path):
    """The tuned model as another program saved it: rounded to one type, under the names of its own."""
    base = write_start(tmp_path / "base", "gpt2")
    change_files(base, lambda weights: {name.removeprefix("transformer."): values for name, values in weights.items()})
    tuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for values in tuned.parameters():
        values.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    plan = reset_half(base, tmp_path / "tuned", FreezeRule(), tmp_path / "reset").plan
    old, new, found = (read_raw(tmp_path / folder) for folder in ("base", "tuned", "reset"))
    assert found == {
        name: old[name.removeprefix("transformer.")] if name in plan.frozen else values for name, values in new.items()
    }
    assert not any(old[name.removeprefix("transformer.")] == values for name, values in new.items())


def test_an_interpolation_has_the_tuned_model_s_types(tmp_path):
    base = write_start(tmp_path / "base", "qwen3_moe")
    train(base, tmp_path / "tuned", tmp_path / "aside")
    interpolate_models(base, tmp_path / "tuned", 0.25, tmp_path / "mean")
    old, new, mean = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "tuned", "mean"))
    for name, values in mean.items():
        assert values.dtype == new[name].dtype
        assert torch.equal(values, torch.lerp(old[name].float(), new[name].float(), 0.25).to(values.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_parameter_in_a_type_that_would_not_survive_is_refused(tmp_path, dtype):
    start = write_start(tmp_path / "start", "llama")
    change_files(start, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"].to(dtype)})
    code = {torch.float64: "F64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    with pytest.raises(ModelError, match=f"stores lm_head.weight as {code}") as raised:
        Start(ModelSection(path=str(start)), start, ())
    assert ("model.dtype" in raised.value.fix) == (dtype == torch.float64)


def test_tied_tensors_that_differ_are_refused_for_training_and_can_be_asked(tmp_path):
    start = write_start(tmp_path / "start", "llama", tie_word_embeddings=True)
    change_files(start, lambda weights: {**weights, "lm_head.weight": 2 * weights["model.embed_tokens.weight"]})
    with pytest.raises(ModelError, match="lm_head.weight and model.embed_tokens.weight are tied, and their tensors differ"):
        train(start, tmp_path / "full", tmp_path / "delta")
    assert load_finished(start, torch.float32, torch.device("cpu")).lm_head.weight.shape == (32, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_what_transformers_loads(tmp_path, family):
    """Each parameter, put together from the files, has the values of the loaded model; apart again, those of the files."""
    start = write_start(tmp_path / "start", family)
    stored = list_tensors(start)
    layout, loaded = Layout(start, stored), AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    assert layout.places.keys() == dict(loaded.named_parameters()).keys()
    for name, values in loaded.named_parameters():
        tensors = {place: stored[place].read() for place in layout.places[name]}
        assert torch.equal(layout.join(name, tensors).float(), values)
        for place, part in layout.split(name, values).items():
            assert torch.equal(part.to(tensors[place].dtype), tensors[place])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_frozen_tensor_that_moved_by_one_bit_in_memory_is_found(tmp_path, mixed):
    start = write_start(tmp_path / "start", "llama")
    section, plan = ModelSection(path=str(start)), draw(start)
    model, stored = load_model(section, start, plan, mixed=mixed, sharded=False), Start(section, start, ())
    outcome = gather_outcome(model, stored, plan, sharded=False, is_first=True, on_host={}, merged={})
    assert outcome.moved == ()
    assert outcome.masters.keys() == set(plan.trained)
    for name in plan.frozen:
        model.get_parameter(name).data.view(-1).view(torch.uint8)[0] ^= 1
    assert set(gather_outcome(model, stored, plan, sharded=False, is_first=True, on_host={}, merged={}).moved) == set(
        plan.frozen
    )
