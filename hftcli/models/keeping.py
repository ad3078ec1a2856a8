"""Weights, or whole modules, that are others for a while."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from hftcli.models.checkpoint import is_partitioned, lay_in


def keeping_trained(model: torch.nn.Module) -> AbstractContextManager[None]:
    """What trains is afterwards what it was; see `keeping`."""
    return keeping([parameter for parameter in model.parameters() if parameter.requires_grad])


@contextmanager
def keeping(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Parameters are afterwards what they were, bit by bit, as the model computes with them. All ranks together.

    Of what ZeRO 3 holds in pieces rank 0 keeps the whole: DeepSpeed leaves small weights gathered beside their pieces.
    """
    kept = [(parameter, _copy(parameter)) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, values in kept:
            lay_in(parameter, values)


@contextmanager
def keeping_modules(model: torch.nn.Module) -> Iterator[None]:
    """Modules hold afterwards what they held: the same parameters, buffers and modules, and these the same memory.

    What is written into that memory stays there. It is for what changes a model by giving it other tensors.
    """
    held = [vars(module)[kind] for module in model.modules() for kind in ("_parameters", "_buffers", "_modules")]
    before = [dict(names) for names in held]
    tensors = {value for names in held for value in names.values() if isinstance(value, torch.Tensor)}
    memory = {tensor: tensor.data for tensor in tensors}
    try:
        yield
    finally:
        for names, own in zip(held, before, strict=True):
            names.clear()
            names.update(own)
        for tensor, values in memory.items():
            tensor.data = values


def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values on the CPU; of a parameter in pieces, on other ranks than the first a number in their place."""
    if not is_partitioned(parameter):
        return parameter.detach().to("cpu", copy=True)
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        is_first = torch.distributed.get_rank() == 0
        return parameter.detach().to("cpu", copy=True) if is_first else torch.zeros((), dtype=parameter.dtype)
