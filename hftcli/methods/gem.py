"""Gradient episodic memory (arXiv 1706.08840): a step may not raise the loss on remembered rows of any earlier task.

Between the last backward pass of a step and the step, the gradient g is replaced by the closest one that has no negative
product with the gradient of any memory, found through the dual problem with one variable for each earlier task (section 3 of
the paper). Where no product is negative, g stays as it is.

The trainer clips before. That leaves the projection as it would be: a projection on a cone turns c g into c times what it
makes of g, and never makes it longer. The margin is not of g's scale, though: it adds `margin` times the memories' gradients,
unclipped, so that for a gradient that was clipped by c it is what `margin / c` would be for the whole one.

Shapes: K earlier tasks. A gradient is a list of tensors, one for each parameter.
"""

import random
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer

from hftcli.methods.method import Method, draw_rows
from hftcli.recipe.methods import AgemSection, GemSection

Gradient = list[torch.Tensor]


class EpisodicMemory(Method, ABC):
    """Rows of the earlier tasks, and the model's gradients on some of them."""

    section: GemSection | AgemSection

    @property
    def needed_tasks(self) -> tuple[str, ...]:
        """All earlier tasks: their rows are remembered."""
        return self.earlier_tasks

    def prepare_rows(self, dataset: Dataset, rows: dict[str, Dataset]) -> Dataset:
        """Draw what is remembered; the rows to train on stay as they are."""
        self.memories = [
            draw_rows(rows[task], self.section.num_examples, task, self.spec.train.seed) for task in self.earlier_tasks
        ]
        self.random = random.Random(f"{self.spec.train.seed}/{self.spec.index}")
        return dataset

    def recall(self) -> Any:
        """The state of what draws from memory."""
        return self.random.getstate()

    def restore(self, recalled: Any) -> None:
        """Draw on as the stopped round would have."""
        self.random.setstate(recalled)

    def change_gradient(self, trainer: Trainer) -> None:
        """Lay the projected gradient in; in the first round, where nothing is remembered, leave it."""
        if not self.memories:
            return
        parameters = [value for value in trainer.model.parameters() if value.grad is not None]
        changed = self.project(trainer, parameters, [value.grad for value in parameters])
        for parameter, gradient in zip(parameters, changed, strict=True):
            parameter.grad.copy_(gradient)

    @abstractmethod
    def project(self, trainer: Trainer, parameters: list[torch.nn.Parameter], gradient: Gradient) -> Gradient:
        """The gradient that the step is to take."""

    def compute_gradient(self, trainer: Trainer, parameters: list[torch.nn.Parameter], rows: Dataset) -> Gradient:
        """The gradient of the loss on `batch_size` rows, drawn anew in every step."""
        drawn = self.random.sample(range(len(rows)), min(self.section.batch_size, len(rows)))
        batch = trainer.move_batch(trainer.data_collator([rows[place] for place in drawn]))
        with trainer.compute_loss_context_manager():
            loss = trainer.model(**batch).loss
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


class Gem(EpisodicMemory):
    """GEM: the gradient is kept from raising the loss on what is remembered of each earlier task."""

    section: GemSection

    def project(self, trainer: Trainer, parameters: list[torch.nn.Parameter], gradient: Gradient) -> Gradient:
        """The closest gradient in the cone that raises the loss of no earlier task."""
        memories = [self.compute_gradient(trainer, parameters, rows) for rows in self.memories]
        return project_on_cone(gradient, memories, self.section.margin)


def project_on_cone(gradient: Gradient, memories: list[Gradient], margin: float) -> Gradient:
    """The gradient closest to `gradient` that has no negative product with any of `memories`, and `margin` times these on top.

    Args:
        margin: gamma of section 3 of the paper, added to each of the dual's variables; at least 0.
    """
    products_K = np.array([multiply(memory, gradient) for memory in memories])
    if products_K.min() >= 0:
        return gradient
    gram_KK = np.array([[multiply(first, second) for second in memories] for first in memories])
    weights_K = solve_dual(gram_KK, products_K) + margin
    return [
        part + sum(weight * memory[place] for weight, memory in zip(weights_K.tolist(), memories, strict=True))
        for place, part in enumerate(gradient)
    ]


def solve_dual(gram_KK: np.ndarray, products_K: np.ndarray) -> np.ndarray:
    """The v >= 0 that minimizes v' gram v / 2 + products' v, exactly: the active-set method of Lawson and Hanson.

    Args:
        gram_KK: products of the memories' gradients with one another; positive semidefinite.
        products_K: their products with the gradient of the step.
    """

    def measure(weights_K: np.ndarray) -> float:
        return weights_K @ gram_KK @ weights_K / 2 + products_K @ weights_K

    best_K = weights_K = np.zeros(len(products_K))
    is_free_K = np.zeros(len(products_K), dtype=bool)
    while True:
        gains_K = np.where(is_free_K, 0.0, -(gram_KK @ weights_K + products_K))
        if gains_K.max() <= 0:
            return best_K
        is_free_K[gains_K.argmax()] = True
        while True:
            aims_K = np.zeros(len(products_K))
            aims_K[is_free_K] = np.linalg.lstsq(gram_KK[np.ix_(is_free_K, is_free_K)], -products_K[is_free_K])[0]
            is_blocked_K = is_free_K & (aims_K <= 0)
            if not is_blocked_K.any():
                break
            # As far towards the aim as none becomes negative; the one that is stopped at zero is free no more.
            reach_K = np.full(len(products_K), np.inf)
            gaps_K = np.maximum(weights_K - aims_K, np.finfo(float).tiny)  # both may be zero
            reach_K[is_blocked_K] = weights_K[is_blocked_K] / gaps_K[is_blocked_K]
            weights_K = weights_K + reach_K.min() * (aims_K - weights_K)
            is_free_K &= reach_K > reach_K.min()
            weights_K[~is_free_K] = 0
        weights_K = aims_K
        if measure(weights_K) >= measure(best_K):  # what is left to gain is below the rounding
            return best_K
        best_K = weights_K


def multiply(first: Gradient, second: Gradient) -> float:
    """The inner product of two gradients."""
    return sum(torch.dot(a.flatten().float(), b.flatten().float()).item() for a, b in zip(first, second, strict=True))
