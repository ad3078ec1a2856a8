"""Linear layers that train in a part of their input space: W = W0 + B V^T, merged, so that a token costs what it always does.

W0, the start, and V, the open directions, are frozen; B is the only parameter. The forward pass multiplies by the merged W,
which is made once for a step; the gradient of B comes from x V alone, which is all that is kept of the input. Layers that read
the same tensor share V, and x V is computed for the first of them (part.py).

Shapes: T tokens, I and O inputs and outputs of a layer, N blocks of its inputs, W the width of a block, R the directions of a
block that are open. B is (O, N R), V is (N, W, R).
"""

from typing import Any

import torch
from torch import nn

from hftcli.freezing.directions import Directions
from hftcli.models.part import PartLinear, Reading, make_generator


class DirectedLinear(PartLinear):
    """A linear layer that trains in some directions of its input.

    Args:
        basis: V, which other layers may share.
        change: B at its start.
    """

    def __init__(self, layer: nn.Linear, reading: Reading, basis: nn.Parameter, change: torch.Tensor, keeps_merged: bool):
        super().__init__(layer, reading, keeps_merged)
        self.change, self.basis = nn.Parameter(change), basis
        self.kept: tuple[Any, torch.Tensor] | None = None

    @property
    def part(self) -> nn.Parameter:
        """B."""
        return self.change

    def make_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W0 + B V^T."""
        if self.is_at_start:
            return self.weight.detach().to(dtype)
        # An optimizer changes a parameter in place, or, as DeepSpeed does, what it is a view of, which `refresh` is told of.
        state = (dtype, self.change.device, self.change._version, self.change.data_ptr())
        if self.kept is not None and self.kept[0] == state:
            return self.kept[1]
        weight = merge(self.weight, self.change, self.basis).to(dtype)
        if self.keeps_merged:
            self.kept = (state, weight)
        return weight

    def take(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The product x V."""
        return project(input_TI, self.basis.to(input_TI.dtype))

    def pick(self, kept_TK: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return kept_TK

    def merge(self, weight_OI: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A weight with B in it, in float32."""
        return merge(weight_OI, part, self.basis)

    @property
    def num_added_bytes(self) -> int:
        """Bytes of the merged weight, where it is kept."""
        return 0 if self.kept is None else self.kept[1].nbytes

    def refresh(self) -> None:
        """B has changed."""
        self.kept = None


def project(input_TI: torch.Tensor, basis_NWR: torch.Tensor) -> torch.Tensor:
    """The product x V, block by block."""
    num_blocks, width, _ = basis_NWR.shape
    if num_blocks == 1:
        return input_TI @ basis_NWR[0]
    blocks_TNW = input_TI.reshape(*input_TI.shape[:-1], num_blocks, width)
    return torch.einsum("...nw,nwr->...nr", blocks_TNW, basis_NWR).flatten(-2)


@torch.no_grad()
def merge(weight_OI: torch.Tensor, change: torch.Tensor, basis_NWR: torch.Tensor) -> torch.Tensor:
    """W0 + B V^T in float32."""
    num_blocks, _, num_open = basis_NWR.shape
    with torch.autocast(weight_OI.device.type, enabled=False):
        blocks_ONR = change.float().view(-1, num_blocks, num_open)
        moved_ONW = torch.einsum("onr,nwr->onw", blocks_ONR, basis_NWR.to(change.device).float())
        return weight_OI.float() + moved_ONW.flatten(1)


def find_basis(moments_NWW: torch.Tensor, num_open: int) -> tuple[torch.Tensor, float]:
    """The directions of each block in which the inputs have least energy, V (N, W, R) in float64, and their share of it.

    Args:
        moments_NWW: second moments of the inputs.
    """
    values_NW, vectors_NWW = torch.linalg.eigh(moments_NWW.double())
    total = values_NW.sum().item()
    return vectors_NWW[..., :num_open].contiguous(), max(values_NW[:, :num_open].sum().item(), 0.0) / total if total else 0.0


def draw_basis(part: Directions, name: str, seed: int, round_index: int) -> torch.Tensor:
    """Directions at random, V (N, W, R) in float64; others for every name, seed and round."""
    generator = make_generator(f"{seed}/{round_index}/{name}")
    noise = torch.randn(part.num_blocks, part.width, part.num_open, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise)[0]
