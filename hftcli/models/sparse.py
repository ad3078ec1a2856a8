"""Linear layers that train in some of their entries: all others are frozen, bit for bit.

The entries that train are a parameter of their own, with float32 masters and the optimizer's state; before a product they are
laid into the weight, in its data type, once for a step. Their gradient is picked from that of the whole weight, which is there
for a moment. The input is kept whole, once for all that read it.

Shapes: T tokens, I and O inputs and outputs of a layer, E entries that train.
"""

from collections.abc import Callable

import torch
from torch import nn

from hftcli.freezing.directions import Entries
from hftcli.models.part import LaidLinear, PartLinear, Reading, make_generator


class SparseLinear(LaidLinear):
    """A linear layer that trains in some of its entries.

    Args:
        entries_E: what they are at the start.
        index_E: their places in the weight, row by row, in 32 bits where these hold them.
    """

    def __init__(self, layer: nn.Linear, reading: Reading, entries_E: torch.Tensor, index_E: torch.Tensor, keeps_merged: bool):
        super().__init__(layer, reading, index_E, keeps_merged)
        self.entries = nn.Parameter(entries_E)

    @property
    def part(self) -> nn.Parameter:
        """The entries that train (E)."""
        return self.entries

    def extract(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The entries of a weight."""
        return pick_entries(weight_OI, self.index)

    def lay(self, weight_OI: torch.Tensor, part: torch.Tensor) -> None:
        """Write entries into a weight."""
        weight_OI.view(-1).index_copy_(0, self.index.to(weight_OI.device).long(), part.to(weight_OI.device, weight_OI.dtype))

    def take(self, input_TI: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return input_TI

    def pick(self, kept_TK: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return kept_TK

    def find_gradient(self, gradient_TO: torch.Tensor, kept_TK: torch.Tensor) -> torch.Tensor:
        """The entries' of the whole weight's gradient."""
        return pick_entries(super().find_gradient(gradient_TO, kept_TK), self.index)

    @property
    def num_added_bytes(self) -> int:
        """Of the places."""
        return self.index.nbytes


class MovingLinear(SparseLinear):
    """A linear layer that trains in changes of some of its entries, of which others may take the place.

    Args:
        start_E: what these entries are at the start, exactly.

    Attributes:
        collect: is given the gradient of all entries (O I) in every backward pass, where there is one to take it.
    """

    start_E: torch.Tensor

    def __init__(self, layer: nn.Linear, reading: Reading, start_E: torch.Tensor, index_E: torch.Tensor, keeps_merged: bool):
        super().__init__(layer, reading, torch.zeros_like(start_E), index_E, keeps_merged)
        self.register_buffer("start_E", start_E, persistent=False)
        self.collect: Callable[[torch.Tensor], None] | None = None

    def extract(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """No change."""
        return torch.zeros_like(self.start_E)

    def lay(self, weight_OI: torch.Tensor, part: torch.Tensor) -> None:
        """Write changed entries into a weight."""
        super().lay(weight_OI, self.start_E.to(part.device) + part)

    def find_gradient(self, gradient_TO: torch.Tensor, kept_TK: torch.Tensor) -> torch.Tensor:
        """The entries' of the whole weight's gradient."""
        whole = PartLinear.find_gradient(self, gradient_TO, kept_TK)
        if self.collect is not None:
            self.collect(whole.reshape(-1))
        return pick_entries(whole, self.index)

    @torch.no_grad()
    def move(self, numbers_N: torch.Tensor, places_N: torch.Tensor) -> None:
        """Let entries go back to their start, and others, which are at theirs, begin in their stead.

        Args:
            numbers_N: which of the E.
            places_N: of the others in the weight.
        """
        flat, places_N = self.weight.detach().view(-1), places_N.long()
        flat[self.index[numbers_N].long()] = self.start_E[numbers_N].to(flat.dtype)
        self.index[numbers_N] = places_N.to(self.index.dtype)
        self.start_E[numbers_N] = flat[places_N].to(self.start_E.dtype)
        self.entries[numbers_N] = 0
        self.refresh()

    @property
    def num_added_bytes(self) -> int:
        """Of the places, and of what is there at the start."""
        return self.index.nbytes + self.start_E.nbytes


def pick_entries(weight_OI: torch.Tensor, index_E: torch.Tensor) -> torch.Tensor:
    """Entries of a weight (E)."""
    return weight_OI.reshape(-1).index_select(0, index_E.to(weight_OI.device))


def find_entries(weight_OI: torch.Tensor, num_entries: int) -> torch.Tensor:
    """The places of the largest entries (E), in ascending order; of two that are as large, the former."""
    sizes = weight_OI.float().abs().flatten()
    border = sizes.kthvalue(len(sizes) - num_entries + 1).values
    is_open = sizes > border
    ties = (sizes == border).nonzero().flatten()
    is_open[ties[: num_entries - int(is_open.sum())]] = True
    return shorten(is_open.nonzero().flatten())


def draw_entries(part: Entries, name: str, seed: int, round_index: int) -> torch.Tensor:
    """Places at random (E), in ascending order; others for every name, seed and round."""
    generator = make_generator(f"{seed}/{round_index}/{name}")
    drawn = torch.randperm(part.num_outputs * part.num_inputs, generator=generator)
    return shorten(drawn[: part.num_entries].sort().values)


def shorten(index_E: torch.Tensor) -> torch.Tensor:
    """Places in 32 bits, where these hold them."""
    return index_E.int() if not len(index_E) or int(index_E.max()) < 2**31 else index_E
