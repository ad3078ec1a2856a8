"""Replay: some rows of the earlier tasks are trained on again.

Mixed in, they stand among the rows of the task in every epoch. After the task, as TRACE does (arXiv 2310.06762), they are gone
through once when the last epoch is over, by the same optimizer and on the same schedule of the learning rate.
"""

import datasets
import numpy as np
from datasets import Dataset
from transformers import TrainingArguments

from hftcli.methods.method import Method, draw_rows
from hftcli.recipe.methods import ReplaySection
from hftcli.recipe.sections import TrainSection


class Replay(Method):
    """Rows of earlier tasks, among those of the task or after them."""

    section: ReplaySection

    @property
    def needed_tasks(self) -> tuple[str, ...]:
        """All earlier tasks, and the one that is replayed in every round."""
        return (*self.earlier_tasks, *([self.section.extra] if self.section.extra else []))

    def prepare_rows(self, dataset: Dataset, rows: dict[str, Dataset]) -> Dataset:
        """The rows to train on, with a share of every earlier task's; after the task, in the order of training."""
        if not self.needed_tasks:
            return dataset
        seed, data_seed = self.spec.train.seed, self.spec.train.extra.get("data_seed")
        order_seed = seed if data_seed is None else data_seed  # as transformers takes them
        shares = {task: max(round(self.section.fraction * len(rows[task])), 1) for task in self.earlier_tasks}
        replayed = [draw_rows(rows[task], num_rows, task, seed) for task, num_rows in shares.items()]
        if self.section.extra:
            replayed.append(rows[self.section.extra])
        if self.section.when == "after":
            dataset = dataset.select(order_passes(len(dataset), self.spec.train, order_seed))
            # Kept in memory: else it is written beside the tokens of an earlier task, in the cache.
            replayed = [datasets.concatenate_datasets(replayed).shuffle(order_seed, keep_in_memory=True)]
        return datasets.concatenate_datasets([dataset, *replayed])

    def set_arguments(self, args: TrainingArguments) -> None:
        """After the task: the rows stand in the order in which they are trained on, every pass over the task spelled out."""
        if self.section.when == "after" and self.needed_tasks:
            args.num_train_epochs = 1
            args.max_steps = -1
            args.train_sampling_strategy = "sequential"


def order_passes(num_rows: int, train: TrainSection, seed: int) -> np.ndarray:
    """Row numbers in the order of training, pass after pass, each in a random order of its own.

    With `max_steps` they are as many as these steps take, otherwise `num_train_epochs` times all.
    """
    num_drawn = train.max_steps * train.global_batch_size if train.max_steps > 0 else round(train.num_train_epochs * num_rows)
    generator = np.random.default_rng(seed)
    passes = [generator.permutation(num_rows) for _ in range(-(-num_drawn // num_rows))]
    return np.concatenate(passes)[:num_drawn]
