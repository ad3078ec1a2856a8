"""AdaLoRA (arXiv 2303.10512, by PEFT): ranks move, step by step, to the layers where they matter most.

PEFT's model takes the importance of every rank after each step, from weights and gradients, and adds a term to the loss that
keeps the factors orthogonal; both are done here, where the trainer has the model below.
"""

from typing import Any

import torch
from transformers import Trainer

from hftcli.errors import InputError
from hftcli.methods.lora import ADAPTER
from hftcli.methods.peft import Peft
from hftcli.methods.peft_config import build_config

SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what PEFT's allocator adds up over the steps


class AdaLora(Peft):
    """Adapters whose ranks are shared out while they train."""

    trainer: Trainer | None = None

    def check_steps(self, num_steps: int) -> None:
        """Raises: InputError: the ranks would have no step to move in."""
        config = build_config(self.type, self.given, ["x"])  # of which the layers are of no matter
        if config.tinit >= num_steps - config.tfinal:
            raise InputError(
                f"method.peft: tinit {config.tinit} and tfinal {config.tfinal} leave ADALORA no step of {num_steps} "
                "to move ranks in",
                "lower them, or train longer",
            )

    def start(self, trainer: Trainer) -> None:
        """Tell PEFT of the round's steps, and take what a step checkpoint kept to where the model trains."""
        self.trainer, num_steps = trainer, trainer.state.max_steps
        self.config.total_step = num_steps
        allocator = self.tuner.rankallocator
        allocator.set_total_step(num_steps)
        for name in SUMS:
            held = vars(allocator)[name]
            held.update({key: values.to(trainer.args.device) for key, values in held.items()})

    def compute_penalty(self) -> torch.Tensor | None:
        """The weight times the mean distance of the factors from orthogonal ones."""
        distances = []
        for layer in self.layers.values():
            reads_RI, writes_OR = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            for product in (reads_RI @ reads_RI.T, writes_OR.T @ writes_OR):
                distances.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
        return self.config.orth_reg_weight * torch.stack(distances).mean()

    def end_step(self) -> None:
        """Move ranks; nothing where no step was taken."""
        if self.trainer is None or any(layer.lora_A[ADAPTER].grad is None for layer in self.layers.values()):
            return
        self.tuner.update_and_allocate(self.trainer.state.global_step)

    def recall(self) -> Any:
        """What the allocator has added up, and which ranks are left."""
        allocator = self.tuner.rankallocator
        return {"pattern": self.config.rank_pattern, **{name: dict(vars(allocator)[name]) for name in SUMS}}

    def restore(self, recalled: Any) -> None:
        """Go on with them."""
        self.config.rank_pattern = recalled["pattern"]
        for name in SUMS:
            vars(self.tuner.rankallocator)[name].update(recalled[name])
