"""The rows of one source on their way in: read, brought into canonical form, and the bad ones set aside.

Every fault names the file, the row and the field. One bad row does not hide the next: they are counted, and the first ten are
named together.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from hftcli.data.formats import FORMATS, Row, convert_row, detect_format, is_conversation
from hftcli.data.patterns import PATTERN, convert_labelled, make_choices
from hftcli.data.sources import Place, find_places
from hftcli.data.turns import Lost, check_type
from hftcli.errors import DataError
from hftcli.recipe.pattern import PatternSection
from hftcli.recipe.recipe import Objective
from hftcli.recipe.sections import DataSection
from hftcli.tasks.examples import Task

logger = logging.getLogger(__name__)

NUM_NAMED = 10  # bad rows that a message names


def detect_objective(data: DataSection) -> Objective:
    """What rows are for, by the columns of the first: preference pairs where they are of no other format.

    Raises:
        DataError: there are no rows, or they are of no format.
    """
    if data.pattern is not None:
        return "sft"
    place = find_places(data)[0]
    first = next((row for row in place.read() if isinstance(row, dict)), None)
    if first is None:
        raise DataError(f"{place.name}: there are no rows in it")
    is_pair = {"chosen", "rejected"} <= first.keys() and not any(
        set(known.columns) <= first.keys() for known in FORMATS.values() if known.objective == "sft"
    )
    return "dpo" if is_pair else "sft"


class Faults:
    """The bad rows of one source, which are numbered from 1 through all of its files."""

    def __init__(self, place: str):
        self.place = place
        self.rows: set[int] = set()
        self.named: list[DataError] = []
        self.files: list[tuple[int, str]] = []  # those that are begun: the rows before each, and its name

    def begin(self, file: str, num_before: int) -> None:
        """The rows that follow are of another file."""
        self.files.append((num_before, file))

    def name(self, number: int) -> str:
        """A row by its file and its place there, as people look it up."""
        before, file = next(part for part in reversed(self.files or [(0, self.place)]) if part[0] < number)
        return f"{file}: row {number - before}"

    def add(self, number: int, error: DataError) -> None:
        """Set a row aside."""
        self.rows.add(number)
        if len(self.named) < NUM_NAMED:
            self.named.append(error)

    @contextmanager
    def catching(self, number: int) -> Iterator[None]:
        """Set a row aside when something is wrong with it."""
        try:
            yield
        except DataError as error:
            self.add(number, DataError(f"{self.name(number)}: {error.message}", error.fix))

    def refuse(self, num_rows: int) -> None:
        """Raises: DataError: there is a bad row; it names the first of them."""
        if len(self.rows) == 1:
            [error] = self.named
            fix = (
                f"{error.fix}; or leave it out with data.bad_rows: drop" if error.fix else "mend it, or set data.bad_rows: drop"
            )
            raise DataError(error.message, fix)
        if self.rows:
            first = f"; the first {NUM_NAMED}" if len(self.rows) > NUM_NAMED else ""
            lines = [f"{self.place}: {len(self.rows):,} of {num_rows:,} rows cannot be trained on{first}:"]
            lines += [f"{error.message} ({error.fix})" if error.fix else error.message for error in self.named]
            raise DataError("\n".join(lines), "mend them, or leave them out with data.bad_rows: drop")


def say_left_out(place: str, num_bad: int, first: str) -> None:
    """Say how many bad rows are left out, and what is wrong with the first."""
    logger.warning("%s: %d bad rows are left out; the first: %s", place, num_bad, first)


class RowReader:
    """The good rows of a source, with their numbers from 1.

    Attributes:
        format: the name of the format they have, from the first row on.
        num_rows: rows read, bad ones too.
    """

    def __init__(self, place: Place, objective: Objective, faults: Faults, lost: Lost, pattern: PatternSection | None = None):
        self.pattern = pattern
        self.place = place
        self.objective = objective
        self.faults = faults
        self.lost = lost
        self.format = PATTERN if pattern is not None else ""
        self.num_rows = 0

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Raises: DataError: the source has no rows, they are of no known format, or it does not read."""
        first: tuple[int, bool] | None = None  # number of the first good row, and whether it is a conversation
        for number, found in enumerate(islice(self._read(), self.place.source.max_examples), start=1):
            self.num_rows = number
            row = self._convert(number, found)
            if row is None:
                continue
            first = first or (number, is_conversation(row))
            if is_conversation(row) != first[1]:
                kinds = ("plain text", "messages") if first[1] else ("messages", "plain text")
                name = self.faults.name(number)
                other = self.faults.name(first[0]).removeprefix(name.rpartition("row ")[0])  # the file, where it is the same
                self.faults.add(number, DataError(f"{name}: it holds {kinds[0]}, and {other} {kinds[1]}"))
                continue
            yield number, row
        if not self.num_rows:
            raise DataError(f"{self.place.name}: there are no rows in it")

    def _read(self) -> Iterator[Row | DataError]:
        for file, rows in self.place.read_parts():
            self.faults.begin(file, self.num_rows)
            yield from rows

    def _convert(self, number: int, found: Row | DataError) -> Row | None:
        if isinstance(found, DataError):
            self.faults.add(number, found)
            return None
        if isinstance(found, dict) and not self.format:
            try:
                self.format = detect_format(list(found), self.objective)
            except DataError as error:
                raise DataError(f"{self.faults.name(number)}: {error.message}", error.fix) from None
        with self.faults.catching(number):
            check_type(found, dict, "a row")
            if self.pattern is not None:
                return convert_labelled(found, self.pattern, self.lost)
            return convert_row(found, self.format, self.lost)
        return None


def read_choices(name: str, data: DataSection) -> Task:
    """The rows of all sources as multiple choice between the words of the labels of `data.pattern`.

    Raises:
        DataError: rows are bad and `data.bad_rows` does not drop them, or none is left.
    """
    assert data.pattern is not None
    rows: list[Row] = []
    for place in find_places(data):
        faults = Faults(place.name)
        reader = RowReader(place, "sft", faults, Lost(data.ignore_columns), data.pattern)
        rows += [row for _, row in reader]
        if data.bad_rows == "refuse":
            faults.refuse(reader.num_rows)
        if faults.rows:
            say_left_out(place.name, len(faults.rows), faults.named[0].message)
    if not rows:
        raise DataError(f"{data.path}: none of the rows can be asked: {faults.named[0].message}")
    return make_choices(name, rows, data.pattern)
