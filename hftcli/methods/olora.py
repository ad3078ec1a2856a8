"""O-LoRA (arXiv 2310.14152): a new low-rank adapter for each task, orthogonal to those of the earlier ones.

The earlier adapters are merged into the weights and stay. On top of the loss comes, for every layer, lambda_1 times the sum of
||A_old A_new^T||^2 over the earlier adapters (equation 8 of the paper, where the directions are the columns of A; PEFT has
them in its rows). The authors' program adds up absolute values instead of squares.

Shapes: I, inputs of a linear layer; R, the rank.
"""

from pathlib import Path

import torch
from transformers import Trainer

from hftcli.methods.lora import ADAPTER, Adapter, Lora, read_adapter
from hftcli.recipe.methods import OloraSection
from hftcli.runs.run import Round


class Olora(Lora):
    """O-LoRA: a new adapter in every round, held orthogonal to those before."""

    section: OloraSection

    def find_base(self, start: Path) -> Path:
        """The round's own start, into which the earlier adapters are merged."""
        return start

    def read_last(self) -> Adapter:
        """None: every round begins a new adapter."""
        return {}

    def start(self, trainer: Trainer) -> None:
        """Gather the A of the earlier rounds for the layers that train in this one."""
        device = trainer.args.device
        earlier = [read_adapter(Round(Path(round_.folder)).adapter) for round_ in self.spec.earlier]
        self.pairs: list[tuple[torch.Tensor, torch.nn.Parameter]] = [
            (adapter[name][0].to(device), layer.lora_A[ADAPTER].weight)
            for adapter in earlier
            for name, layer in self.layers.items()
            if name in adapter
        ]

    def compute_penalty(self) -> torch.Tensor | None:
        """Lambda 1 times the overlap with the earlier adapters; None in the first round."""
        if not self.pairs:
            return None
        overlaps = (measure_overlap(old_RI, new_RI) for old_RI, new_RI in self.pairs)
        return self.section.orthogonality * sum(overlaps, start=torch.zeros(()))


def measure_overlap(old_RI: torch.Tensor, new_RI: torch.Tensor) -> torch.Tensor:
    """||A_old A_new^T||^2: the sum of the squared products of every direction with every other."""
    return (old_RI @ new_RI.float().T).square().sum()
