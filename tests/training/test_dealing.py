"""Rows are dealt so that a step is the same on any number of ranks."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler

from hftcli.training.dealing import (
    NO_ROW,
    EvenBatches,
    FillingCollator,
    GroupedSampler,
    Part,
    count_rows,
    deal_batches,
    gathering,
    make_filler,
)


def deal(num_rows: int, batch_size: int, num_ranks: int) -> list[list[list[int]]]:
    """By micro-batch, the rows of each rank."""
    parts = [list(EvenBatches(SequentialSampler(range(num_rows)), batch_size, num_ranks, rank)) for rank in range(num_ranks)]
    return [list(micro_batch) for micro_batch in zip(*parts, strict=True)]


def test_the_last_micro_batch_is_shared():
    assert deal(8, 2, 2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert deal(7, 2, 2) == [[[0, 1], [2, 3]], [[4, 5], [6]]]
    assert deal(6, 2, 2) == [[[0, 1], [2, 3]], [[4], [5]]]
    assert deal(5, 2, 2) == [[[0, 1], [2, 3]], [[4], []]]
    assert deal(3, 2, 4) == [[[0], [1], [2], []]]
    assert deal(5, 4, 1) == [[[0, 1, 2, 3]], [[4]]]


@pytest.mark.parametrize("num_rows", range(1, 20))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_step_holds_the_same_rows_on_any_number_of_ranks(num_rows, num_ranks):
    """A global batch of 12, in micro-batches of 12 over the ranks and of 4, of 6 or of 3 on each."""
    for batch_size in {12 // num_ranks, 1}:
        num_parts = 12 // (batch_size * num_ranks)
        dealt = deal(num_rows, batch_size, num_ranks)
        steps = [dealt[start : start + num_parts] for start in range(0, len(dealt), num_parts)]
        held = [[row for micro_batch in step for part in micro_batch for row in part] for step in steps]
        assert held == [list(range(start, min(start + 12, num_rows))) for start in range(0, num_rows, 12)]
        assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in dealt)
        assert len(EvenBatches(range(num_rows), batch_size, num_ranks, 0)) == len(dealt)


def test_the_order_of_an_epoch_is_the_same_on_every_rank():
    def list_rows(epoch: int, num_ranks: int) -> list[int]:
        parts = []
        for rank in range(num_ranks):
            sampler = SeedableRandomSampler(range(24), data_seed=7)
            sampler.set_epoch(epoch)
            parts.append(list(EvenBatches(sampler, 2, num_ranks, rank)))
        return [row for micro_batch in zip(*parts, strict=True) for part in micro_batch for row in part]

    assert list_rows(0, 1) == list_rows(0, 2) == list_rows(0, 3) != list_rows(1, 1)
    assert list_rows(1, 1) == list_rows(1, 4)


@pytest.fixture
def loader() -> DataLoader:
    """Seven rows as transformers prepares them, one epoch in."""
    rows = Dataset.from_list([{"input_ids": [row + 1] * (row + 1), "labels": [row + 1] * (row + 1)} for row in range(7)])
    plain = DataLoader(
        rows, 2, shuffle=True, collate_fn=lambda rows: {"labels": torch.tensor([len(row["labels"]) for row in rows])}
    )
    prepared = prepare_data_loader(plain, put_on_device=False, use_seedable_sampler=True, data_seed=3)
    prepared.set_epoch(1)
    return prepared


def list_labels(loader: DataLoader) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in loader]


def test_a_loader_is_dealt_and_gone_on_with(loader):
    whole = [label for batch in list_labels(loader) for label in batch]
    assert sorted(whole) == list(range(1, 8))
    for rank, parts in enumerate(([whole[0:2], whole[4:6]], [whole[2:4], whole[6:]])):
        loader.set_epoch(1)
        dealt = deal_batches(loader, 2, 2, rank)
        dealt.set_epoch(1)
        assert list_labels(dealt) == parts
        rest = skip_first_batches(dealt, 1)
        rest.set_epoch(1)
        assert list_labels(rest) == parts[1:]


def test_rows_of_like_length_are_grouped_alike_in_every_epoch_of_that_number():
    lengths = [13 * row % 64 for row in range(64)]
    first, second = GroupedSampler(lengths, 4, 7), GroupedSampler(lengths, 4, 7)
    orders = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        orders.append(list(first))
        assert orders[-1] == list(second)
        assert sorted(orders[-1]) == list(range(64))
        steps = [[lengths[row] for row in orders[-1][start : start + 4]] for start in range(4, 64, 4)]
        assert sum(max(step) - min(step) for step in steps) / len(steps) < 20  # some 38 where they are not grouped
    assert orders[0] != orders[1]


def test_a_row_that_stands_in_counts_for_nothing():
    row, pair = (
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "row": 4},
    )
    assert make_filler(row) == {"input_ids": [1, 2], "labels": [-100, -100]}
    assert make_filler(pair) == {**pair, "row": NO_ROW}
    collate = FillingCollator(lambda rows: {"row": torch.tensor([row["row"] for row in rows])}, make_filler(pair))
    assert count_rows(collate([])) == 0
    assert count_rows(collate([pair, pair])) == 2
    assert count_rows({"labels": torch.tensor([[-100, 5], [-100, -100]])}) == 1
    assert count_rows({"labels": torch.full((1, 3), -100)}) == 0


class Gatherer:
    """As the accelerator of two ranks, of which the other has 1, 2, 3, ... or a sum of 10."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        other = torch.arange(1, values.numel() + 1) if values.dim() else torch.tensor(10)
        return torch.cat([values.view(-1), other.view(-1)])


def test_metrics_are_gathered_of_the_rows_that_count():
    accelerator = Gatherer()
    with gathering(accelerator, Part([3, 2], 0, 1.0)):
        assert accelerator.gather(torch.tensor([7, 8, 9])).tolist() == [7, 8, 9, 1, 2]
        assert accelerator.gather(torch.tensor(5)).tolist() == [5, 10]
    with gathering(accelerator, Part([0, 1], 0, 1.0)):  # this rank's only row stands in
        assert accelerator.gather(torch.tensor([7])).tolist() == [1]
        assert accelerator.gather(torch.tensor(5)).tolist() == [0, 10]
    assert accelerator.gather(torch.tensor([7])).tolist() == [7, 1]
