"""Weights that are others for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hftcli.models.checkpoint import is_partitioned, lay_in


@contextmanager
def keeping_trained(model: torch.nn.Module) -> Iterator[None]:
    """What trains is afterwards what it was, bit by bit, as the model computes with it. All ranks together.

    Of what ZeRO 3 holds in pieces rank 0 keeps the whole: DeepSpeed leaves small weights gathered beside their pieces.
    """
    kept = [(parameter, _copy(parameter)) for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter, values in kept:
            lay_in(parameter, values)


def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values on the CPU; of a parameter in pieces, on other ranks than the first a number in their place."""
    if not is_partitioned(parameter):
        return parameter.detach().to("cpu", copy=True)
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        is_first = torch.distributed.get_rank() == 0
        return parameter.detach().to("cpu", copy=True) if is_first else torch.zeros((), dtype=parameter.dtype)
