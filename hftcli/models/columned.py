"""Linear layers that train in a part of their input columns: the others are frozen, bit for bit.

The columns that train are a parameter of their own, with float32 masters and the optimizer's state; before a product they are
laid into the weight, in its data type, once for a step. Their gradient comes from their inputs alone. Where several layers read
an input and each trains in columns of its own, the whole input is kept, once for all of them.

Shapes: T tokens, I and O inputs and outputs of a layer, C columns that train.
"""

import torch
from torch import nn

from hftcli.freezing.directions import Columns
from hftcli.freezing.rule import Choice
from hftcli.models.part import PartLinear, Reading, make_generator


class ColumnedLinear(PartLinear):
    """A linear layer that trains in some of its columns.

    Args:
        columns_OC: what they are at the start.
        index_C: which they are.
        is_kept_whole: see `Columns`.
    """

    index_C: torch.Tensor

    def __init__(
        self, layer: nn.Linear, reading: Reading, columns_OC: torch.Tensor, index_C: torch.Tensor, is_kept_whole: bool,
        keeps_merged: bool,
    ):  # fmt: skip
        super().__init__(layer, reading, keeps_merged)
        self.columns = nn.Parameter(columns_OC)
        self.register_buffer("index_C", index_C, persistent=False)
        self.is_kept_whole = is_kept_whole
        self.laid: tuple[torch.device, int, int] | None = None

    @property
    def part(self) -> nn.Parameter:
        """The columns that train (O, C)."""
        return self.columns

    @torch.no_grad()
    def make_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight with its columns as they are now."""
        weight_OI = self.weight.detach()
        if self.is_at_start:
            return weight_OI.to(dtype)
        if not self.keeps_merged:  # what is gathered is given back
            return weight_OI.to(dtype).index_copy(1, self.index_C, self.columns.detach().to(dtype))
        # An optimizer changes a parameter in place, or, as DeepSpeed does, what it is a view of, which `refresh` is told of.
        state = (self.columns.device, self.columns._version, self.columns.data_ptr())
        if self.laid != state:
            weight_OI.index_copy_(1, self.index_C, self.columns.detach().to(weight_OI.dtype))
            self.laid = state
        return weight_OI.to(dtype)

    def take(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The inputs of the columns that train, or all."""
        return input_TI if self.is_kept_whole else select(input_TI, self.index_C)

    def pick(self, kept_TK: torch.Tensor) -> torch.Tensor:
        """The inputs of the columns that train."""
        return select(kept_TK, self.index_C) if self.is_kept_whole else kept_TK

    def merge(self, weight_OI: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The weight with these columns, in float32."""
        return weight_OI.float().index_copy(1, self.index_C.to(weight_OI.device), part.float())

    def refresh(self) -> None:
        """The columns have changed."""
        self.laid = None

    @property
    def num_merged_bytes(self) -> int:
        """None: they are laid into the weight."""
        return 0


def select(input_TI: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
    """Some columns of an input (T, C), by the operation that is fastest on CPUs at any number of dimensions and data type."""
    flat_TI = input_TI.reshape(-1, input_TI.shape[-1])
    return flat_TI.gather(1, index_C.expand(len(flat_TI), -1)).view(*input_TI.shape[:-1], -1)


def score_columns(weight_OI: torch.Tensor, squares_I: torch.Tensor, choice: Choice) -> torch.Tensor:
    """How much each column matters to earlier data (I), float64.

    Args:
        squares_I: mean square of each input over earlier data.
        choice: see `FreezeRule.part`; here not `random`.
    """
    weight_OI, squares_I = weight_OI.double(), squares_I.double()
    if choice == "ssu":
        return weight_OI.abs().sum(0) * squares_I.sqrt()
    if choice == "ssu-code":
        return weight_OI.norm(dim=0) * squares_I
    return squares_I


def find_columns(scores_I: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The columns that matter least (C), in ascending order; of two that matter as much, the former."""
    return scores_I.argsort(stable=True)[:num_columns].sort().values


def draw_columns(part: Columns, name: str, seed: int, round_index: int) -> torch.Tensor:
    """Columns at random (C), in ascending order; others for every name, seed and round."""
    generator = make_generator(f"{seed}/{round_index}/{name}")
    return torch.randperm(part.num_inputs, generator=generator)[: part.num_columns].sort().values
