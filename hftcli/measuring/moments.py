"""Second moments of what a model's linear layers read: in which directions of its input space a matrix has been used.

C = mean over tokens of x x^T, for every distinct input, in float32. The moments of several sources count the same, however many
tokens each has. Moments are kept, tokens never.

Shapes: B rows of a batch, T tokens, K tokens that are no padding, N blocks of an input, W the width of a block.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hftcli.data.prepare import deal_rows
from hftcli.data.tokens import Progress, ignore_progress
from hftcli.errors import ModelError
from hftcli.models.device import count_batch_tokens
from hftcli.models.tensors import write_tensors
from hftcli.runs.files import name_temporary

Inputs = Mapping[str, tuple[str, int, int]]  # by input: a module that reads it, blocks, their width


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs of one source or of several.

    Attributes:
        tensors: (N, W, W) in float32, by input.
        sources: what was read, each by its name.
    """

    tensors: dict[str, torch.Tensor]
    sources: tuple[str, ...]


@dataclass
class Meter:
    """Adds up what the watched modules read while `mask_BT` says which of it is no padding."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    mask_BT: torch.Tensor | None = None
    num_tokens: int = 0

    @contextmanager
    def watch(self, model: nn.Module, inputs: Inputs) -> Iterator[None]:
        """Hooks before the modules that read the inputs."""
        handles = [
            model.get_submodule(module).register_forward_pre_hook(self._make_hook(name, num_blocks, width))
            for name, (module, num_blocks, width) in inputs.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_hook(self, name: str, num_blocks: int, width: int) -> Any:
        def add(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if self.mask_BT is None:
                return
            with torch.autocast(given[0].device.type, enabled=False):
                blocks_NKW = given[0].detach()[self.mask_BT].float().view(-1, num_blocks, width).transpose(0, 1)
                moments_NWW = blocks_NKW.transpose(1, 2) @ blocks_NKW
            self.sums[name] = self.sums[name] + moments_NWW if name in self.sums else moments_NWW

        return add


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """A model in eval mode; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@torch.no_grad()
def measure_moments(
    model: nn.Module,
    watched: nn.Module,
    inputs: Inputs,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    on_batch: Progress = ignore_progress,
) -> dict[str, torch.Tensor]:
    """Let a model read rows, all ranks together.

    Args:
        model: what is called, `watched` itself or what holds it.
        rows: token ids.

    Returns:
        The moments on the CPU, the same on all ranks.
    """
    meter = Meter()
    batches = deal_rows([len(ids) for ids in rows], count_batch_tokens(device), num_ranks)
    with at_rest(watched), meter.watch(watched, inputs):
        for index, batch in enumerate(batches):
            own = batch[rank::num_ranks]
            ids_BT, mask_BT = pad_rows([rows[row] for row in own or batch[:1]], device)
            # A rank that has no row of its own passes only so that ZeRO 3 can gather.
            meter.mask_BT = mask_BT.bool() & bool(own)
            meter.num_tokens += int(meter.mask_BT.sum())
            model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
            on_batch(index + 1, len(batches))
    count = torch.tensor(meter.num_tokens, device=device)
    if num_ranks > 1:
        for moments in (count, *meter.sums.values()):
            torch.distributed.all_reduce(moments)
    return {name: (moments / count).cpu() for name, moments in meter.sums.items()}


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, (B, T)."""
    longest = max(map(len, rows))
    ids_BT, mask_BT = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return ids_BT.to(device), mask_BT.to(device)


def add_source(moments: Moments, found: dict[str, torch.Tensor], source: str) -> Moments:
    """Moments with those of one more source."""
    num_sources = len(moments.sources)
    if not num_sources:
        return Moments(found, (source,))
    mean = {name: (num_sources * moments.tensors[name] + found[name]) / (num_sources + 1) for name in found}
    return Moments(mean, (*moments.sources, source))


def write_moments(path: Path, moments: Moments) -> None:
    """Keep moments, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = name_temporary(path)
    write_tensors(temporary, moments.tensors, {"sources": json.dumps(moments.sources)})
    temporary.replace(path)


def read_moments(path: Path, inputs: Inputs) -> Moments:
    """Moments of a file.

    Raises:
        ModelError: it is damaged, or of inputs that come apart into other blocks.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            sources = tuple(json.loads(file.metadata()["sources"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the moments of earlier inputs do not read: {error}") from None
    expected = {name: (num_blocks, width, width) for name, (_, num_blocks, width) in inputs.items()}
    if {name: tuple(moments.shape) for name, moments in tensors.items()} != expected:
        raise ModelError(
            f"{path} holds moments of inputs in other blocks than this round's",
            "set freeze.grain and freeze.blocks as the rounds before had them",
        )
    return Moments(tensors, sources)
