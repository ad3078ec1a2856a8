"""A-GEM, averaged gradient episodic memory (arXiv 1812.00420): no step raises the loss on rows of all earlier tasks together.

As GEM, with one constraint, so that the projection is a single subtraction (section 4 of the paper). The trainer clips before,
which leaves the projection as it would be.
"""

import datasets
import torch
from transformers import Trainer

from hftcli.methods.gem import EpisodicMemory, Gradient, multiply


class Agem(EpisodicMemory):
    """A-GEM: the gradient is kept from raising the mean loss on what is remembered of all earlier tasks."""

    def project(self, trainer: Trainer, parameters: list[torch.nn.Parameter], gradient: Gradient) -> Gradient:
        """The closest gradient on the plane that does not raise the loss on rows drawn from all tasks together."""
        memory = self.compute_gradient(trainer, parameters, datasets.concatenate_datasets(self.memories))
        return project_on_plane(gradient, memory)


def project_on_plane(gradient: Gradient, memory: Gradient) -> Gradient:
    """The gradient closest to `gradient` that has no negative product with `memory`."""
    product = multiply(gradient, memory)
    if product >= 0:
        return gradient
    weight = product / multiply(memory, memory)
    return [part - weight * reference for part, reference in zip(gradient, memory, strict=True)]
