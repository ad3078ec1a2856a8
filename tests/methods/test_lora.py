"""LoRA: where adapters sit, and that what is merged is what they say."""

import pytest
import torch
from methods.rounds import START, halve, make_spec, read_weights, run_rounds
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hftcli.errors import ModelError
from hftcli.freezing.narrowing import narrow_plan
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.methods import make_methods
from hftcli.methods.lora import read_adapter, write_adapter
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.models.proof import verify_checkpoint
from hftcli.recipe.sections import ModelSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round


def test_adapters_train_the_matrices_of_the_layers_that_the_plan_trains():
    described = describe_model(str(START))
    units = assign_roles(described.model_type, described.parameters)
    plan = make_plan(units, FreezeRule(), 0)
    narrowed = narrow_plan(plan, units, None)
    assert set(narrowed.trained) == {name for name in plan.trained if "_proj" in name}
    assert set(narrowed.trained) | set(narrowed.frozen) == set(plan.trained) | set(plan.frozen)
    assert narrowed.num_trainable == sum(plan.roles[role].num_trainable for role in ("attention", "mlp"))
    assert narrowed.num_trainable_units == len(narrowed.trained)
    assert narrowed.roles["head"].num_trainable_units == 0
    assert narrowed.fingerprint != plan.fingerprint
    assert {name.split(".")[-2] for name in narrow_plan(plan, units, ("q_proj", "v_proj")).trained} <= {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match="target_modules names v_porj, and no layer") as caught:
        narrow_plan(plan, units, ["q_proj", "k_proj", "v_porj"])
    assert caught.value.fix == "did you mean v_proj?"
    with pytest.raises(ModelError, match="no adapter would train: target_modules is query, .*q_proj"):
        narrow_plan(plan, units, ("query",))


def test_adapters_sit_on_every_linear_layer_but_the_head_where_nothing_is_frozen():
    described = describe_model(str(START))
    units = assign_roles(described.model_type, described.parameters)
    (method,) = make_methods(make_spec({"lora": {}}))
    plan = method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=1.0), 0), units)
    modules = AutoModelForCausalLM.from_pretrained(START).named_modules()
    linear = {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert set(plan.trained) == linear - {"lm_head.weight"}


def test_an_adapter_goes_on_in_float32_beside_weights_in_bfloat16(tmp_path):
    start, earlier = halve(tmp_path / "start"), Round(tmp_path / "00-a")
    spec = make_spec({"lora": {}}, (("a", earlier.folder),)).model_copy(update={"model": ModelSection(path=str(start))})
    described = describe_model(str(start))
    units = assign_roles(described.model_type, described.parameters)
    (method,) = make_methods(spec)
    plan = method.narrow_plan(make_plan(units, spec.freeze, 1), units)
    name = plan.trained[0].removesuffix(".weight")
    num_outputs, num_inputs = next(one.shape for unit in units for one in unit.parameters if one.name == plan.trained[0])
    adapter = {name: (torch.randn(8, num_inputs), torch.randn(num_outputs, 8))}
    earlier.folder.mkdir()
    write_model(earlier.spec_path, spec)
    write_adapter(adapter, LoraConfig(r=8), start, earlier.adapter)
    model = load_model(spec.model, start, plan, mixed=True, sharded=False)
    method.prepare_model(model, plan, start, mixed=True, sharded=False)
    layer = method.layers[name]
    assert layer.base_layer.weight.dtype == torch.bfloat16
    for part, expected in zip((layer.lora_A, layer.lora_B), adapter[name], strict=True):
        assert torch.equal(part["default"].weight, expected)
        assert part["default"].weight.requires_grad
    adapted = {f"{name}.weight" for name in method.layers}
    assert adapted == set(plan.trained)
    assert {".".join(name.split(".")[-3:]) for name, value in model.named_parameters() if value.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_one_adapter_goes_through_all_rounds(tmp_path, processes):
    """In bfloat16: what trains is the first start plus one product, what is frozen keeps its bytes, adapters and all."""
    start = halve(tmp_path / "start")
    rounds = run_rounds(tmp_path, {"lora": {}}, start, num_processes=processes, zero_stage=2)
    base = load_file(start / "model.safetensors")
    seen = set()
    for place, round_ in enumerate(rounds):
        seen |= {name.removesuffix(".weight") for name in round_.read_plan().trained}
        adapter, weights = read_adapter(round_.adapter), read_weights(round_)
        assert adapter.keys() == seen
        for name, (weight_A_RI, weight_B_OR) in adapter.items():
            merged = base[f"{name}.weight"].float() + 32 / 8 * weight_B_OR @ weight_A_RI
            assert torch.equal(weights[f"{name}.weight"], merged.bfloat16())
        previous = rounds[place - 1].checkpoint if place else start
        assert verify_checkpoint(previous, round_.checkpoint, round_.read_plan(), {}).violations == ()
    # An adapter that is met again went on from where it was.
    before, last = (read_adapter(round_.adapter) for round_ in rounds)
    again = {name.removesuffix(".weight") for name in rounds[1].read_plan().trained} & before.keys()
    assert again
    for name in again:
        assert (last[name][0] - before[name][0]).norm() < 0.5 * before[name][0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_go_on_as_they_were_and_not_as_bfloat16_rounds_them(tmp_path, stage):
    """In steps of 1e-5, where bfloat16 at 0.1 knows steps of 5e-4: four of AdamW move no weight farther than 4e-5."""
    slow = {"bf16": True, "learning_rate": 1e-5, "warmup_steps": 0, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    rounds = run_rounds(tmp_path, {"lora": {}}, halve(tmp_path / "start"), slow, num_processes=2, zero_stage=stage)
    before, last = (read_adapter(round_.adapter) for round_ in rounds)
    again = {name.removesuffix(".weight") for name in rounds[1].read_plan().trained} & before.keys()
    moved = [(last[name][place] - before[name][place]).abs().max() for name in again for place in (0, 1)]
    assert 1e-6 < max(moved) < 4.5e-5


@pytest.mark.slow
def test_peft_makes_the_same_model_of_the_adapter(tmp_path):
    *_, last = run_rounds(tmp_path, {"lora": {"target_modules": ["q_proj", "down_proj"]}})
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(last.checkpoint)(ids).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(START), last.adapter)(ids).logits
    torch.testing.assert_close(merged, loaded, rtol=1e-4, atol=1e-4)
