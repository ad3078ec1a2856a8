"""What of matrices trains: directions or columns of their inputs, as those that earlier inputs use least, or single entries.

It is no method of the recipe's section `method`, but what `freeze.grain: directions`, `columns` and `entries` mean: the layers
of the plan train B of W = W0 + B V^T (models/directed.py), some columns of W (models/columned.py) or some of its entries
(models/sparse.py). The checkpoint is a plain model with these merged in, rounded once to the start's data type.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hftcli.freezing.selection import FreezePlan
from hftcli.methods.method import Method
from hftcli.models.checkpoint import is_partitioned, lay_in, read_master
from hftcli.models.division import divide_model
from hftcli.models.keeping import keeping
from hftcli.models.part import LaidLinear, PartLinear
from hftcli.models.reader import Start
from hftcli.models.sparse import MovingLinear
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec


class Quiet(Method):
    """Directions, columns and entries: what trains in the plan's matrices is B, the columns, or the entries."""

    leaves_another_model = True

    def __init__(self, spec: RoundSpec):
        super().__init__(spec, Section())
        self.bases: dict[str, torch.Tensor] = {}
        self.layers: dict[str, PartLinear] = {}
        self.merged: dict[str, torch.Tensor] = {}

    def take_bases(self, bases: dict[str, torch.Tensor]) -> None:
        """Keep them for the layers."""
        self.bases = bases

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Put the layers of which a part trains in place of the plan's, their weights held as what is frozen is."""
        parts = plan.parts
        if not parts:  # all is open
            return
        self.stored = Start(self.spec.model, start, (*plan.trained, *plan.frozen))
        first = model.get_parameter(next(iter(parts)))
        # DeepSpeed makes the masters by itself, out of what it is given.
        dtype = first.dtype if sharded else torch.float32
        self.layers = divide_model(model, parts, self.bases, not is_partitioned(first), dtype, self.stored.read_master)
        if mixed and not sharded:
            for name, layer in self.layers.items():
                is_held = self.stored.get_dtype(name) == torch.bfloat16 and name not in self.stored.masters
                # What is laid in is rounded there, and the checkpoint has the rest from the start, but where others may follow.
                if is_held or (isinstance(layer, LaidLinear) and not isinstance(layer, MovingLinear)):
                    layer.weight.data = layer.weight.data.to(torch.bfloat16)

    @contextmanager
    def laying_aside(self) -> Iterator[None]:
        """Of the untouched model the weights alone count: parts have the exact start, and files are asked as they are."""
        for layer in self.layers.values():
            layer.is_at_start = True
        yield
        for layer in self.layers.values():
            layer.is_at_start = False

    def start(self, trainer: Trainer) -> None:
        """What a step checkpoint laid in counts."""
        self.end_step()

    def end_step(self) -> None:
        """Have the merged weights made anew."""
        for layer in self.layers.values():
            layer.refresh()

    @contextmanager
    def holding_end(self, trainer: Trainer) -> Iterator[None]:
        """Where the files round them, the merged weights for a while, rounded."""
        rounded = {name: layer for name, layer in self.layers.items() if self.stored.is_rounded(name)}
        with keeping([layer.get_parameter("weight") for layer in rounded.values()]):
            try:
                for name, layer in rounded.items():
                    lay_in(layer.get_parameter("weight"), self.stored.round(name, self._merge(trainer, name)))
                    layer.is_at_start = True
                yield
            finally:
                for layer in rounded.values():
                    layer.is_at_start = False

    def _merge(self, trainer: Trainer, name: str) -> torch.Tensor:
        """The exact start and what trained, in float32; all ranks together."""
        layer = self.layers[name]
        part = read_master(trainer.masters.get(layer.part, layer.part), trainer.is_deepspeed_enabled).detach()
        return layer.merge(self.stored.read_master(name).to(part.device), part)

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Merge the exact start and what trained into the layers' weights, which then count alone."""
        for name, layer in self.layers.items():
            merged = self._merge(trainer, name)
            if trainer.args.process_index == 0:
                self.merged[name] = merged.cpu()
            lay_in(layer.get_parameter("weight"), merged)
            layer.is_at_start = True

    def list_merged(self) -> dict[str, torch.Tensor]:
        """The matrices with what they learned, in float32."""
        return self.merged
