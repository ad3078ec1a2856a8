"""The rows of one source as tokens on disk: a batch at a time, so that they need not fit into memory, and counted."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import find_switches
from hftcli.data.encoding import EncodedRow, RowEncoder
from hftcli.data.formats import Row
from hftcli.data.rows import Faults, RowReader
from hftcli.data.shards import ShardWriter, open_shards
from hftcli.data.sources import Place
from hftcli.data.tokens import IGNORED, PAIR_FEATURES, TOKEN_FEATURES, Columns, Progress, Tokens
from hftcli.data.turns import Lost
from hftcli.errors import DataError
from hftcli.recipe.recipe import Objective
from hftcli.recipe.sections import DataSection, TrainSection


@dataclass
class Tally:
    """What became of the rows of one source."""

    format: str = ""
    num_rows: int = 0
    num_used: int = 0
    num_truncated: int = 0
    num_identical: int = 0
    num_special: int = 0
    doubled: Counter[str] = field(default_factory=Counter)
    special_tokens: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)
    num_bad: int = 0
    unused: list[str] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)  # of `train`, those that say what is trained of some row

    def watch(self, rows: Iterable[tuple[int, Row]], train: TrainSection) -> Iterator[tuple[int, Row]]:
        """The same numbered rows, with the switches noted that they have a use for."""
        for number, row in rows:
            self.switches |= find_switches(row, train)
            yield number, row

    def note(self, row: EncodedRow) -> None:
        """Count what a row brought."""
        self.doubled.update(row.findings.doubled)
        self.special_tokens.update(row.findings.special)
        self.num_special += bool(row.findings.special)


def tokenize_source(
    place: Place,
    data: DataSection,
    train: TrainSection,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    on_progress: Progress,
) -> tuple[Dataset, Tally]:
    """Tokenize the rows of a source into files of a folder.

    Raises:
        DataError: rows are bad and `data.bad_rows` does not drop them, or none is left.
    """
    tally, faults, lost = Tally(), Faults(place.name), Lost(data.ignore_columns)
    reader = RowReader(place, objective, faults, lost, data.pattern)
    encoder = RowEncoder(tokenizer, data, train, faults)
    is_pairs = objective == "dpo"
    writer = ShardWriter(folder, PAIR_FEATURES if is_pairs else TOKEN_FEATURES)
    total = place.count_rows()
    on_progress(0, total or 0)
    for batch in encoder.encode(tally.watch(reader, train)):
        columns: Columns = {name: [] for name in writer.features}
        for row in batch:
            tally.note(row)
            keep = keep_pair if is_pairs else keep_pieces if reader.format == "text" else keep_row
            keep(row.sequences, data, tally, columns)
        writer.write(columns)
        on_progress(reader.num_rows, max(total or 0, reader.num_rows))
    writer.close()
    if data.bad_rows == "refuse":
        faults.refuse(reader.num_rows)
    tally.format, tally.num_rows, tally.num_bad = reader.format, reader.num_rows, len(faults.rows)
    tally.bad_rows = [error.message for error in faults.named]
    tally.unused = sorted(lost.unused)
    if not writer.num_rows:
        raise _describe_nothing(place.name, tally, data.max_length, is_pairs)
    return open_shards(folder), tally


def _describe_nothing(place: str, tally: Tally, max_length: int, is_pairs: bool) -> DataError:
    if tally.num_bad == tally.num_rows:
        return DataError(f"{place}: none of the {tally.num_rows:,} rows can be trained on: {tally.bad_rows[0]}")
    kind, what = ("pairs", "two answers") if is_pairs else ("rows", "a trained token")
    num_good = tally.num_rows - tally.num_bad
    return DataError(
        f"{place}: none of the {num_good} {kind} has {what} among its first {max_length} tokens", "raise data.max_length"
    )


def keep_row(sequences: list[Tokens], data: DataSection, tally: Tally, columns: Columns) -> None:
    """Cut a row to `data.max_length`, and drop it where that leaves nothing to train."""
    [(ids, labels)] = sequences
    tally.lengths.append(len(ids))
    labels = labels[: data.max_length]
    if (labels != IGNORED).any():
        columns["input_ids"].append(ids[: data.max_length])
        columns["labels"].append(labels)
        tally.num_used += 1
        tally.num_truncated += len(labels) < len(ids)


def keep_pieces(sequences: list[Tokens], data: DataSection, tally: Tally, columns: Columns) -> None:
    """Divide a text into pieces of `data.max_length`.

    A piece begins with the last token of the one before, from which the first of its own is predicted: every token is trained
    once.
    """
    [(ids, labels)] = sequences
    tally.lengths.append(len(ids))
    tally.num_used += 1
    for start in range(0, max(len(ids) - 1, 1), data.max_length - 1):
        piece = labels[start : start + data.max_length].copy()
        if start:
            piece[0] = IGNORED
        columns["input_ids"].append(ids[start : start + data.max_length])
        columns["labels"].append(piece)


def keep_pair(sequences: list[Tokens], data: DataSection, tally: Tally, columns: Columns) -> None:
    """Cut a pair to `data.max_length`, and drop it where its prompt leaves no room for an answer."""
    prompt, *answers = split_sequences(*sequences)
    room = max(data.max_length - len(prompt), 0)
    cut = [answer[:room] for answer in answers]
    tally.lengths += [len(prompt) + len(answer) for answer in answers]
    if not room:
        return
    is_identical = cut[0] == cut[1]
    tally.num_identical += is_identical
    if is_identical and data.drop_identical:
        return
    tally.num_used += 1
    tally.num_truncated += cut != answers
    for name, ids in zip(columns, (prompt, *cut), strict=True):
        columns[name].append(ids)


def split_sequences(chosen: Tokens, rejected: Tokens) -> tuple[list[int], list[int], list[int]]:
    """The tokens that both sequences begin with and neither trains, and the rest of each up to its last trained token."""
    (chosen_ids, chosen_labels), (rejected_ids, rejected_labels) = chosen, rejected
    trained = [(labels != IGNORED).nonzero()[0] for labels in (chosen_labels, rejected_labels)]
    border = min(trained[0][0], trained[1][0])
    # A token may straddle the border in one of them only.
    border = next((i for i in range(border) if chosen_ids[i] != rejected_ids[i]), int(border))
    return chosen_ids[:border], chosen_ids[border : trained[0][-1] + 1], rejected_ids[border : trained[1][-1] + 1]
