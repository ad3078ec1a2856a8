"""Layers that train in directions: product and gradients beside plain ones, what they keep, when the weight is made anew."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hftcli.freezing.directions import Directions
from hftcli.models.closure import measure_leak
from hftcli.models.directed import DirectedLinear
from hftcli.models.division import divide_model, draw_choices


def make_pair(num_blocks: int) -> tuple[nn.Module, dict[str, DirectedLinear], torch.Tensor]:
    """Two layers that read the same, with B drawn; their plain copy, and V as one matrix (I, N R)."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(16, 8), "k": nn.Linear(16, 12, bias=False)})
    plain = copy.deepcopy(model)
    parts = {"input": "x", "num_blocks": num_blocks, "width": 16 // num_blocks, "num_open": 8 // num_blocks}
    directions = {"q.weight": Directions(num_outputs=8, **parts), "k.weight": Directions(num_outputs=12, **parts)}
    layers = divide_model(model, directions, draw_choices(directions, torch.float32), True)
    for name, layer in layers.items():
        nn.init.normal_(layer.change)
        basis = torch.block_diag(*layer.basis)
        place = plain.get_submodule(name.removesuffix(".weight"))
        place.weight.data += layer.change.detach() @ basis.T
    plain["model"] = model
    return plain, layers, basis


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_product_and_gradients_are_those_of_the_merged_weight(num_blocks: int, is_checkpointed: bool):
    plain, layers, basis = make_pair(num_blocks)
    inputs = [torch.randn(2, 5, 16).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)

    def multiply(modules: nn.Module, given: torch.Tensor) -> torch.Tensor:
        return modules["q"](given).square().sum() + modules["k"](given).sin().sum()

    expected, model = multiply(plain, inputs[0]), plain["model"]
    if is_checkpointed:
        found = checkpoint(multiply, model, inputs[1], use_reentrant=False)
    else:
        found = multiply(model, inputs[1])
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(layers["q.weight"].bias.grad, plain["q"].bias.grad)
    for name, layer in layers.items():
        whole = plain.get_submodule(name.removesuffix(".weight")).weight.grad
        torch.testing.assert_close(layer.change.grad, whole @ basis)
        assert layer.weight.grad is None
        assert layer.basis.grad is None


def test_what_is_kept_is_the_projection_alone_and_once():
    plain, layers, _ = make_pair(1)
    kept: list[torch.Tensor] = []
    given = torch.randn(5, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = [plain["model"][name](given) for name in ("q", "k")]
    assert [tuple(tensor.shape) for tensor in kept] == [(5, 8), (5, 8)]
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert layers["q.weight"].reading.input is None  # nothing outlives the graph
    assert outputs[0].requires_grad


def test_autocast_computes_in_bfloat16():
    plain, layers, basis = make_pair(4)
    given = torch.randn(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = plain["model"]["q"](given), plain["q"](given)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    gradient = layers["q.weight"].change.grad
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, plain["q"].weight.grad @ basis, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_weight_follows_a_step(fused: bool):
    """A fused step leaves no mark on its parameters: what counts is that the layer is told."""
    _, layers, basis = make_pair(1)
    layer = layers["q.weight"]
    before = layer.make_weight(torch.float32)
    assert layer.make_weight(torch.float32) is before
    layer(torch.randn(3, 16)).sum().backward()
    torch.optim.AdamW([layer.change], lr=0.1, fused=fused).step()
    layer.refresh()
    torch.testing.assert_close(layer.make_weight(torch.float32), layer.weight + layer.change.detach() @ basis.T)
    layer.is_at_start = True
    torch.testing.assert_close(layer(torch.eye(16)).T - layer.bias[:, None], layer.weight)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_rounding_is_no_leak_and_a_planted_change_is(dtype: str):
    generator = np.random.default_rng(0)
    before = round_to(generator.normal(0, 0.02, (24, 32)), dtype)
    basis = np.linalg.qr(generator.normal(size=(2, 16, 16)))[0][:, :, :8]
    change = np.concatenate([generator.normal(0, 1e-3, (24, 8)) @ part.T for part in basis], axis=1)
    after = round_to((before + change).astype(np.float32), dtype)
    clean = measure_leak(before, after, basis, dtype, dtype)
    assert clean.is_rounding
    assert 0 < clean.fraction < (0.1 if dtype == "BF16" else 1e-4)
    unit = np.spacing(np.float32(after[5, 7])) * (2**16 if dtype == "BF16" else 1)
    after[5, 7] += 24 * unit
    assert measure_leak(before, after, basis, dtype, dtype).num_weights > 0


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    tensor = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return (tensor.bfloat16() if dtype == "BF16" else tensor).double().numpy()
