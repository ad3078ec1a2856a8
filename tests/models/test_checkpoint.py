"""Checkpoints: what is loaded, what is frozen, and in which data type."""

import pytest
import torch
from models.small_models import SIZES, draw
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hftcli.errors import ModelError
from hftcli.models.checkpoint import freeze_model, load_model
from hftcli.recipe.sections import ModelSection


def test_a_start_in_another_data_type_is_rounded_to_it(folder):
    model = load_model(ModelSection(path=str(folder), dtype="float16"), folder, draw(folder), mixed=False, sharded=False)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].to(torch.float16).float())


def test_the_half_that_trains_and_no_other_can_get_a_gradient(folder):
    plan = draw(folder)
    model = load_model(ModelSection(path=str(folder)), folder, plan, mixed=False, sharded=False)
    assert tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad) == plan.trained
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(plan.trained)


def test_in_bfloat16_what_trains_has_float32_masters_and_what_is_frozen_has_none(folder):
    plan = draw(folder)
    model = load_model(ModelSection(path=str(folder)), folder, plan, mixed=True, sharded=False)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in plan.trained else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    assert all(model.get_parameter(name).grad.dtype == torch.float32 for name in plan.trained)


def test_a_plan_of_another_model_is_refused(folder, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match="the freeze plan is of another model: 18 parameters differ"):
        freeze_model(model, draw(folder))
