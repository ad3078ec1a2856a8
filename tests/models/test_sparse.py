"""Layers that train in entries: product and gradient beside a plain one, when entries are laid in, which are the largest."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hftcli.freezing.directions import Entries
from hftcli.models.division import divide_model
from hftcli.models.part import PartLinear
from hftcli.models.sparse import find_entries

OWN = {"q": torch.tensor([0, 9, 31], dtype=torch.int32), "k": torch.tensor([1, 2, 40, 47], dtype=torch.int32)}


def make_pair() -> tuple[nn.Module, nn.Module, dict[str, PartLinear]]:
    """Two layers that read the same, and their plain copy."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(8, 4), "k": nn.Linear(8, 6, bias=False)})
    plain = copy.deepcopy(model)
    entries = {
        f"{name}.weight": Entries(
            input="x", choice=f"{name}.weight", num_outputs=size, num_inputs=8, num_entries=len(OWN[name])
        )
        for name, size in (("q", 4), ("k", 6))
    }  # fmt: skip
    return model, plain, divide_model(model, entries, {f"{name}.weight": index for name, index in OWN.items()}, True)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_product_and_gradients_are_those_of_the_whole_weight(is_checkpointed: bool):
    model, plain, layers = make_pair()
    inputs = [torch.randn(2, 5, 8).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)

    def multiply(modules: nn.Module, given: torch.Tensor) -> torch.Tensor:
        return modules["q"](given).square().sum() + modules["k"](given).sin().sum()

    expected = multiply(plain, inputs[0])
    found = checkpoint(multiply, model, inputs[1], use_reentrant=False) if is_checkpointed else multiply(model, inputs[1])
    expected.backward()
    found.backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(layers["q.weight"].bias.grad, plain["q"].bias.grad)
    for name, index in OWN.items():
        layer = layers[f"{name}.weight"]
        torch.testing.assert_close(layer.part.grad, plain[name].weight.grad.flatten()[index])
        assert layer.weight.grad is None


def test_the_input_is_kept_once():
    model, _, _ = make_pair()
    kept: list[torch.Tensor] = []
    given = torch.randn(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = [model[name](given) for name in ("q", "k")]
    assert [tuple(tensor.shape) for tensor in kept] == [(5, 8), (5, 8)]
    assert {tensor.data_ptr() for tensor in kept} == {given.data_ptr()}
    assert outputs[0].requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_entries_are_laid_in_after_a_step_and_others_stay(fused: bool):
    _, plain, layers = make_pair()
    layer = layers["q.weight"]
    layer(torch.randn(3, 8)).sum().backward()
    torch.optim.AdamW([layer.part], lr=0.1, weight_decay=0.1, fused=fused).step()
    layer.refresh()
    weight, before = layer.make_weight(torch.float32).flatten(), plain["q"].weight.detach().flatten()
    assert torch.equal(weight[OWN["q"]], layer.part)
    assert (weight[OWN["q"]] != before[OWN["q"]]).all()
    frozen = [place for place in range(32) if place not in OWN["q"].tolist()]
    assert torch.equal(weight[frozen], before[frozen])
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.eye(8)).T - layer.bias[:, None], weight.view(4, 8))


def test_of_entries_that_are_as_large_the_former_trains():
    assert find_entries(torch.tensor([[2.0, -1.0, 1.0], [1.0, 0.0, -3.0]]), 4).tolist() == [0, 1, 2, 5]
    assert find_entries(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 3).tolist() == [0, 1, 2]
