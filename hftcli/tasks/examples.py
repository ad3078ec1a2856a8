"""One question of a benchmark, and what a benchmark's tasks have in common."""

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval", "test"]
Cut = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Example:
    """A question and the answer that counts as right.

    Attributes:
        prompt: plain text, or messages of a conversation that ends with the user's.
        answer: what the model must say, without an end token.
        body: first and last-plus-one character of a plain prompt between which it may be cut where it is too long; None where
            it may be cut anywhere. The instruction and the cue stand outside.
    """

    prompt: str | list[dict[str, str]]
    answer: str
    body: tuple[int, int] | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark dataset in one of its splits.

    Attributes:
        name: `benchmark/task`, or a folder's name.
        examples: the questions with their answers.
        metric: name of a row of METRICS (metrics.py), strict and lenient.
        max_new_tokens: where an answer that has not ended is cut; None for tasks whose answers are not generated: one forward
            pass over the right answers decides what greedy decoding gives exactly.
        cut: the part of a body that goes first where a prompt is too long.
    """

    name: str
    examples: tuple[Example, ...]
    metric: str = "exact_match"
    max_new_tokens: int | None = None
    cut: Cut = "middle"
