"""An A that reads some directions alone: two steps of Adam by hand, in one block and in several."""

import numpy as np
import pytest
import torch

from hftcli.models.narrow_adapter import NarrowReader, spread


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_two_steps_of_adam_by_hand(num_blocks: int):
    """By numpy, in whole matrices: A = A' V^T, and the gradient of A' is that of A times V."""
    rng, width, num_open, rank, rate = np.random.default_rng(0), 4, 2, 3, 0.1
    bases = [np.linalg.qr(rng.normal(size=(width, width)))[0][:, :num_open] for _ in range(num_blocks)]
    whole = np.zeros((num_blocks * width, num_blocks * num_open))
    for block, basis in enumerate(bases):
        whole[block * width : (block + 1) * width, block * num_open : (block + 1) * num_open] = basis
    first, inputs = rng.normal(size=(rank, num_blocks * width)), rng.normal(size=(2, 5, num_blocks * width))
    targets = rng.normal(size=(5, rank))

    trained, mean, square = first @ whole, 0.0, 0.0
    for step, batch in enumerate(inputs, 1):
        gradient = 2 * (batch @ (trained @ whole.T).T - targets).T @ batch @ whole
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        trained = trained - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)

    basis_NWQ = torch.nn.Parameter(torch.tensor(np.stack(bases), dtype=torch.float32), requires_grad=False)
    reader = NarrowReader(torch.tensor(first, dtype=torch.float32), basis_NWQ)
    optimizer = torch.optim.Adam([reader.weight], lr=rate)
    for batch in torch.tensor(inputs, dtype=torch.float32):
        optimizer.zero_grad()
        (reader(batch) - torch.tensor(targets, dtype=torch.float32)).square().sum().backward()
        optimizer.step()
    np.testing.assert_allclose(reader.weight.detach().numpy(), trained, atol=1e-5)
    np.testing.assert_allclose(spread(reader.weight, basis_NWQ).numpy(), trained @ whole.T, atol=1e-5)
    assert basis_NWQ.grad is None
