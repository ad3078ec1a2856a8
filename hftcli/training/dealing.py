"""Rows dealt to the ranks so that a recipe means the same on 1 and on 64 of them.

Where the rows of an epoch do not divide by the ranks, transformers trains on some of the first ones again, and TRL takes every
micro-batch of pairs for as large as any other. Here each row counts once in an epoch, and the loss of a step is the mean over
the tokens, or the pairs, that are really in it. A rank that is left without a row passes all the same, on one that counts for
nothing: the ranks meet in every pass.

Shapes: B, rows of a rank's micro-batch; W, ranks.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

IGNORED = -100  # the label of a token that is not trained
NO_ROW = -1  # the place of a pair that counts for nothing, and of a token that is not trained

Batch = dict[str, Any]
Example = dict[str, Any]


class EvenBatches(Sampler[list[int]]):
    """One rank's part of every micro-batch; an empty one where there are fewer rows than ranks.

    Args:
        sampler: the rows' order, the same on every rank.
        batch_size: rows of a rank's micro-batch, but for the last, which all ranks share as evenly as it goes.
    """

    def __init__(self, sampler: Collection[int], batch_size: int, num_ranks: int, rank: int):
        self.sampler = sampler  # accelerate tells it the epoch
        self.batch_size = None  # they are of several sizes
        self.num_rows = batch_size * num_ranks
        self.num_ranks = num_ranks
        self.rank = rank

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.num_rows)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.sampler)
        for start in range(0, len(rows), self.num_rows):
            yield share_rows(rows[start : start + self.num_rows], self.num_ranks, self.rank)


class GroupedSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that the seed and the epoch alone decide.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step over all ranks.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        self.generator.manual_seed(self.seed + epoch)


def share_rows(rows: list[int], num_ranks: int, rank: int) -> list[int]:
    """A rank's part of some rows: each takes as many in a row as any other, or one more."""
    size, num_larger = divmod(len(rows), num_ranks)
    start = rank * size + min(rank, num_larger)
    return rows[start : start + size + (rank < num_larger)]


@dataclass(frozen=True)
class FillingCollator:
    """Makes a batch of a row that counts for nothing where a rank has none.

    Attributes:
        collate: makes a batch of rows.
        filler: the row that stands in.
    """

    collate: Callable[[list[Example]], Batch]
    filler: Example

    def __call__(self, examples: list[Example]) -> Batch:
        """The batch of a rank's rows, or of the one that stands in for them."""
        return self.collate(examples or [self.filler])


@dataclass(frozen=True)
class PlacingCollator:
    """Says of each trained token of which row of the dataset it is, where the rows know their places.

    Attributes:
        collate: TRL's.
    """

    collate: DataCollatorForLanguageModeling

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with `places` (B, T), -1 where nothing is trained."""
        batch = self.collate(examples)
        if "place" not in examples[0]:
            return batch
        places_BT = torch.full_like(batch["labels"], NO_ROW)
        first = 0
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            if self.collate.padding_free:  # all rows of the batch are laid into one sequence
                places_BT[0, first : first + length] = example["place"]
                first += length
            else:
                places_BT[row, :length] = example["place"]
        return {**batch, "places": places_BT.masked_fill(batch["labels"] == IGNORED, NO_ROW)}


def make_filler(example: Example) -> Example:
    """A row of which nothing is trained, or a pair that has no place among the others."""
    if "labels" in example:
        return {**example, "labels": [IGNORED] * len(example["labels"])}
    return {**example, "row": NO_ROW}


def deal_batches(loader: DataLoaderShard, batch_size: int, num_ranks: int, rank: int) -> DataLoaderShard:
    """The batches that transformers prepared, dealt evenly."""
    names = (
        "num_workers", "pin_memory", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "persistent_workers",
        "in_order",
    )  # fmt: skip
    return DataLoaderShard(
        loader.dataset,
        device=loader.device,
        batch_sampler=EvenBatches(loader.get_sampler(), batch_size, num_ranks, rank),
        collate_fn=FillingCollator(loader.collate_fn, make_filler(loader.dataset[0])),
        **{name: getattr(loader, name) for name in names},
    )


@dataclass(frozen=True)
class Part:
    """What of a step a micro-batch is.

    Attributes:
        num_rows_W: rows, or pairs, that each rank has in it.
        rank: this one.
        fraction: this rank's share of the step's rows, over what it would be if all micro-batches of all ranks were alike.
    """

    num_rows_W: list[int]
    rank: int
    fraction: float

    @property
    def num_rows(self) -> int:
        """Rows, or pairs, of this rank."""
        return self.num_rows_W[self.rank]


class DealingTrainer(Trainer):
    """To stand before one of TRL's trainers among a class's bases: each row counts once in an epoch.

    Attributes:
        part: what the micro-batch at hand is; None outside of a step.
    """

    part: Part | None = None

    def get_train_dataloader(self) -> DataLoaderShard:
        """This rank's batches of an epoch."""
        loader = super().get_train_dataloader()
        if self.args.train_sampling_strategy == "group_by_length":
            num_rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            loader.set_sampler(GroupedSampler(list(map(len, loader.dataset["input_ids"])), num_rows, seed))
        if self.args.world_size == 1:
            return loader
        return deal_batches(loader, self.args.train_batch_size, self.args.world_size, self.args.process_index)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """A step's micro-batches, each with what part of the step it is."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_rows = torch.tensor([count_rows(batch) for batch in batches], device=device)
        num_rows_WA = self.accelerator.gather(num_rows).view(self.args.world_size, -1).tolist()
        num_parts = sum(map(len, num_rows_WA))
        num_step_rows = sum(map(sum, num_rows_WA))
        for batch, *num_rows_W in zip(batches, *num_rows_WA, strict=True):
            rank = self.args.process_index
            batch["part"] = Part(num_rows_W, rank, num_rows_W[rank] * num_parts / num_step_rows)
        return batches, num_items_in_batch

    def training_step(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward and the backward pass of a micro-batch."""
        inputs = dict(inputs)
        self.part = inputs.pop("part")
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.part = None

    def compute_loss(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A micro-batch's part of the step's loss, which the trainer adds up and averages over the ranks."""
        if self.part is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with gathering(self.accelerator, self.part):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        # The tokens of a step are counted by transformers already; where they are not, a loss is the mean of its micro-batch.
        is_mean = "labels" not in inputs
        return loss * self.part.fraction if is_mean or not self.part.num_rows else loss


def count_rows(batch: Batch) -> int:
    """Pairs that count; of a batch of rows, whether any does."""
    if "row" in batch:
        return int((batch["row"] != NO_ROW).sum())
    return int((batch["labels"] != IGNORED).any())


@contextmanager
def gathering(accelerator: Accelerator, part: Part) -> Iterator[None]:
    """While TRL gathers its metrics of a micro-batch, leave out what counts for nothing, and let the ranks' parts differ."""
    if len(set(part.num_rows_W)) == 1:
        yield
        return
    gather, most = accelerator.gather, max(part.num_rows_W)

    def gather_parts(values: torch.Tensor) -> torch.Tensor:
        if not values.dim():  # a sum over the micro-batch
            return gather(values if part.num_rows else torch.zeros_like(values))
        padded_B = values.new_zeros(most)
        padded_B[: part.num_rows] = values[: part.num_rows]
        values_WB = gather(padded_B).view(-1, most)
        return torch.cat([values_B[:count] for values_B, count in zip(values_WB, part.num_rows_W, strict=True)])

    accelerator.gather = gather_parts
    try:
        yield
    finally:
        del accelerator.gather
