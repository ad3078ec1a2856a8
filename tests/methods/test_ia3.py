"""IA3: what is scaled, and that merged vectors say what they said before."""

from types import SimpleNamespace

import pytest
import torch
from methods.rounds import START, make_spec
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from hftcli.errors import ModelError
from hftcli.freezing.roles import Parameter, assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.methods import make_methods
from hftcli.methods.ia3 import Ia3
from hftcli.methods.lora import ADAPTER
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.recipe.sections import ModelSection
from hftcli.runs.run import Round


def list_scaled(model_type: str, parameters: list[Parameter], share: float = 1.0) -> list[str]:
    units = assign_roles(model_type, parameters)
    (method,) = make_methods(make_spec({"ia3": {}}))
    return list(method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=share), 0), units).trained)


def test_keys_values_and_inner_activations_are_scaled():
    described = describe_model(str(START))
    scaled = list_scaled(described.model_type, described.parameters)
    assert {name.split(".")[-2] for name in scaled} == {"k_proj", "v_proj", "down_proj"}
    half = list_scaled(described.model_type, described.parameters, share=0.5)
    assert 0 < len(half) < len(scaled)
    gpt2 = [
        Parameter(f"transformer.h.0.{name}.{kind}", shape)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind, shape in (("weight", (4, 4)), ("bias", (4,)))
    ]
    names = ("attn.c_attn.weight", "attn.c_attn.bias", "mlp.c_proj.weight")
    assert list_scaled("gpt2", gpt2) == [f"transformer.h.0.{name}" for name in names]
    with pytest.raises(ModelError, match="ia3 scales c_attn, c_proj, and the freeze plan trains none"):
        list_scaled("gpt2", [*gpt2, Parameter("transformer.ln_f.weight", (4,))], share=0.01)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),  # with biases on keys and values
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2),  # matrices the other way round
    ],
    ids=lambda config: config.model_type,
)
def test_merged_vectors_say_what_they_said_before(tmp_path, config: PretrainedConfig):
    torch.manual_seed(0)
    start = tmp_path / "start"
    model = AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data.normal_(std=0.3)
    model.save_pretrained(start)
    described = describe_model(str(start))
    units = assign_roles(described.model_type, described.parameters)
    (method,) = make_methods(make_spec({"ia3": {}}))
    assert isinstance(method, Ia3)
    plan = method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=1.0), 0), units)
    section = ModelSection(path=str(start))
    model = load_model(section, start, plan, mixed=False, sharded=False)
    ids = torch.tensor([[1, 5, 6, 7]])
    untouched = model(ids).logits
    method.prepare_model(model, plan, start, mixed=False, sharded=False)
    assert {name.split(".")[-2] for name, value in model.named_parameters() if value.requires_grad} == {"ia3_l"}
    torch.testing.assert_close(model(ids).logits, untouched)  # the vectors begin at one
    for layer in method.layers.values():
        layer.ia3_l[ADAPTER].data.uniform_(0.5, 1.5)
    scaled = model(ids).logits
    assert (scaled - untouched).abs().max() > 0.01
    round_ = Round(tmp_path / "round")
    round_.folder.mkdir()
    args = SimpleNamespace(process_index=0)
    method.finish(SimpleNamespace(model=model, is_deepspeed_enabled=False, args=args), round_)
    torch.testing.assert_close(model(ids).logits, scaled, rtol=1e-4, atol=1e-5)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), round_.adapter)
    torch.testing.assert_close(loaded(ids).logits, scaled, rtol=1e-4, atol=1e-5)
    # What the plan says, and nothing else, has moved.
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(plan.trained)


def test_the_layers_that_are_named_are_scaled_at_their_inputs(tmp_path):
    """So their biases stay; that of the mlp's last layer, which is not named, is scaled."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "start")
    described = describe_model(str(tmp_path / "start"))
    units = assign_roles(described.model_type, described.parameters)
    named = {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["up_proj"]}
    (method,) = make_methods(make_spec({"peft": {"type": "IA3", **named}}))
    plan = method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=1.0), 0), units)
    start = tmp_path / "start"
    model = load_model(ModelSection(path=str(start)), start, plan, mixed=False, sharded=False)
    method.prepare_model(model, plan, start, mixed=False, sharded=False)
    for layer in method.layers.values():
        layer.ia3_l[ADAPTER].data.uniform_(0.5, 1.5)
    (tmp_path / "round").mkdir()
    trainer = SimpleNamespace(model=model, is_deepspeed_enabled=False, args=SimpleNamespace(process_index=0))
    method.finish(trainer, Round(tmp_path / "round"))
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(plan.trained)
    assert {name.partition("mlp.")[2] for name in moved} == {"up_proj.weight", "down_proj.weight", "down_proj.bias"}
