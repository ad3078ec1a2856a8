"""AdamW on the host is AdamW: the same masters to the bit, gradients summed over micro-batches, nothing left on the model."""

import copy

import pytest
import torch

from hftcli.training.offload import HostAdamW


def make_layers(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=False)).to(dtype)
    layers[0].weight.requires_grad_(False)
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [None, 0.01])
def test_the_masters_are_those_of_adamw(dtype, max_norm):
    """Two micro-batches a step, three steps; torch steps the expected masters on gradients of the same rounded weights."""
    layers = make_layers(dtype)
    expected_layers = copy.deepcopy(layers)
    names = [name for name, value in layers.named_parameters() if value.requires_grad]
    optimizer = HostAdamW([layers.get_parameter(name) for name in names], lr=1e-2, weight_decay=0.1)
    masters = [torch.nn.Parameter(expected_layers.get_parameter(name).detach().float()) for name in names]
    expected = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(3):
        sums = [torch.zeros_like(master) for master in masters]
        for part in range(2):
            torch.manual_seed(10 * step + part)
            inputs = torch.randn(5, 8).to(dtype)
            layers(inputs).float().square().mean().backward()
            assert all(value.grad is None for value in layers.parameters())
            expected_layers(inputs).float().square().mean().backward()
            for total, name in zip(sums, names, strict=True):
                total += expected_layers.get_parameter(name).grad.float()
            expected_layers.zero_grad()
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(masters, max_norm)
            assert torch.equal(optimizer.clip(max_norm), norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.step()
        with torch.no_grad():
            for name, master in zip(names, masters, strict=True):
                expected_layers.get_parameter(name).copy_(master)
                assert torch.equal(optimizer.masters[layers.get_parameter(name)], master)
                assert torch.equal(layers.get_parameter(name), expected_layers.get_parameter(name))
    assert torch.equal(layers[0].weight, expected_layers[0].weight)
