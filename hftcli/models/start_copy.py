"""A model's start beside the model: a copy of what trains, since what is frozen is the start's already."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hftcli.models.directed import DirectedLinear


class StartCopy:
    """What trains of a model as it is now. Every rank must hold whole parameters: not ZeRO 3.

    What trains in directions has its start beside it, and is not copied.
    """

    def __init__(self, model: torch.nn.Module):
        self.directed = [layer for layer in model.modules() if isinstance(layer, DirectedLinear)]
        held = {layer.change for layer in self.directed}
        trained = [value for value in model.parameters() if value.requires_grad and value not in held]
        self.copies = [(value, value.detach().clone()) for value in trained]

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(copy.nbytes for _, copy in self.copies)

    def move(self) -> None:
        """Take the copy to where the model trains, in its data type there."""
        self.copies = [(value, copy.to(value.device, value.dtype)) for value, copy in self.copies]

    @contextmanager
    def laid_in(self) -> Iterator[None]:
        """The start in the model's place; afterwards the very tensors that train are back, nothing is copied."""
        trained = [parameter.data for parameter, _ in self.copies]
        for parameter, copy in self.copies:
            parameter.data = copy
        for layer in self.directed:
            layer.is_at_start = True
        try:
            yield
        finally:
            for layer in self.directed:
                layer.is_at_start = False
            for (parameter, _), values in zip(self.copies, trained, strict=True):
                parameter.data = values


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout; left in the mode it came in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
