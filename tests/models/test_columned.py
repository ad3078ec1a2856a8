"""Layers that train in columns: product and gradients beside plain ones, what they keep, and when columns are laid in."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hftcli.freezing.directions import Columns
from hftcli.models.columned import find_columns
from hftcli.models.division import divide_model
from hftcli.models.part import PartLinear

OWN = {"q": torch.tensor([0, 3, 5]), "k": torch.tensor([1, 3, 7])}


def make_pair(is_shared: bool) -> tuple[nn.Module, nn.Module, dict[str, PartLinear], dict[str, torch.Tensor]]:
    """Two layers that read the same, their plain copy, and which columns train."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(8, 4), "k": nn.Linear(8, 6, bias=False)})
    plain = copy.deepcopy(model)
    chosen = {"q": OWN["q"], "k": OWN["q"]} if is_shared else OWN
    columns = {
        f"{name}.weight": Columns(
            input="x", choice="x" if is_shared else f"{name}.weight", num_outputs=size, num_inputs=8, num_columns=3,
            is_kept_whole=not is_shared,
        )
        for name, size in (("q", 4), ("k", 6))
    }  # fmt: skip
    bases = {"x": OWN["q"]} if is_shared else {f"{name}.weight": index for name, index in OWN.items()}
    return model, plain, divide_model(model, columns, bases, True), chosen


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_product_and_gradients_are_those_of_the_whole_weight(is_shared: bool, is_checkpointed: bool):
    model, plain, layers, chosen = make_pair(is_shared)
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
    for name, index in chosen.items():
        layer = layers[f"{name}.weight"]
        torch.testing.assert_close(layer.part.grad, plain[name].weight.grad[:, index])
        assert layer.weight.grad is None


@pytest.mark.parametrize(("is_shared", "shape"), [(False, (5, 8)), (True, (5, 3))])
def test_what_is_kept_is_kept_once(is_shared: bool, shape: tuple[int, int]):
    """The inputs of columns that all readers share; of columns of their own, the whole input, which is not copied."""
    model, _, layers, _ = make_pair(is_shared)
    kept: list[torch.Tensor] = []
    given = torch.randn(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = [model[name](given) for name in ("q", "k")]
    assert [tuple(tensor.shape) for tensor in kept] == [shape, shape]
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert (kept[0].data_ptr() == given.data_ptr()) is not is_shared
    assert layers["q.weight"].reading.input is None  # nothing outlives the graph
    assert outputs[0].requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_columns_are_laid_in_after_a_step_and_others_stay(fused: bool):
    _, plain, layers, chosen = make_pair(False)
    layer = layers["q.weight"]
    layer(torch.randn(3, 8)).sum().backward()
    torch.optim.AdamW([layer.part], lr=0.1, weight_decay=0.1, fused=fused).step()
    layer.refresh()
    weight = layer.make_weight(torch.float32)
    assert torch.equal(weight[:, chosen["q"]], layer.part)
    assert (weight[:, chosen["q"]] != plain["q"].weight[:, chosen["q"]]).all()
    frozen = [number for number in range(8) if number not in chosen["q"].tolist()]
    assert torch.equal(weight[:, frozen], plain["q"].weight[:, frozen])
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.eye(8)).T - layer.bias[:, None], weight)


def test_a_copy_that_is_laid_in_counts_while_it_is():
    """As a reference does between a forward pass and its backward pass."""
    _, plain, layers, chosen = make_pair(False)
    layer, given = layers["q.weight"], torch.randn(3, 8).requires_grad_()
    layer.part.data += 1.0
    product = layer(given)
    trained, layer.part.data = layer.part.data, plain["q"].weight.detach()[:, chosen["q"]]
    with torch.no_grad():
        torch.testing.assert_close(layer(given), plain["q"](given))
    layer.part.data = trained
    product.sum().backward()
    expected = plain["q"].weight.detach().clone()
    expected[:, chosen["q"]] += 1.0
    torch.testing.assert_close(given.grad, expected.sum(0).expand(3, -1))


def test_of_columns_that_matter_alike_the_former_trains():
    assert find_columns(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), 3).tolist() == [1, 2, 4]
