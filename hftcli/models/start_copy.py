"""A model's start beside the model: a copy of what trains, since what is frozen is the start's already.

Shapes: B sequences, N places in each, V the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from hftcli.models.directed import DirectedLinear


class StartCopy:
    """What trains of a model as it is now. Every rank must hold whole parameters: not ZeRO 3.

    Args:
        moves: whether the copy is to be renewed; else what trains in directions has its start beside it, and is not copied.
    """

    def __init__(self, model: torch.nn.Module, moves: bool = False):
        self.directed = [layer for layer in model.modules() if isinstance(layer, DirectedLinear) and not moves]
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

    @torch.no_grad()
    def renew(self) -> None:
        """Copy the model as it is by now."""
        for value, copy in self.copies:
            copy.copy_(value)

    def recall(self) -> list[torch.Tensor]:
        """The copy, on the CPU."""
        return [copy.cpu() for _, copy in self.copies]

    def restore(self, recalled: list[torch.Tensor]) -> None:
        """Take up what `recall` gave, of a model of the same plan."""
        self.copies = [(value, copy.clone()) for (value, _), copy in zip(self.copies, recalled, strict=True)]

    def ask(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the start at some places of a batch, (B, N, V) in float32.

        Args:
            model: the one that was copied.
            inputs: what it reads; its labels are passed over.
        """
        rows = {name: values for name, values in inputs.items() if name != "labels"} | {"use_cache": False}
        with self.laid_in(), evaluating(model):
            logits_BNV = model(**rows, logits_to_keep=columns_N).logits
        return logits_BNV.float().log_softmax(-1)

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
