"""Which part of a matrix trains, where the grain is `directions`, `columns` or `entries`: how much of it, in which blocks.

In directions, a matrix moves only by B V^T: V are the directions that are open, a share of all, and in all others the matrix
stays what it is. In columns or entries, a share of its input columns or of its single weights is open, and the others stay what
they are, bit for bit. Which directions and columns those are is found from the inputs of earlier data (measuring/moments.py);
here it is counted. Matrices that read the same tensor, as queries, keys and values do, share their directions, and those of
their columns that were not chosen for each by itself.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from math import prod
from os.path import expanduser
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hftcli.errors import ModelError
from hftcli.freezing.roles import Unit

RowsPath = Annotated[str, AfterValidator(expanduser)]  # where rows are: `~` is the user's home


class KeepRule(BaseModel):
    """Rows whose inputs count as earlier ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    path: RowsPath
    """What must not be forgotten: rows, as under `data.path`, questions, as `eval.tasks` takes them, or a task, as
    `tinyworld/facts`, which means its test rows. The model reads them, and is not trained on them;
    `data.special_tokens_in_text` holds for them too, and of rows `data.bad_rows` and `data.ignore_columns`. Where `eval.tasks`
    asks of the same rows, that is counted and said: what is kept of them says nothing of what was not named."""

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
    def choice(self) -> str:
        """Under which name the file of a round has V."""
        return self.input

    @property
    def num_inputs(self) -> int:
        """Columns of the matrix."""
        return self.num_blocks * self.width

    @property
    def num_columns(self) -> int:
        """Columns of what trains: those of B."""
        return self.num_blocks * self.num_open

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what trains: of B."""
        return (self.num_outputs, self.num_columns)

    @property
    def num_trainable(self) -> int:
        """Weights that train: those of B."""
        return self.num_outputs * self.num_columns

    @property
    def num_kept(self) -> int:
        """Numbers that are kept of each input for the backward pass: x V."""
        return self.num_columns

    @property
    def num_computed(self) -> int:
        """Weights whose gradient is computed."""
        return self.num_trainable

    @property
    def index_bytes(self) -> int:
        """Of the numbers that say which they are, where they count."""
        return 0

    @property
    def num_basis_weights(self) -> int:
        """Numbers that say which directions are open: those of V."""
        return self.num_blocks * self.width * self.num_open


class Columns(BaseModel):
    """Which of a matrix's columns train: how many."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    input: str
    """What the matrix reads; see `Directions`."""

    choice: str
    """What they were chosen for, and under which name the file of a round has them: the input, where all matrices that read it
    train in the same ones; else the matrix itself."""

    num_outputs: int
    """Rows of the matrix."""

    num_inputs: int
    """Columns of the matrix."""

    num_columns: int
    """Columns that train."""

    is_kept_whole: bool
    """Whether the whole input is kept for the backward pass, once: several matrices read it, each in columns of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what trains."""
        return (self.num_outputs, self.num_columns)

    @property
    def num_trainable(self) -> int:
        """Weights that train."""
        return self.num_outputs * self.num_columns

    @property
    def num_kept(self) -> int:
        """Numbers that are kept of each input for the backward pass."""
        return self.num_inputs if self.is_kept_whole else self.num_columns

    @property
    def num_computed(self) -> int:
        """Weights whose gradient is computed."""
        return self.num_trainable

    @property
    def index_bytes(self) -> int:
        """Of the numbers that say which they are, where they count."""
        return 0

    @property
    def num_basis_weights(self) -> int:
        """None: an index costs nothing."""
        return 0


class Entries(BaseModel):
    """Which of a matrix's entries train: how many."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    input: str
    """What the matrix reads; see `Directions`."""

    choice: str
    """Under which name the file of a round has their places in the matrix, row by row: that of the matrix."""

    num_outputs: int
    """Rows of the matrix."""

    num_inputs: int
    """Columns of the matrix."""

    num_entries: int
    """Entries that train."""

    is_moving: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether others train later in the round, in place of some."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what trains."""
        return (self.num_entries,)

    @property
    def num_trainable(self) -> int:
        """Weights that train."""
        return self.num_entries

    @property
    def num_kept(self) -> int:
        """Numbers that are kept of each input for the backward pass: all."""
        return self.num_inputs

    @property
    def num_computed(self) -> int:
        """Weights whose gradient is computed, of which the entries' is picked: all."""
        return self.num_outputs * self.num_inputs

    @property
    def index_bytes(self) -> int:
        """Of their places, and where these change of what they were."""
        return ((4 if self.num_computed < 2**31 else 8) + 4 * self.is_moving) * self.num_entries

    @property
    def num_basis_weights(self) -> int:
        """None: places are no weights."""
        return 0


Part = Directions | Columns | Entries  # what of a matrix trains


def count_basis(parts: Mapping[str, Part]) -> int:
    """Numbers that say which directions are open; matrices that read the same share them."""
    return sum({part.choice: part.num_basis_weights for part in parts.values()}.values())


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


def list_coordinates(units: Iterable[Unit]) -> dict[str, tuple[str, int, int]]:
    """`list_inputs` with every input a block of its own, for which columns are chosen.

    Raises:
        ModelError: what a matrix reads is not known.
    """
    whole = list_inputs(units, None, 1)
    return {name: (unit, num_blocks * width, 1) for name, (unit, num_blocks, width) in whole.items()}


def open_columns(units: Iterable[Unit], share: Fraction, is_shared: bool) -> dict[str, Columns]:
    """By the name of a matrix's weight, its open columns; none for a matrix whose columns are all open.

    Args:
        is_shared: whether matrices that read the same input train in the same columns.

    Raises:
        ModelError: what a matrix reads is not known.
    """
    readers: dict[str, list[Unit]] = {}
    for unit in units:
        readers.setdefault(name_input(unit), []).append(unit)
    found = {}
    for name, own in readers.items():
        for unit in own:
            weight = unit.parameters[0]
            num_inputs = prod(weight.shape[1:])
            num_columns = max(int(share * num_inputs + Fraction(1, 2)), 1)
            if num_columns < num_inputs:
                found[weight.name] = Columns(
                    input=name, choice=name if is_shared else weight.name, num_outputs=weight.shape[0], num_inputs=num_inputs,
                    num_columns=num_columns, is_kept_whole=not is_shared and len(own) > 1,
                )  # fmt: skip
    return found


def open_entries(units: Iterable[Unit], share: Fraction, is_moving: bool = False) -> dict[str, Entries]:
    """By the name of a matrix's weight, its open entries; none for a matrix whose entries are all open.

    Raises:
        ModelError: what a matrix reads is not known.
    """
    found = {}
    for unit in units:
        weight = unit.parameters[0]
        num_entries = max(int(share * weight.num_elements + Fraction(1, 2)), 1)
        if num_entries < weight.num_elements:
            found[weight.name] = Entries(
                input=name_input(unit), choice=weight.name, num_outputs=weight.shape[0], num_inputs=prod(weight.shape[1:]),
                num_entries=num_entries, is_moving=is_moving,
            )  # fmt: skip
    return found


def find_input(unit: Unit) -> str | None:
    """What a matrix reads, where that is known."""
    kind = READS.get(unit.role, {}).get(unit.name.rpartition(".")[2])
    return None if kind is None else f"layers.{unit.layer}.{kind}"


def name_input(unit: Unit) -> str:
    """What a matrix reads.

    Raises:
        ModelError: that is not known.
    """
    found = find_input(unit)
    if found is None:
        raise ModelError(
            f"training in parts of matrices does not know what {unit.name} reads: it is known for the linear layers of "
            f"attention and mlp called {', '.join(name for names in READS.values() for name in names)}",
            "set freeze.grain: matrices, and no method.lora.quiet",
        )
    return found


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
