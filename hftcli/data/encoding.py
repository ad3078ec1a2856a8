"""Canonical rows to tokens, a batch at a time: tidied, rendered, tokenized, labelled, and the bad ones set aside.

Every format goes one way. A preference pair goes it twice, once with each answer.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import Rendering, render_row
from hftcli.data.formats import Row
from hftcli.data.rows import Faults
from hftcli.data.special import Escaping, Findings, SpecialTokens
from hftcli.data.templates import find_template
from hftcli.data.tokens import IGNORED, Tokens, get_backend, label_tokens
from hftcli.errors import DataError
from hftcli.recipe.sections import DataSection, TrainSection

logger = logging.getLogger(__name__)

NO_SWITCH = ", or set train.assistant_only_loss: false"  # what a fix ends with where rows are trained on by `train`
BATCH_ROWS, BATCH_CHARACTERS = 1000, 1_000_000  # tokenized at once; the tokenizer spreads them over the cores


@dataclass(frozen=True)
class RenderedRow:
    """The text of a row, of a pair's with each answer, and the row's number."""

    number: int
    renderings: list[Rendering]
    findings: Findings


@dataclass(frozen=True)
class EncodedRow:
    """The tokens of a row, whole: one sequence, or of a pair one with each answer."""

    sequences: list[Tokens]
    findings: Findings


class RowEncoder:
    """What makes tokens of the rows of one source.

    Args:
        faults: where bad rows are set aside. Where those are refused, nothing is tokenized any more after the first, and the
            others are only looked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection, train: TrainSection, faults: Faults):
        self.tokenizer = tokenizer
        self.backend = get_backend(tokenizer)
        self.template = find_template(tokenizer)
        self.data = data
        self.train = train
        self.faults = faults
        self.special = SpecialTokens(tokenizer, self.template)
        self.escaping = Escaping(self.special)
        self.is_first = True

    def encode(self, rows: Iterable[tuple[int, Row]]) -> Iterator[list[EncodedRow]]:
        """The tokens of numbered rows, in batches."""
        batch: list[RenderedRow] = []
        num_characters = 0
        for number, row in rows:
            if rendered := self._render(number, row):
                batch.append(rendered)
                num_characters += sum(len(rendering.text) for rendering in rendered.renderings)
            if len(batch) == BATCH_ROWS or num_characters >= BATCH_CHARACTERS:
                yield self._encode_batch(batch)
                batch, num_characters = [], 0
        yield self._encode_batch(batch)

    def _render(self, number: int, row: Row) -> RenderedRow | None:
        policy = self.data.special_tokens_in_text
        with self.faults.catching(number):
            row, findings = self.special.tidy(row)
            if findings.special and policy == "refuse":
                raise DataError(f"its text holds the special tokens {', '.join(sorted(findings.special))}")
            if findings.special and policy == "escape":
                row = self.escaping.hide(row)
            parts = split_pair(row)
            renderings = [render_row(part, self.tokenizer, self.template, self.train) for part in parts]
            _check_preference([rendering.text for rendering in renderings], "text")
            for rendering in renderings:
                if not rendering.is_plain and self.train.assistant_only_loss:
                    _check_spans(rendering, is_pair=len(parts) > 1)
            return RenderedRow(number, renderings, findings)
        return None

    def _encode_batch(self, batch: list[RenderedRow]) -> list[EncodedRow]:
        if not batch or (self.faults.rows and self.data.bad_rows == "refuse"):
            return []
        texts = [rendering.text for row in batch for rendering in row.renderings]
        adds_special = batch[0].renderings[0].is_plain
        encodings = iter(self.backend.encode_batch(texts, add_special_tokens=adds_special))
        encoded = []
        for row in batch:
            made = [next(encodings) for _ in row.renderings]
            with self.faults.catching(row.number):
                pairs = zip(row.renderings, made, strict=True)
                sequences = [self._label(*pair, row.findings) for pair in pairs]
                _check_preference([ids for ids, _ in sequences], "tokens")
                encoded.append(EncodedRow(sequences, row.findings))
        return encoded

    def _label(self, rendering: Rendering, encoding: Encoding, findings: Findings) -> Tokens:
        is_hidden = bool(findings.special) and self.escaping.is_hidden_in(rendering.text)
        found = self.escaping.encode(rendering.text, rendering.is_plain) if is_hidden else encoding
        ids, labels = label_tokens(rendering, found)
        if not rendering.is_plain and self.train.assistant_only_loss:
            self._warn_if_endless(labels)
        return ids, labels

    def _warn_if_endless(self, labels: np.ndarray) -> None:
        """Say so when no end token is among what the first conversation trains."""
        if self.is_first and labels[labels != IGNORED][-1] not in self.tokenizer.get_added_vocab().values():
            logger.warning(
                "the chat template of %s ends the assistant's turn with no special token: the model will not learn to stop",
                self.tokenizer.name_or_path or "the tokenizer",
            )
        self.is_first = False


def split_pair(row: Row) -> list[Row]:
    """A canonical pair as two rows, one with each answer; any other row alone."""
    if "chosen" not in row:
        return [row]
    if row["chosen"] == row["rejected"]:
        raise DataError("'chosen' and 'rejected' are equal without what stands in them twice", "drop the row")
    shared = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    return [{**shared, "completion": row[name]} for name in ("chosen", "rejected")]


def _check_preference(made: Sequence[str] | Sequence[list[int]], what: str) -> None:
    """Raises: DataError: both answers of a pair become the same, as where a chat template trims them."""
    if len(made) > 1 and made[0] == made[1]:
        raise DataError(f"'chosen' and 'rejected' make the same {what}: there is no preference to learn", "drop the row")


def _check_spans(rendering: Rendering, is_pair: bool) -> None:
    """Raises: DataError: a conversation trains nothing, or all of it."""
    end = 0  # of what is trained from the beginning on
    for start, stop in sorted(rendering.spans):
        end = max(end, stop) if start <= end else end
    if not rendering.spans:
        reason = "nothing of it is trained: the chat template marks nothing as the assistant's"
    elif end == max(stop for _, stop in rendering.spans):  # white space at the end is never trained
        reason = "all of it is trained: the chat template marks everything as the assistant's"
    else:
        return
    raise DataError(reason, f"mend the {{% generation %}} markers of the template{'' if is_pair else NO_SWITCH}")
