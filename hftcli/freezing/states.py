"""The bytes of an optimizer's state, by its name in `train.optim`, for each tensor that trains.

The forms are those of torch, transformers (Adafactor), bitsandbytes 0.50 and torchao 0.18: `tests/freezing/test_states.py`
holds them against the optimizers that are installed.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from hftcli.freezing.roles import Unit

SMALLEST_QUANTISED = 4096  # elements, below which a tensor's state stays in float32


@dataclass(frozen=True)
class StateForm:
    """What an optimizer keeps of a tensor.

    Attributes:
        num_values: numbers for each weight.
        bits: of each number.
        block_size: numbers that share a float32 scale, where they have fewer than 32 bits.
        skips_embeddings: transformers has their state in float32 all the same.
        is_whole: only tensors that are whole blocks are quantised.
        is_factored: a matrix has a number for each row and each column.
        is_paged: the driver moves the state to the host where the device is full.
    """

    num_values: int
    bits: int = 32
    block_size: int = 0
    skips_embeddings: bool = False
    is_whole: bool = False
    is_factored: bool = False
    is_paged: bool = False

    def count_bytes(self, shape: tuple[int, ...], is_embedding: bool = False) -> int:
        """Of a tensor of this shape."""
        size = math.prod(shape)
        if self.is_factored and len(shape) > 1:
            return 4 * (size // shape[-1] + size // shape[-2])
        is_small = size < SMALLEST_QUANTISED or (self.is_whole and size % self.block_size != 0)
        if self.bits == 32 or is_small or (is_embedding and self.skips_embeddings):
            return 4 * self.num_values * size
        return self.num_values * (size * self.bits // 8 + 4 * -(-size // self.block_size))


def _quantised(num_values: int, paged: bool = False) -> StateForm:
    """As bitsandbytes keeps it."""
    return StateForm(num_values, bits=8, block_size=256, skips_embeddings=True, is_paged=paged)


STATE_FORMS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), StateForm(2)),
    "paged_adamw_32bit": StateForm(2, is_paged=True),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), _quantised(2)),
    "paged_adamw_8bit": _quantised(2, paged=True),
    "ademamix": StateForm(3),
    "paged_ademamix_32bit": StateForm(3, is_paged=True),
    "ademamix_8bit": _quantised(3),
    "paged_ademamix_8bit": _quantised(3, paged=True),
    "lion_32bit": StateForm(1),
    "paged_lion_32bit": StateForm(1, is_paged=True),
    "lion_8bit": _quantised(1),
    "paged_lion_8bit": _quantised(1, paged=True),
    **dict.fromkeys(("adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit"), StateForm(1)),
    "rmsprop_bnb_8bit": _quantised(1),
    "sgd": StateForm(0),
    "adafactor": StateForm(1, is_factored=True),
    "adamw_torch_8bit": StateForm(2, bits=8, block_size=256, is_whole=True),
    "adamw_torch_4bit": StateForm(2, bits=4, block_size=128, is_whole=True),
}


def find_form(optim: str, optim_args: str | None = None) -> StateForm:
    """The form by `train.optim` and `train.optim_args`, of which a momentum and a centred mean add a number a weight."""
    form = STATE_FORMS[optim]
    given = dict(part.split("=", 1) for part in (optim_args or "").replace(" ", "").split(",") if "=" in part)
    has_momentum = optim in ("sgd", "rmsprop") and float(given.get("momentum", 0)) != 0
    is_centred = optim == "rmsprop" and given.get("centered", "").lower() == "true"
    return replace(form, num_values=form.num_values + has_momentum + is_centred)


def list_shapes(units: Iterable[Unit], trained: Collection[str]) -> list[tuple[tuple[int, ...], bool]]:
    """The shapes of what trains, and whether each is of the embeddings."""
    return [
        (parameter.shape, unit.role == "embedding")
        for unit in units
        for parameter in unit.parameters
        if parameter.name in trained
    ]
