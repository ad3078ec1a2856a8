"""The A of a low-rank adapter that reads only some directions of its layer's input: A = A' V^T, where A' is what trains.

V, the open directions, is frozen. So A vanishes on all other directions at every step, whatever the optimizer does, and what is
saved is a plain A.

Shapes: T tokens, I inputs of a layer, R the rank, N blocks of the inputs, W the width of a block, Q the directions of a block
that are open. A is (R, I), A' is (R, N Q), V is (N, W, Q).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hftcli.errors import ModelError
from hftcli.freezing.directions import Directions
from hftcli.models.closure import Leak, measure_leak
from hftcli.models.directed import project

PEFT_PREFIX = "base_model.model."  # before the layers' names in PEFT's files


class NarrowReader(nn.Module):
    """What stands in for PEFT's A.

    Args:
        weight: PEFT's A at its start, of which the part in the open directions is taken.
        basis: V, which other layers may share.
    """

    def __init__(self, weight: torch.Tensor, basis: nn.Parameter):
        super().__init__()
        self.weight = nn.Parameter(project(weight.detach().float(), basis.detach().float()).to(weight.dtype))
        self.basis = basis

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The product x A^T: as many operations for a token as with a plain A."""
        return nn.functional.linear(input_TI, Spreading.apply(self.weight, self.basis).to(input_TI.dtype))


class PlainReader(nn.Module):
    """What stands in for A in a script of PEFT's own: wherever it is read, merged or saved, it is a plain A.

    Args:
        weight: see `NarrowReader`.
        basis: V.
    """

    basis: torch.Tensor

    def __init__(self, weight: torch.Tensor, basis: torch.Tensor):
        super().__init__()
        self.inner = nn.Parameter(project(weight.detach().float(), basis.float()).to(weight.dtype))
        self.register_buffer("basis", basis, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """A (R, I), with a gradient."""
        return Spreading.apply(self.inner, self.basis)

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The product x A^T."""
        return nn.functional.linear(input_TI, self.weight)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values = state_dict[f"{prefix}weight"]
        self.inner.data.copy_(project(values.float(), self.basis.float().to(values.device)))


class Spreading(torch.autograd.Function):
    """A' V^T, which keeps nothing but V."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, basis_NWQ: torch.Tensor) -> torch.Tensor:
        """A (R, I), in the data type of A'."""
        ctx.save_for_backward(basis_NWQ)
        return spread(weight, basis_NWQ).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_RI: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of A': that of A, projected."""
        (basis_NWQ,) = ctx.saved_tensors
        with torch.autocast(gradient_RI.device.type, enabled=False):
            return project(gradient_RI.float(), basis_NWQ.float()).to(gradient_RI.dtype), None


@torch.no_grad()
def spread(weight: torch.Tensor, basis_NWQ: torch.Tensor) -> torch.Tensor:
    """A' V^T (R, I) in float32."""
    num_blocks, _, num_open = basis_NWQ.shape
    with torch.autocast(weight.device.type, enabled=False):
        blocks_RNQ = weight.float().view(-1, num_blocks, num_open)
        return torch.einsum("rnq,nwq->rnw", blocks_RNQ, basis_NWQ.to(weight.device).float()).flatten(1)


def find_reading(folder: Path, directions: Mapping[str, Directions], bases: Mapping[str, torch.Tensor]) -> dict[str, Leak]:
    """What the A of an adapter's file read of the closed directions, by the name that they have there.

    Args:
        folder: the adapter, in PEFT's form.
        directions: by the name of a matrix.
        bases: V by input.

    Raises:
        ModelError: the file is missing or damaged, or lacks one of the layers.
    """
    path, tensors = folder / "adapter_model.safetensors", read_adapter_file(folder)
    found = {}
    for name, parts in directions.items():
        key = f"{PEFT_PREFIX}{name.removesuffix('.weight')}.lora_A.weight"
        if key not in tensors:
            raise ModelError(f"{path} has no {key}", "restore the file")
        weight_RI = tensors[key].double().numpy()
        basis_NWQ = bases[parts.choice].double().numpy()
        found[f"adapter/{key}"] = measure_leak(np.zeros_like(weight_RI), weight_RI, basis_NWQ, "F32", "F32")
    return found


def find_rankless(folder: Path) -> set[str]:
    """The weights of which an adapter's file has factors of no rank.

    Raises:
        ModelError: it is missing or damaged.
    """
    empty = [name for name, values in read_adapter_file(folder).items() if not values.numel()]
    return {f"{name.removeprefix(PEFT_PREFIX).partition('.lora_')[0]}.weight" for name in empty}


def read_adapter_file(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by the names that PEFT gives them.

    Raises:
        ModelError: the file is missing or damaged.
    """
    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the adapter does not read: {error}", "restore the file") from None
