"""One question of a benchmark, a task's questions, and what a benchmark says of its tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        options: what may follow the prompt, each of which gets its likelihood: the choices, or all right answers; none where
            that of the answer is enough.
        rules: what the metric knows of a right answer besides.
        intro: the beginning of a plain prompt that is said once, before the answered questions too.
        subject: what a question is on, where only questions on it may be answered before it.
    """

    prompt: str | list[dict[str, str]]
    answer: str
    body: tuple[int, int] | None = None
    options: tuple[str, ...] = ()
    rules: Mapping[str, Any] = field(default_factory=dict)
    intro: str = ""
    subject: str = ""

    @property
    def text(self) -> str:
        """The prompt of a task whose prompts are plain text."""
        assert isinstance(self.prompt, str)
        return self.prompt


@dataclass(frozen=True)
class Task:
    """A benchmark dataset in one of its splits.

    Attributes:
        name: `benchmark/task`, or a folder's name.
        examples: the questions with their answers.
        metric: name of a row of METRICS (metrics.py), strict and lenient; of multiple choice, where nothing is generated, of no
            row.
        max_new_tokens: where an answer that has not ended is cut; None for tasks whose answers are not generated: one forward
            pass over the right answers decides what greedy decoding gives exactly.
        cut: the part of a body that goes first where a prompt is too long.
        stops: characters that end an answer, besides its end token.
        bare_prompt: of multiple choice: the prompt that asks nothing, after which a choice is as likely as its words;
            None elsewhere.
        takes_chat: whether the questions may be asked through a chat template; not where rows are trained on as plain text.
        has_answers: False where many answers are right, and rules tell which.
        left_out: why rows of the file are no questions, each with how many; none where all are.
        is_cut_given: whether `max_new_tokens` stays although a right answer is longer.
        way: how the questions are asked, for people.
    """

    name: str
    examples: tuple[Example, ...]
    metric: str = "exact_match"
    max_new_tokens: int | None = None
    cut: Cut = "middle"
    stops: str = ""
    bare_prompt: str | list[dict[str, str]] | None = None
    takes_chat: bool = False
    has_answers: bool = True
    left_out: Mapping[str, int] = field(default_factory=dict)
    is_cut_given: bool = False
    way: str = "plain"


@dataclass(frozen=True)
class Protocol:
    """How somebody ran a benchmark's sequence.

    Attributes:
        epochs: by task, the passes over its rows when all weights train.
        temperature: at which answers were drawn; 0 takes the likeliest token at every place.
    """

    epochs: Mapping[str, float]
    temperature: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's file says of it. Tasks go by their short names here.

    Attributes:
        tasks: what may be scored.
        extra: what may be trained on only.
        orders: the sequences, the usual one first.
        locate: task, `data.root` and split -> the file that must be there; None where the task has no such split.
        load: task and that file -> the task.
        source: where the rows come from and how they must lie; None where they ship with hft.
        protocols: by name.
        num_rows: by task, the official numbers of rows in train, eval and test.
    """

    tasks: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]]
    locate: Callable[[str, Path, Split], Path | None]
    load: Callable[[str, Path], Task]
    source: str | None = None
    extra: tuple[str, ...] = ()
    protocols: Mapping[str, Protocol] = field(default_factory=dict)
    num_rows: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
