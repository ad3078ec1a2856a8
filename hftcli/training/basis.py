"""What the untouched model scored, kept on disk: a grid of runs asks its base each task once.

Kept under a key of all that shapes a score, as the reference of preference optimization is (references.py).
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from hftcli import PACKAGE
from hftcli.data.cache import default_cache
from hftcli.data.tokens import get_backend
from hftcli.measuring.questions import TokenizedTask
from hftcli.models.deltas import hash_checkpoint
from hftcli.models.device import is_mixed, name_device
from hftcli.recipe.section import FileSection
from hftcli.runs.files import read_model, write_model
from hftcli.runs.scores import Prediction, Score
from hftcli.training.stages import Assignment

ROOMS = ("measuring", "tasks", "models", "training")  # whose code decides what a score is


class BaseScore(FileSection):
    """What an untouched model scored on one task."""

    score: Score
    """Its score."""
    answers: tuple[Prediction, ...]
    """What became of each question."""


class Basis:
    """The kept scores of a round's start; rank 0 alone reads and writes them.

    Args:
        num_ranks: how many ranks share the questions.
        embeddings_dtype: in which the model holds its input embeddings: frozen ones may be held in bfloat16, in which all
            that follows is then added up.
    """

    def __init__(self, task: Assignment, num_ranks: int, device: torch.device, embeddings_dtype: torch.dtype):
        spec = task.spec
        self.folder = default_cache("scores")
        self.shaping = {
            "start": hash_checkpoint(task.start),
            "tokenizer": hashlib.sha256(get_backend(task.tokenizer).to_str().encode()).hexdigest(),
            "model": spec.model.model_dump(include={"dtype", "attn_implementation"}),
            "mixed": is_mixed(spec),
            "embeddings": str(embeddings_dtype),
            "adapter": spec.method.adapter,  # it stands in the untouched model too
            "split": spec.launch.split,
            "ranks": num_ranks,
            "temperature": spec.scoring.temperature,
            "device": f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else name_device(device),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "code": hash_code(),
        }

    def find_path(self, asked: TokenizedTask, is_read_only: bool) -> Path:
        """Where a task's score is kept, be it there or not."""
        shaping = {**self.shaping, "asked": hashlib.sha256(repr(asked).encode()).hexdigest(), "is_read_only": is_read_only}
        return self.folder / f"{hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()}.json"

    def read(self, asked: TokenizedTask, is_read_only: bool) -> BaseScore | None:
        """Raises: InputError: what is kept is damaged."""
        path = self.find_path(asked, is_read_only)
        return read_model(path, BaseScore) if path.exists() else None

    def write(self, asked: TokenizedTask, is_read_only: bool, score: Score, answers: Sequence[Prediction]) -> None:
        """Keep a score, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_model(self.find_path(asked, is_read_only), BaseScore(score=score, answers=tuple(answers)))


@cache
def hash_code() -> str:
    """Of hft's own code that decides what a score is."""
    files = [file for room in ROOMS for file in sorted((PACKAGE / room).glob("*.py"))]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
