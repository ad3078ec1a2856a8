"""With which token the answers end that are trained: read off the tokens themselves, whatever rendered them."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hftcli.data.tokens import IGNORED

BATCH_ROWS = 1000
MOST_BLANKS = 4  # trained behind an end token, where all of a conversation is trained: a line's end or two
LEAST_SHARE = 0.01  # of the answers: what ends fewer of them is a part of these answers


def find_trained_ends(rows: Dataset, max_length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens with which trained answers end, the most frequent first: special and added ones, since others are text.

    Args:
        rows: as `prepare_dataset`, `prepare_pairs` and `prepare_task` give them.
        max_length: tokens to which rows were cut; one that is as long tells nothing of its end.
    """
    names = set(tokenizer.get_added_vocab().values())

    @cache
    def is_blank(token: int) -> bool:
        return token not in names and not tokenizer.decode([token]).strip()

    counts: Counter[int] = Counter()
    for table in rows.with_format("arrow").iter(BATCH_ROWS):
        for trained, borders, lengths in _list_answers(table):
            counts.update(_find_last(trained, borders, lengths < max_length, is_blank))
    known = {token: count for token, count in counts.items() if token in names}
    return tuple(token for token, count in Counter(known).most_common() if count >= LEAST_SHARE * counts.total())


def _list_answers(table: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Labels of all rows one after another, the borders between rows, and the length of each with its prompt."""
    columns = set(table.column_names)
    for name in ("labels",) if "labels" in columns else ("chosen_ids", "rejected_ids"):
        column = table.column(name).combine_chunks()
        lengths = pc.list_value_length(column).to_numpy()
        if "seq_lengths" in columns:  # rows that are packed
            lengths = pc.list_flatten(table.column("seq_lengths").combine_chunks()).to_numpy()
        whole = lengths
        if "prompt_ids" in columns:
            whole = lengths + pc.list_value_length(table.column("prompt_ids").combine_chunks()).to_numpy()
        yield pc.list_flatten(column).to_numpy(), np.concatenate([[0], np.cumsum(lengths)]), whole


def _find_last(labels: np.ndarray, borders: np.ndarray, is_whole: np.ndarray, is_blank: Callable[[int], bool]) -> list[int]:
    """The last trained token that is no blank, of each row that is whole."""
    places = np.flatnonzero(labels != IGNORED)
    found = []
    for first, last, whole in zip(borders[:-1], borders[1:], is_whole, strict=True):
        if not whole:
            continue
        end = np.searchsorted(places, last) - 1
        for place in places[max(end - MOST_BLANKS, -1) + 1 : end + 1][::-1]:
            token = int(labels[place])
            if place >= first and not is_blank(token):
                found.append(token)
                break
    return found
