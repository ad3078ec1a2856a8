"""Linear layers that train in a part of their input space: W = W0 + B V^T, merged, so that a token costs what it always does.

W0, the start, and V, the open directions, are frozen; B is the only parameter. The forward pass multiplies by the merged W,
which is made once for a step; the gradient of B comes from x V alone, which is all that is kept of the input. Layers that read
the same tensor share V, and x V is computed for the first of them.

Shapes: T tokens, I and O inputs and outputs of a layer, N blocks of its inputs, W the width of a block, R the directions of a
block that are open. B is (O, N R), V is (N, W, R).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from hftcli.errors import ModelError
from hftcli.freezing.directions import Directions
from hftcli.models.tensors import write_tensors

CHANGE, BASIS = "change", "basis"  # the names of B and V in a layer


class DirectedLinear(nn.Module):
    """A linear layer that trains in some directions of its input.

    Args:
        layer: what it stands in for; its weight and bias are taken over, the weight frozen.
        basis: V, which other layers may share.
        projection: what those share of an input.
        change: B at its start.
        keeps_merged: False where the weight is in pieces between two uses, as under ZeRO 3.

    Attributes:
        is_at_start: the weight alone counts, be it the start, or what B was merged into.
    """

    def __init__(
        self, layer: nn.Linear, basis: nn.Parameter, projection: "Projection", change: torch.Tensor, keeps_merged: bool
    ):
        super().__init__()
        self.weight = layer.weight.requires_grad_(False)
        self.bias = layer.bias
        self.change, self.basis = nn.Parameter(change), basis
        self.projection = projection
        self.keeps_merged = keeps_merged
        self.is_at_start = False
        self.kept: tuple[Any, torch.Tensor] | None = None

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The layer's product; with gradients, those of B and of the input."""
        device = input_TI.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else input_TI.dtype
        if self.is_at_start or not (torch.is_grad_enabled() and self.change.requires_grad):
            return nn.functional.linear(input_TI.to(dtype), self.make_weight(dtype), self._cast_bias(dtype))
        cast_TI = input_TI.to(dtype)
        projected_TR = self.projection.apply(input_TI, cast_TI, self.basis)
        weight = self.make_weight(dtype) if self.keeps_merged else None
        return DirectedProduct.apply(cast_TI, self.change, self._cast_bias(dtype), projected_TR, weight, self)

    def make_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that counts (O, I), made anew where B has changed."""
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

    @property
    def num_kept_bytes(self) -> int:
        """Bytes of the merged weight, where it is kept."""
        return 0 if self.kept is None else self.kept[1].nbytes

    def refresh(self) -> None:
        """B has changed."""
        self.kept = None

    def _cast_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class Projection:
    """x V, for the layers that read the same x one after another.

    Attributes:
        num_readers: how many they are.
    """

    def __init__(self) -> None:
        self.num_readers = 0
        self._forget()

    def _forget(self) -> None:
        self.input: torch.Tensor | None = None
        self.projected: torch.Tensor | None = None
        self.num_taken = 0

    @torch.no_grad()
    def apply(self, input_TI: torch.Tensor, cast_TI: torch.Tensor, basis_NWR: torch.Tensor) -> torch.Tensor:
        """The product x V (T, N R).

        Args:
            input_TI: what the layers are given; the same tensor for each of them.
            cast_TI: the same in the data type of the product.
        """
        if self.input is not input_TI or self.projected is None or self.projected.dtype != cast_TI.dtype:
            self._forget()
            self.input, self.projected = input_TI, project(cast_TI, basis_NWR.to(cast_TI.dtype))
        projected, self.num_taken = self.projected, self.num_taken + 1
        if self.num_taken == self.num_readers:
            self._forget()  # what lives on belongs to the graph
        return projected


class DirectedProduct(torch.autograd.Function):
    """x W^T + b, of which x V is kept for the gradient of B, and nothing for that of x but W itself."""

    @staticmethod
    def forward(
        ctx: Any, input_TI: torch.Tensor, change: torch.Tensor, bias: torch.Tensor | None, projected_TR: torch.Tensor,
        weight: torch.Tensor | None, layer: DirectedLinear,
    ) -> torch.Tensor:  # fmt: skip
        """Multiply by the merged weight, which under ZeRO 3 is made here and again in the backward pass."""
        ctx.save_for_backward(projected_TR)
        ctx.weight, ctx.layer = weight, layer
        ctx.has_bias, ctx.change_dtype = bias is not None, change.dtype
        weight = layer.make_weight(input_TI.dtype) if weight is None else weight
        return nn.functional.linear(input_TI, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input, of B and of the bias."""
        (projected_TR,) = ctx.saved_tensors
        gradient_TI = change = bias = None
        if ctx.needs_input_grad[0]:
            weight = ctx.layer.make_weight(gradient_TO.dtype) if ctx.weight is None else ctx.weight
            gradient_TI = gradient_TO @ weight
        flat_TO = gradient_TO.reshape(-1, gradient_TO.shape[-1])
        if ctx.needs_input_grad[1]:
            change = (flat_TO.T @ projected_TR.reshape(len(flat_TO), -1)).to(ctx.change_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias = flat_TO.sum(0)
        return gradient_TI, change, bias, None, None, None


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


def direct_model(
    model: nn.Module,
    directions: Mapping[str, Directions],
    bases: Mapping[str, torch.Tensor],
    is_whole: bool,
    dtype: torch.dtype = torch.float32,
) -> dict[str, DirectedLinear]:
    """Have a model's matrices train in these directions alone, from where they are.

    Args:
        bases: V by input; see `Directions`.
        is_whole: False where ZeRO 3 holds parameters in pieces.
        dtype: of B.

    Returns:
        The layers, by the name of their weight.

    Raises:
        ModelError: one of them is no linear layer.
    """
    shared: dict[str, tuple[nn.Parameter, Projection]] = {}
    layers = {}
    for name, parts in directions.items():
        place = name.removesuffix(".weight")
        layer = model.get_submodule(place)
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"{place} is a {type(layer).__name__}, and directions are those of linear layers", "set freeze.grain: matrices"
            )
        if parts.input not in shared:
            device = layer.weight.device
            basis = nn.Parameter(bases[parts.input].to(device), requires_grad=False)
            shared[parts.input] = (basis, Projection())
        basis, projection = shared[parts.input]
        projection.num_readers += 1
        change = torch.zeros(parts.num_outputs, parts.num_blocks * parts.num_open, dtype=dtype, device=layer.weight.device)
        layers[name] = DirectedLinear(layer, basis, projection, change, is_whole)
        model.set_submodule(place, layers[name])
    return layers


def find_basis(moments_NWW: torch.Tensor, num_open: int) -> tuple[torch.Tensor, float]:
    """The directions of each block in which the inputs have least energy, V (N, W, R) in float64, and their share of it.

    Args:
        moments_NWW: second moments of the inputs.
    """
    values_NW, vectors_NWW = torch.linalg.eigh(moments_NWW.double())
    total = values_NW.sum().item()
    return vectors_NWW[..., :num_open].contiguous(), max(values_NW[:, :num_open].sum().item(), 0.0) / total if total else 0.0


def draw_bases(directions: Mapping[str, Directions], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Directions at random, by input: where only their number matters."""
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for parts in directions.values():
        if parts.input not in bases:
            noise = torch.randn(parts.num_blocks, parts.width, parts.num_open, generator=generator)
            bases[parts.input] = torch.linalg.qr(noise)[0].to(dtype)
    return bases


def write_bases(path: Path, bases: Mapping[str, torch.Tensor], origin: Mapping[str, str]) -> None:
    """Keep directions, whole or not at all, with what they were made of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    write_tensors(temporary, bases, origin)
    temporary.replace(path)


def read_origin(path: Path) -> dict[str, str]:
    """What directions in a file were made of; nothing where there is none, or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def read_bases(path: Path) -> dict[str, torch.Tensor]:
    """The directions of a round, by input.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the directions of the round do not read: {error}") from None
