"""DPO's loss and gradient against an independent computation in float64."""

import copy
import math

import pytest
import torch
from training.preferences import START, compute_by_hand, compute_loss, make_trainer
from transformers import AutoModelForCausalLM

from hftcli.errors import InputError
from hftcli.methods.l2sp import L2sp
from hftcli.recipe.methods import L2spSection


@pytest.mark.parametrize(
    ("mode", "kernel"), [("precompute", "plain"), ("shared", "plain"), ("full", "plain"), ("shared", "chunked")]
)
def test_loss_and_gradient_are_those_of_float64(tmp_path, mode, kernel):
    trainer = make_trainer(tmp_path, mode, kernel)
    loss = compute_loss(trainer)
    loss.backward()
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(START, dtype=torch.float64))
    start = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float64)
    for name, parameter in trainer.model.named_parameters():
        model.get_parameter(name).data = parameter.detach().double()
    expected, _ = compute_by_hand(model, start)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)  # log-probabilities of some -50, in float32
    assert loss.item() != pytest.approx(math.log(2), abs=1e-3)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
        else:
            assert parameter.grad is None


def test_the_untrained_model_has_the_loss_of_a_coin(tmp_path):
    trainer = make_trainer(tmp_path, "shared")
    for parameter, start in trainer.reference.copy.copies:
        parameter.data.copy_(start)
    assert compute_loss(trainer).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_distance_from_the_start_is_added_to_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, "shared")
    plain = compute_loss(trainer)
    method = L2sp(None, L2spSection(strength=0.5))
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    method.anchors = {name: torch.zeros_like(value) for name, value in trained.items()}
    method.start(trainer)
    trainer.methods = [method]
    squares = sum(value.square().sum() for value in trained.values())
    assert compute_loss(trainer).item() == pytest.approx((plain + 0.5 / 2 * squares).item(), rel=1e-5)


def test_settings_that_do_not_go_together_are_the_user_s_fault(tmp_path):
    with pytest.raises(InputError, match="TRL refuses these settings"):
        make_trainer(tmp_path, "shared", loss_type="exo_pair")
