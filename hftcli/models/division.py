"""From a plan to layers of which a part trains: which directions, columns or entries, by file, and the layers in a model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from hftcli.errors import ModelError
from hftcli.freezing.directions import Columns, Directions, Entries, Part
from hftcli.models.columned import ColumnedLinear, draw_columns
from hftcli.models.directed import DirectedLinear, draw_basis
from hftcli.models.part import PartLinear, Reading
from hftcli.models.sparse import MovingLinear, SparseLinear, draw_entries, pick_entries
from hftcli.models.tensors import write_tensors


def divide_model(
    model: nn.Module,
    parts: Mapping[str, Part],
    bases: Mapping[str, torch.Tensor],
    is_whole: bool,
    dtype: torch.dtype = torch.float32,
    read_start: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, PartLinear]:
    """Have a model's matrices train in these parts alone, from where they are.

    Args:
        bases: V of directions, the index of columns or entries, by the name of the choice.
        is_whole: False where ZeRO 3 holds parameters in pieces.
        dtype: of what trains.
        read_start: gives a weight (O, I) by its name, where the model does not hold it exactly or not whole.

    Returns:
        The layers, by the name of their weight.

    Raises:
        ModelError: one of them is no linear layer.
    """
    shared: dict[str, tuple[nn.Parameter, Reading]] = {}
    readings: dict[str, Reading] = {}
    layers: dict[str, PartLinear] = {}
    for name, part in parts.items():
        place = name.removesuffix(".weight")
        layer = model.get_submodule(place)
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                f"{place} is a {type(layer).__name__}, and only linear layers can train in directions, columns or entries",
                "set freeze.grain: matrices",
            )
        device, made = layer.weight.device, bases[part.choice]
        if isinstance(part, Directions):
            if part.input not in shared:
                shared[part.input] = (nn.Parameter(made.to(device), requires_grad=False), Reading())
            basis, reading = shared[part.input]
            change = torch.zeros(part.num_outputs, part.num_columns, dtype=dtype, device=device)
            layers[name] = DirectedLinear(layer, reading, basis, change, is_whole)
        elif isinstance(part, Entries):
            reading = readings.setdefault(part.input, Reading())
            weight_OI = layer.weight.detach() if read_start is None else read_start(name).to(device)
            index_E = made.to(device, copy=True)
            kind = MovingLinear if part.is_moving else SparseLinear
            layers[name] = kind(layer, reading, pick_entries(weight_OI, index_E).to(dtype), index_E, is_whole)
        else:
            reading = readings.setdefault(part.input if part.is_kept_whole else part.choice, Reading())
            weight_OI = layer.weight.detach() if read_start is None else read_start(name).to(device)
            columns_OC = weight_OI.index_select(1, made.to(device)).to(dtype)
            layers[name] = ColumnedLinear(layer, reading, columns_OC, made.to(device), part.is_kept_whole, is_whole)
        model.set_submodule(place, layers[name])
    return layers


def draw_choices(parts: Mapping[str, Part], dtype: torch.dtype, seed: int = 0, round_index: int = 0) -> dict[str, torch.Tensor]:
    """Directions, columns and entries at random, by the name of the choice."""
    drawn: dict[str, torch.Tensor] = {}
    for part in parts.values():
        if part.choice in drawn:
            continue
        if isinstance(part, Columns):
            drawn[part.choice] = draw_columns(part, part.choice, seed, round_index)
        elif isinstance(part, Entries):
            drawn[part.choice] = draw_entries(part, part.choice, seed, round_index)
        else:
            drawn[part.choice] = draw_basis(part, part.choice, seed, round_index).to(dtype)
    return drawn


def write_bases(path: Path, bases: Mapping[str, torch.Tensor], origin: Mapping[str, str]) -> None:
    """Keep directions, columns or entries, whole or not at all, with what they were made of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    write_tensors(temporary, bases, origin)
    temporary.replace(path)


def read_origin(path: Path) -> dict[str, str]:
    """What directions, columns or entries in a file were made of; nothing where there is none, or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def read_bases(path: Path) -> dict[str, torch.Tensor]:
    """The directions, columns or entries of a round, by the name of the choice.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the directions, columns or entries of the round do not read: {error}") from None
