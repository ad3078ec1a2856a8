"""The bytes of optimizers' states, beside what the optimizers themselves hold after a step."""

from pathlib import Path

import pytest
import torch
from transformers.optimization import Adafactor

from hftcli.freezing.budget import Budget
from hftcli.freezing.states import STATE_FORMS, StateForm, find_form
from hftcli.recipe.trainer_keys import OPTIMIZERS
from hftcli.training.reports import measure_optimizer_bytes

ROOT = Path(__file__).parents[2]
SHAPES = [(100, 50), (100,), (64, 64), (4, 64, 32)]
TABLES = 4 * 1024  # of codes, at most, held once
TORCH = {
    "adamw_torch": (torch.optim.AdamW, {}, None),
    "adagrad": (torch.optim.Adagrad, {}, None),
    "rmsprop": (torch.optim.RMSprop, {}, None),
    "rmsprop with momentum": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, "momentum=0.9, centered=True"),
    "sgd": (torch.optim.SGD, {}, None),
    "sgd with momentum": (torch.optim.SGD, {"momentum": 0.9}, "momentum=0.9"),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}, None),
}
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_32bit": "Lion", "lion_8bit": "Lion8bit", "ademamix": "AdEMAMix", "ademamix_8bit": "AdEMAMix8bit",
    "rmsprop_bnb_8bit": "RMSprop8bit",
}  # fmt: skip
TORCHAO = {"adamw_torch_8bit": "AdamW8bit", "adamw_torch_4bit": "AdamW4bit"}


def hold(optimizer: type[torch.optim.Optimizer], **options: object) -> int:
    """Bytes after a step."""
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    made = optimizer(parameters, lr=1e-3, **options)
    made.step()
    return measure_optimizer_bytes(made)


def count(form: StateForm) -> int:
    return sum(form.count_bytes(shape) for shape in SHAPES)


@pytest.mark.parametrize("case", TORCH)
def test_those_of_torch(case):
    optimizer, options, optim_args = TORCH[case]
    assert count(find_form(case.split()[0], optim_args)) == hold(optimizer, **options)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_those_of_bitsandbytes(name):
    optim = pytest.importorskip("bitsandbytes").optim
    assert 0 <= hold(getattr(optim, BITSANDBYTES[name])) - count(STATE_FORMS[name]) <= TABLES


@pytest.mark.parametrize("name", TORCHAO)
def test_those_of_torchao(name):
    optim = pytest.importorskip("torchao.optim")
    assert 0 <= hold(getattr(optim, TORCHAO[name])) - count(STATE_FORMS[name]) <= 2 * len(SHAPES) * 1024


def test_by_hand():
    """Two moments of 8 bits and a scale for each 256 of them; small tensors and, with bitsandbytes, embeddings in float32."""
    form = STATE_FORMS["adamw_8bit"]
    assert form.count_bytes((4096, 4096)) == 2 * (4096**2 + 4 * 4096 * 16)
    assert form.count_bytes((4095,)) == 8 * 4095
    assert form.count_bytes((4096, 4096), is_embedding=True) == 8 * 4096**2
    assert STATE_FORMS["adamw_torch_8bit"].count_bytes((4096, 4096), is_embedding=True) == 2 * (4096**2 + 4 * 4096 * 16)
    assert STATE_FORMS["adamw_torch_4bit"].count_bytes((4096, 4096)) == 2 * (4096**2 // 2 + 4 * 4096 * 32)
    assert STATE_FORMS["adafactor"].count_bytes((4096, 11008)) == 4 * (4096 + 11008)


def test_every_optimizer_that_a_recipe_may_name_is_counted():
    assert STATE_FORMS.keys() == OPTIMIZERS.keys()
    assert {name for name, form in STATE_FORMS.items() if form.is_paged} == {name for name in OPTIMIZERS if "paged" in name}


def test_a_plan_counts_its_optimizer(monkeypatch):
    """A 7B model's moments in 8 bits: a quarter of float32's but for the embeddings, whose share trains whole."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from gpu.plans import make_setting

    from hftcli.freezing.activations import Workload

    work = Workload(1, 2048, attention="flash", arithmetic="autocast")
    budget: Budget = make_setting("Llama-2-7B", "half", work).budget
    small = Budget(**{**budget.__dict__, "optimizer": STATE_FORMS["adamw_8bit"]})
    embeddings = 32000 * 4096
    num_quantised = budget.plan.num_trainable - embeddings
    assert small.half.optimizer_bytes == pytest.approx(8 * embeddings + 2 * (1 + 4 / 256) * num_quantised, rel=1e-3)
    assert small.half.weights_bytes == budget.half.weights_bytes
    spread = Budget(**{**small.__dict__, "num_processes": 8, "zero_stage": 2})
    assert spread.half.optimizer_bytes == pytest.approx((4 + 2 * (1 + 4 / 256)) * budget.plan.num_trainable / 8, rel=1e-3)
