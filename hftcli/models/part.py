"""Linear layers of which a part trains: the forward pass multiplies by the whole weight, and only the part has a gradient.

What such a layer has beside a plain one is a parameter of its own, the part, and what it keeps of its input for the part's
gradient: so much less than the input as the part is smaller than the weight. Layers that read the same tensor keep it once.
What the part is, and how it goes into the weight, is said by directed.py, columned.py and sparse.py.

Shapes: T tokens, I and O inputs and outputs of a layer, P columns of the part, K numbers that are kept of a token.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class PartLinear(nn.Module, ABC):
    """A linear layer of which a part trains.

    Args:
        layer: what it stands in for; its weight and bias are taken over, the weight frozen.
        reading: what is kept of an input by all that keep the same of it.
        keeps_merged: False where the weight is in pieces between two uses, as under ZeRO 3.

    Attributes:
        is_at_start: the weight alone counts, be it the start, or what the part was merged into.
    """

    def __init__(self, layer: nn.Linear, reading: "Reading", keeps_merged: bool):
        super().__init__()
        self.weight = layer.weight.requires_grad_(False)
        self.bias = layer.bias
        self.reading = reading
        self.keeps_merged = keeps_merged
        self.is_at_start = False
        reading.num_readers += 1

    @property
    @abstractmethod
    def part(self) -> nn.Parameter:
        """What trains (O, P)."""

    @abstractmethod
    def make_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that counts (O, I), made anew where the part has changed."""

    @abstractmethod
    def take(self, input_TI: torch.Tensor) -> torch.Tensor:
        """What is kept of an input (T, K)."""

    @abstractmethod
    def pick(self, kept_TK: torch.Tensor) -> torch.Tensor:
        """Of what is kept, that which the part multiplies (T, P)."""

    def find_gradient(self, gradient_TO: torch.Tensor, kept_TK: torch.Tensor) -> torch.Tensor:
        """The gradient of the part, of what was kept and the gradient of the product."""
        return gradient_TO.T @ self.pick(kept_TK).reshape(len(gradient_TO), -1)

    @abstractmethod
    def merge(self, weight_OI: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The weight in float32 where it was this and the part is that."""

    @abstractmethod
    def refresh(self) -> None:
        """The part has changed."""

    @property
    @abstractmethod
    def num_added_bytes(self) -> int:
        """Bytes of what is held beside the weight and the part: a merged weight, or where the part lies."""

    def forward(self, input_TI: torch.Tensor) -> torch.Tensor:
        """The layer's product; with gradients, those of the part and of the input."""
        device = input_TI.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else input_TI.dtype
        cast_TI = input_TI.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.is_at_start or not (torch.is_grad_enabled() and self.part.requires_grad):
            return nn.functional.linear(cast_TI, self.make_weight(dtype), bias)
        kept_TK = self.reading.take(input_TI, cast_TI, self.take)
        return PartProduct.apply(cast_TI, self.part, bias, kept_TK, self)


class LaidLinear(PartLinear):
    """A linear layer whose part is some of the weight's own numbers, laid into it before a product, once for a step.

    Args:
        index: where they are.
    """

    index: torch.Tensor

    def __init__(self, layer: nn.Linear, reading: "Reading", index: torch.Tensor, keeps_merged: bool):
        super().__init__(layer, reading, keeps_merged)
        self.register_buffer("index", index, persistent=False)
        self.laid: tuple[torch.device, int, int] | None = None

    @abstractmethod
    def extract(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """What the part is where a weight is the start."""

    @abstractmethod
    def lay(self, weight_OI: torch.Tensor, part: torch.Tensor) -> None:
        """Write a part into a weight, in the weight's data type."""

    @torch.no_grad()
    def make_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight with its part as it is now."""
        weight_OI, part = self.weight.detach(), self.part.detach()
        if self.is_at_start:
            return weight_OI.to(dtype)
        if not self.keeps_merged:  # what is gathered is given back
            merged = weight_OI.to(dtype, copy=True)
            self.lay(merged, part)
            return merged
        # An optimizer changes a parameter in place, or, as DeepSpeed does, what it is a view of, which `refresh` is told of.
        state = (part.device, self.part._version, part.data_ptr())
        if self.laid != state:
            self.lay(weight_OI, part)
            self.laid = state
        return weight_OI.to(dtype)

    def merge(self, weight_OI: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The weight with this part, in float32."""
        merged = weight_OI.to(torch.float32, copy=True)
        self.lay(merged, part)
        return merged

    def refresh(self) -> None:
        """The part has changed."""
        self.laid = None


class Reading:
    """What is kept of an input, for the layers that keep the same of it one after another.

    Attributes:
        num_readers: how many they are.
    """

    def __init__(self) -> None:
        self.num_readers = 0
        self._forget()

    def _forget(self) -> None:
        self.input: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.num_taken = 0

    @torch.no_grad()
    def take(self, input_TI: torch.Tensor, cast_TI: torch.Tensor, take: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What is kept (T, K).

        Args:
            input_TI: what the layers are given; the same tensor for each of them.
            cast_TI: the same in the data type of the product.
            take: what each of them would keep of it.
        """
        if self.input is not input_TI or self.kept is None or self.kept.dtype != cast_TI.dtype:
            self._forget()
            self.input, self.kept = input_TI, take(cast_TI.detach())
        kept, self.num_taken = self.kept, self.num_taken + 1
        if self.num_taken == self.num_readers:
            self._forget()  # what lives on belongs to the graph
        return kept


class PartProduct(torch.autograd.Function):
    """x W^T + b, of which little is kept for the gradient of the part, and nothing for that of x: the layer has W."""

    @staticmethod
    def forward(
        ctx: Any, input_TI: torch.Tensor, part: torch.Tensor, bias: torch.Tensor | None, kept_TK: torch.Tensor,
        layer: PartLinear,
    ) -> torch.Tensor:  # fmt: skip
        """Multiply by the whole weight, which under ZeRO 3 is made here and again in the backward pass."""
        ctx.save_for_backward(kept_TK)
        ctx.layer = layer
        ctx.has_bias, ctx.part_dtype = bias is not None, part.dtype
        return nn.functional.linear(input_TI, layer.make_weight(input_TI.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input, of the part and of the bias."""
        (kept_TK,) = ctx.saved_tensors
        gradient_TI = part = bias = None
        if ctx.needs_input_grad[0]:
            gradient_TI = gradient_TO @ ctx.layer.make_weight(gradient_TO.dtype)
        flat_TO = gradient_TO.reshape(-1, gradient_TO.shape[-1])
        if ctx.needs_input_grad[1]:
            part = ctx.layer.find_gradient(flat_TO, kept_TK).to(ctx.part_dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            bias = flat_TO.sum(0)
        return gradient_TI, part, bias, None, None


def make_generator(name: str) -> torch.Generator:
    """A generator on the CPU that draws the same for the same name everywhere."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
