"""Context distillation: what the start of the round expects of an answer after answered rows is learned without them.

The teacher is the start with `demonstrations` other rows of the task before the question, the student the model without them; a
step's loss has `strength` times KL(teacher || student) on top, per trained token (arXiv 2305.16938 and 2412.13243, where the
teacher may be another model). The start is the model itself with a copy of what trains laid in, as for `anchor`.

Which rows stand before a row is drawn by its tokens and `train.seed`, so that it is the same in every epoch, on every rank and
after a stop. They stand there as training shows them, end tokens included, but for a second beginning of the text. Replayed
rows are preceded by rows of their own task; texts that are of no task, as those of `self_replay`, have no teacher.

Shapes: B sequences, T tokens, N tokens that some sequence of the batch trains on, V the vocabulary, C tokens of the longest
context of the batch.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer

from hftcli.errors import DataError, ModelError
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.anchor import measure_divergence
from hftcli.methods.method import Method
from hftcli.models.description import describe_model, load_tokenizer
from hftcli.models.start_copy import StartCopy
from hftcli.recipe.methods import DistillSection
from hftcli.recipe.section import Section
from hftcli.runs.spec import RoundSpec

IGNORED = -100
USUAL_TOKENS = 1024  # of the rows before a row, where the model has places for them
HASHED_ROWS = 1000  # rows looked at at once
LEAST_LENGTH = 8  # of `data.max_length`


class Distill(Method):
    """A penalty on the divergence from the start that has answered rows before it, token by token."""

    section: DistillSection
    reads_distributions = True
    reads_ahead = True

    def __init__(self, spec: RoundSpec, section: Section):
        super().__init__(spec, section)
        self.bos_id: int | None = None
        self.max_tokens = self.section.max_tokens or USUAL_TOKENS
        self.owners: dict[bytes, str] | None = None  # by a row's hash, its task; None where all rows are of one

    def check_start(self, start: Path, plan: FreezePlan) -> None:
        """Find how many tokens may stand before a row, and which one begins a text.

        Raises:
            ModelError: the model has no places for them.
        """
        places, length = describe_model(str(start)).max_positions, self.spec.data.max_length
        room = max(places - length, 0) if places is not None else self.max_tokens
        least = self.section.max_tokens or self.section.demonstrations
        if places is not None and least > room:
            fix = f"set method.distill.max_tokens to {room} or less, or lower data.max_length"
            if room < self.section.demonstrations:
                fix = f"lower data.max_length and method.distill.max_tokens, to {places} or less together"
                if places - least >= LEAST_LENGTH:
                    fix = f"lower data.max_length to {places - least} or less"
            raise ModelError(
                f"method.distill lays {least} tokens or more before a row of data.max_length {length}, and {start} has "
                f"{places} positions",
                fix,
            )
        self.max_tokens = min(self.max_tokens, room)
        self.bos_id = load_tokenizer(start).bos_token_id

    def prepare_rows(self, dataset: Dataset, rows: dict[str, Dataset]) -> Dataset:
        """Find the rows of each task that are short enough to stand before another; those to train on stay as they are.

        Raises:
            DataError: a task has too few.
        """
        trained = {task: held for task, held in rows.items() if task == self.spec.task or self.spec.method.replay is not None}
        self.rows = trained or {"the rows": dataset}
        most = self.max_tokens // self.section.demonstrations
        self.candidates: dict[str, np.ndarray] = {}
        for task, held in self.rows.items():
            self.candidates[task] = find_distinct(held, most)
            if len(self.candidates[task]) <= self.section.demonstrations:
                raise DataError(
                    f"method.distill lays {self.section.demonstrations} rows before another, of at most {self.max_tokens} "
                    f"tokens together; of the {len(held)} rows of {task} {len(self.candidates[task])} different ones have "
                    f"{most} or fewer",
                    "raise method.distill.max_tokens, or lower method.distill.demonstrations",
                )
        if len(self.rows) > 1 or self.spec.method.self_replay is not None:
            self.owners = {hash_row(ids): task for task, held in self.rows.items() for ids in held["input_ids"]}
        return dataset

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Copy what trains: a step checkpoint has moved from there."""
        self.copy = StartCopy(model)

    def start(self, trainer: Trainer) -> None:
        """Take the copy to where the model trains."""
        self.copy.move()

    def choose_context(self, ids: Sequence[int]) -> list[int] | None:
        """The tokens to stand before a row; None for a row of no task."""
        own, digest = list(ids), hash_row(ids)
        task = next(iter(self.rows)) if self.owners is None else self.owners.get(digest)
        if task is None:
            return None
        drawing, pool = random.Random(f"{self.spec.train.seed}/{digest.hex()}"), self.candidates[task]
        places = drawing.sample(range(len(pool)), self.section.demonstrations + 1)  # one more: the row itself may be among them
        others = [held for place in places if (held := self.rows[task][int(pool[place])]["input_ids"]) != own]
        texts = [self._open(held) for held in others[: self.section.demonstrations]]
        return [*own[: len(own) - len(self._open(own))], *(token for text in texts for token in text)]

    def _open(self, ids: list[int]) -> list[int]:
        """A row without the token that begins a text."""
        return ids[1:] if self.bos_id is not None and ids[:1] == [self.bos_id] else ids

    @torch.no_grad()
    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """What the start expects at the places of a batch before its trained tokens, with other rows before them."""
        mask_BT = inputs["attention_mask"].bool()
        rows = [ids_T[mask_T].tolist() for ids_T, mask_T in zip(inputs["input_ids"], mask_BT, strict=True)]
        is_trained_B = (inputs["labels"] != IGNORED).any(1).tolist()
        contexts = [self.choose_context(ids) if trained else None for ids, trained in zip(rows, is_trained_B, strict=True)]
        self.has_teacher_B1 = torch.tensor([context is not None for context in contexts], device=mask_BT.device).unsqueeze(1)
        read = lay_before(
            inputs, [(context or [], len(ids) - len(self._open(ids))) for context, ids in zip(contexts, rows, strict=True)]
        )
        shift = read["input_ids"].shape[1] - mask_BT.shape[1]
        self.expected_BNV = self.copy.ask(model, read, columns_N + shift)

    def penalize_tokens(self, log_probs_BNV: torch.Tensor, targets_BN: torch.Tensor) -> torch.Tensor:
        """What each token has on top of its loss (B, N)."""
        divergence_BN = measure_divergence(log_probs_BNV, self.expected_BNV, targets_BN, "forward")
        return self.section.strength * divergence_BN * self.has_teacher_B1


def find_distinct(rows: Dataset, most: int) -> np.ndarray:
    """Indices of the rows of at most so many tokens; of equal rows the first."""
    lists = (ids for batch in read_batches(rows) for ids in batch["input_ids"].to_pylist())
    first: dict[bytes, int] = {}
    for place, ids in enumerate(lists):
        if len(ids) <= most:
            first.setdefault(hash_row(ids), place)
    return np.array(list(first.values()), dtype=np.int64)


def read_batches(rows: Dataset) -> Iterator[Any]:
    """Token ids of rows, some at a time."""
    return rows.select_columns("input_ids").with_format("arrow").iter(HASHED_ROWS)


def hash_row(ids: Sequence[int]) -> bytes:
    """A short hash of a row's tokens."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).digest()


def lay_before(inputs: dict[str, torch.Tensor], contexts: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """A padded batch with tokens before each of its rows, whose own tokens stand in the same columns as each other's still.

    Args:
        contexts: of each row, what stands before it, and how many of its own first tokens that takes the place of.
    """
    width = max(len(context) - num_taken for context, num_taken in contexts)
    ids_BT, mask_BT = (torch.nn.functional.pad(inputs[name], (max(width, 0), 0)) for name in ("input_ids", "attention_mask"))
    for row, (context, num_taken) in enumerate(contexts):
        if context:
            last = max(width, 0) + num_taken
            ids_BT[row, last - len(context) : last] = torch.tensor(context, device=ids_BT.device)
            mask_BT[row, last - len(context) : last] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
