"""Layers of which a part trains, under a trainer that knows nothing of them: its products and its files have the part in them.

A fused optimizer changes a part without a trace in its version, so that the weight is made anew for every product.

A file has the weight that counts, in the weight's data type, and neither the part nor V. When it is loaded, as a trainer does
that goes on from a checkpoint or takes the best, the part is read out of it again: columns and entries exactly, B to the
rounding of the file.

Shapes: those of models/part.py.
"""

from typing import Any

import torch
from torch import nn

from hftcli.errors import ModelError
from hftcli.models.closure import measure_leak
from hftcli.models.directed import DirectedLinear
from hftcli.models.part import LaidLinear, PartLinear
from hftcli.models.tensors import CODES


def keep_plain(layer: PartLinear) -> None:
    """Have a layer multiply by the part as it is, and its state be that of a plain one, whoever asks for it or loads it."""
    layer.register_forward_pre_hook(renew)
    layer.register_state_dict_post_hook(write_plain)
    layer.register_load_state_dict_pre_hook(read_plain)


def renew(layer: PartLinear, _: Any) -> None:
    """The part may have changed."""
    layer.refresh()


@torch.no_grad()
def merge_part(layer: PartLinear) -> torch.Tensor:
    """The weight that counts (O, I), in its data type."""
    start = layer.get_parameter("weight").detach()
    return layer.merge(start, layer.part.detach()).to(start.dtype)


def list_own(layer: PartLinear) -> dict[str, nn.Parameter]:
    """What a plain layer does not have, by name."""
    return {name: value for name, value in layer.named_parameters(recurse=False) if name not in ("weight", "bias")}


def write_plain(layer: PartLinear, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The merged weight in place of the weight, the part and V."""
    for name in list_own(layer):
        state.pop(prefix + name, None)
    state[f"{prefix}weight"] = merge_part(layer)


@torch.no_grad()
def read_plain(layer: PartLinear, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The part out of a merged weight.

    Raises:
        ModelError: another part of this layer was trained there.
    """
    if f"{prefix}weight" not in state:
        return
    start = layer.get_parameter("weight").detach()
    given = state[f"{prefix}weight"].to(start.device)
    if isinstance(layer, DirectedLinear):
        before, after, basis_NWR = (values.detach().cpu().double() for values in (start, given, layer.basis))
        num_blocks, width = basis_NWR.shape[:2]
        change_NWO = (after - before).view(-1, num_blocks, width).permute(1, 2, 0)
        found = torch.linalg.lstsq(basis_NWR, change_NWO).solution.permute(2, 0, 1).flatten(1)
        dtypes = CODES[start.dtype], CODES[given.dtype]
        is_own = measure_leak(before.numpy(), after.numpy(), basis_NWR.numpy(), *dtypes).is_rounding
    else:
        assert isinstance(layer, LaidLinear)
        found = layer.extract(given)
        is_own = torch.equal(layer.merge(start, found).to(start.dtype), given.to(start.dtype))
    if not is_own:
        raise ModelError(
            f"{prefix}weight has moved in what is frozen here: the checkpoint is of another half",
            "freeze as that run did, or train from its checkpoint anew",
        )
    for name, value in list_own(layer).items():
        state[prefix + name] = found.to(value) if value is layer.part else value.detach()
    state[f"{prefix}weight"] = start
    layer.refresh()
