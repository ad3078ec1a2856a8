"""What is held in float32 though it does not train: weights of which bfloat16, in which the rest is held, would round bits.

So it is in one process that computes in bfloat16. DeepSpeed in bfloat16 holds everything so, and in float32 nothing is.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hftcli.freezing.directions import Directions, Entries, Part
from hftcli.freezing.roles import Unit


@dataclass(frozen=True)
class Held:
    """What the files of a start make of its parameters where these do not train.

    Attributes:
        wide: names of those that are held in float32 where they are frozen.
        exact: names of those that are held in float32 below adapters, where all others keep the data type of the files.
    """

    wide: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()

    def is_wide(self, name: str, trained: Collection[str], parts: Mapping[str, Part], is_adapted: bool) -> bool:
        """Whether a parameter is held in float32 and does not train, or has only adapters or a part that do.

        Args:
            trained: names of what trains, or has adapters.
            parts: of the matrices that train, those of which a part does.
            is_adapted: whether adapters train in place of the weights.
        """
        if name not in trained:
            return name in self.wide
        if is_adapted:
            return name in self.exact
        part = parts.get(name)
        # Columns and entries that stay where they are are laid into a matrix in bfloat16.
        keeps_start = isinstance(part, Directions) or (isinstance(part, Entries) and part.is_moving)
        return keeps_start and (name in self.wide or name in self.exact)

    def is_copied(self, name: str, trained: Collection[str], is_adapted: bool) -> bool:
        """Whether autocast makes a copy in bfloat16 of a matrix of which nothing, or only an adapter, trains.

        It is made for each product, and a product whose input has a gradient keeps it for the backward pass.
        """
        if name in trained:
            return is_adapted and (name in self.wide or name in self.exact)
        return name in self.wide

    def list_wide(
        self, units: Iterable[Unit], trained: Collection[str], parts: Mapping[str, Part], is_adapted: bool = False
    ) -> dict[str, int]:
        """Sizes, in weights, of all parameters of which `is_wide` is true, by name."""
        return {
            parameter.name: parameter.num_elements
            for unit in units
            for parameter in unit.parameters
            if self.is_wide(parameter.name, trained, parts, is_adapted)
        }


NOTHING_WIDE = Held()
