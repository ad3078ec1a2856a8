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
from hftcli.models.part import LaidLinear, Reading, make_generator


class ColumnedLinear(LaidLinear):
    """A linear layer that trains in some of its columns.

    Args:
        columns_OC: what they are at the start.
        index_C: which they are.
        is_kept_whole: see `Columns`.
    """

    def __init__(
        self, layer: nn.Linear, reading: Reading, columns_OC: torch.Tensor, index_C: torch.Tensor, is_kept_whole: bool,
        keeps_merged: bool,
    ):  # fmt: skip
        super().__init__(layer, reading, index_C, keeps_merged)
        self.columns = nn.Parameter(columns_OC)
        self.is_kept_whole = is_kept_whole

    @property
    def part(self) -> nn.Parameter:
        """The columns that train (O, C)."""
        return self.columns

    def extract(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The columns of a weight."""
        return weight_OI.index_select(1, self.index.to(weight_OI.device))

    def lay(self, weight_OI: torch.Tensor, part: torch.Tensor) -> None:
        """Write columns into a weight."""
        weight_OI.index_copy_(1, self.index.to(weight_OI.device), part.to(weight_OI.dtype))

    def take(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The inputs of the columns that train, or all."""
        return input_TI if self.is_kept_whole else select(input_TI, self.index)

    def pick(self, kept_TK: torch.Tensor) -> torch.Tensor:
        """The inputs of the columns that train."""
        return select(kept_TK, self.index) if self.is_kept_whole else kept_TK

    @property
    def num_added_bytes(self) -> int:
        """None that count: an index, and the columns are laid into the weight."""
        return 0


def select(input_TI: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
    """Some columns of an input (T, C), by the operation that is faster on a CPU."""
    flat_TI = input_TI.reshape(-1, input_TI.shape[-1])
    if flat_TI.dtype == torch.float32 and flat_TI.is_contiguous():  # here gather takes twice the time, elsewhere two thirds
        selected_TC = flat_TI.index_select(1, index_C)
    else:
        selected_TC = flat_TI.gather(1, index_C.expand(len(flat_TI), -1))
    return selected_TC.view(*input_TI.shape[:-1], -1)


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
