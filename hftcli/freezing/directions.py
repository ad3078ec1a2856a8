"""Which part of a matrix's input space trains, where a plan's grain is `directions`: how many of them, in which blocks.

A matrix moves only by B V^T: V are the directions that are open, a share of all, and in all others the matrix stays what it
is. Which directions those are is found from the inputs of earlier data (measuring/moments.py); here it is counted. Matrices
that read the same tensor, as queries, keys and values do, share their directions.
"""

from collections.abc import Iterable
from fractions import Fraction
from math import prod
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hftcli.errors import ModelError
from hftcli.freezing.roles import Unit


class KeepRule(BaseModel):
    """Rows whose inputs count as earlier ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: str
    """What must not be forgotten: rows, as under `data.path`, or a task whose questions are asked, as `tinyworld/facts`. The
    model reads them, and is not trained on them."""

    samples: Annotated[int, Field(ge=1)] = 64
    """How many of the rows are read, drawn by `freeze.seed`; all where there are fewer."""


class Directions(BaseModel):
    """What of a matrix's input space trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    input: str
    """What the matrix reads, such as `layers.0.attention`; matrices that read the same share their directions."""

    num_outputs: int
    """Rows of the matrix."""

    num_blocks: int
    """Parts that its inputs fall into; each has directions of its own."""

    width: int
    """Inputs of a block."""

    num_open: int
    """Directions of a block in which the matrix trains."""

    @property
    def num_trainable(self) -> int:
        """Weights that train: those of B."""
        return self.num_outputs * self.num_blocks * self.num_open

    @property
    def num_basis_weights(self) -> int:
        """Numbers that say which directions are open: those of V."""
        return self.num_blocks * self.width * self.num_open


def list_inputs(units: Iterable[Unit], blocks: int | None, num_heads: int) -> dict[str, tuple[str, int, int]]:
    """What the matrices in the layers read: by input, the first unit that reads it, the number of blocks and their width.

    Raises:
        ModelError: what a matrix reads is not known, or does not come apart into blocks.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for unit in units:
        if unit.layer is not None and unit.role != "norm":
            found.setdefault(name_input(unit), (unit.name, *_divide(unit, blocks, num_heads)))
    return found


def open_directions(units: Iterable[Unit], share: Fraction, blocks: int | None, num_heads: int) -> dict[str, Directions]:
    """By the name of a matrix's weight, its open directions; none for a matrix whose directions are all open.

    Raises:
        ModelError: see `list_inputs`.
    """
    units, found = tuple(units), {}
    inputs = list_inputs(units, blocks, num_heads)
    for unit in units:
        _, num_blocks, width = inputs[name_input(unit)]
        num_open = max(int(share * width + Fraction(1, 2)), 1)
        if num_open < width:
            weight = unit.parameters[0]
            found[weight.name] = Directions(
                input=name_input(unit), num_outputs=weight.shape[0], num_blocks=num_blocks, width=width, num_open=num_open
            )
    return found


def name_input(unit: Unit) -> str:
    """What a matrix reads.

    Raises:
        ModelError: that is not known.
    """
    kind = READS.get(unit.role, {}).get(unit.name.rpartition(".")[2])
    if kind is None:
        raise ModelError(
            f"freeze.grain: directions does not know what {unit.name} reads: it is known for the linear layers of "
            f"attention and mlp called {', '.join(name for names in READS.values() for name in names)}",
            "set freeze.grain: matrices",
        )
    return f"layers.{unit.layer}.{kind}"


def _divide(unit: Unit, blocks: int | None, num_heads: int) -> tuple[int, int]:
    """Blocks of a matrix's inputs, and the width of each: a head, so many neighbours, or all of them."""
    num_inputs, kind = prod(unit.parameters[0].shape[1:]), name_input(unit).rpartition(".")[2]
    width = num_inputs
    if blocks is not None and kind == "heads":
        width = num_inputs // num_heads
    elif blocks is not None and kind == "inner":
        width = blocks
    if num_inputs % width:
        divisors = [number for number in range(8, min(num_inputs, 513)) if num_inputs % number == 0]
        raise ModelError(
            f"freeze.blocks {blocks} does not divide the {num_inputs} inputs of {unit.name}",
            f"take one of {', '.join(map(str, divisors)) or num_inputs}, or null",
        )
    return num_inputs // width, width


# By role and the last part of a linear layer's name, what it reads: the normed hidden states before attention or mlp, what the
# heads give out, or the mlp's inner activations.
READS = {
    "attention": {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"), "attention"),
        **dict.fromkeys(("o_proj", "dense"), "heads"),
    },
    "mlp": {
        **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h"), "mlp"),
        **dict.fromkeys(("down_proj", "dense_4h_to_h"), "inner"),
    },
}
