"""What a model said before and after: the questions that it lost and won, and how its answers look.

The behaviour of answers needs no benchmark: it is read from the texts that are kept anyway.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from hftcli.comparing.intervals import estimate_change
from hftcli.comparing.statistics import Estimate, bootstrap_mean
from hftcli.runs.run import Run
from hftcli.runs.scores import Prediction

logger = logging.getLogger(__name__)

Answers = Mapping[str, tuple[Sequence[Prediction], Sequence[Prediction]]]  # by task, before and after

NUM_WORDS = 4  # of a run of words that is said again
OPENING = 200  # characters of an answer in which it refuses
REFUSAL = re.compile(
    r"\b(?:(?:I'm|I am) (?:sorry|unable|not able)|I apologi[sz]e|I (?:cannot|can not|can't|won't|will not)\b|As an AI\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ChangedItem:
    """A question whose score fell or rose.

    Attributes:
        answers: the right ones.
        before, after: what was answered; None where the answer is only judged by likelihood.
        scores: before and after, in [0, 1].
        nats: by how much less likely a right answer has become; below 0 more likely; None where that was not measured.
    """

    task: str
    index: int
    question: str
    answers: tuple[str, ...]
    before: str | None
    after: str | None
    scores: tuple[float, float]
    nats: float | None

    @property
    def is_lost(self) -> bool:
        """Whether the score fell."""
        return self.scores[1] < self.scores[0]


@dataclass(frozen=True)
class Trait:
    """How the answers to a task look.

    Attributes:
        unit: `characters`, or `share`.
        before, after: means over the answers.
        change: of each answer, paired, with its interval.
    """

    name: str
    unit: str
    before: float
    after: float
    change: Estimate


def read_answers(run: Run) -> Answers:
    """By task, what became of its questions before the first round and after the last that is finished, where both kept it.

    A task whose file was edited in between is left out, with a word: the answers are to different questions.
    """
    last, found = run.last_finished, {}
    if last is not None:
        first = run.rounds[0]
        for task in first.read_scores().before:
            if first.predictions_path("before", task).exists() and last.predictions_path("after", task).exists():
                sides = first.read_predictions("before", task), last.read_predictions("after", task)
                if (place := find_other_question(*sides)) is None:
                    found[task] = sides
                else:
                    logger.warning("%s: %s; what was answered before and after is not compared", task, place)
    return found


def find_other_question(before: Sequence[Prediction], after: Sequence[Prediction]) -> str | None:
    """Where the questions of a task, or their right answers, are not those that they were; None where they are the same.

    Held-out rows, which are no questions, are told by the tokens of their answers.
    """
    if len(before) != len(after):
        return f"there were {len(before)} questions, and now there are {len(after)}"
    for first, last in zip(before, after, strict=True):
        if first.question is not None and last.question is not None:
            is_same = (first.question, first.answers) == (last.question, last.answers)
        else:
            is_same = first.num_tokens == last.num_tokens or None in (first.num_tokens, last.num_tokens)
        if not is_same:
            return f"question {first.index + 1} is another one than it was"
    return None


def list_changed(answers: Answers) -> list[ChangedItem]:
    """The questions whose score fell or rose, those first whose right answer became most unlikely, or likely.

    Questions that an earlier hft kept without their text are there as well, with an empty one.
    """
    changed = [
        ChangedItem(
            task, last.index, last.question or "", last.answers, first.prediction, last.prediction, (first.score, last.score),
            _subtract_nats(first, last),
        )
        for task, pairs in answers.items()
        for first, last in zip(*pairs, strict=True)
        if first.score is not None and last.score is not None and first.score != last.score
    ]  # fmt: skip

    def sort_by(item: ChangedItem) -> tuple[float, float]:
        is_lost = item.scores[1] < item.scores[0]
        worse = -math.inf if item.nats is None else item.nats if is_lost else -item.nats
        return worse, abs(item.scores[1] - item.scores[0])

    return sorted(changed, key=sort_by, reverse=True)


def _subtract_nats(first: Prediction, last: Prediction) -> float | None:
    values = (first.nll, first.num_tokens, last.nll, last.num_tokens)
    if any(value is None for value in values):
        return None
    before, num_before, after, num_after = (float(value or 0) for value in values)
    return after * num_after - before * num_before


def describe_behaviour(before: Sequence[Prediction], after: Sequence[Prediction]) -> list[Trait]:
    """How the written answers to a task look; none where nothing is written, or there are choices."""
    firsts, lasts = (
        [answer for answer in side if answer.prediction is not None and answer.num_choices is None] for side in (before, after)
    )
    if not firsts or len(firsts) != len(lasts):
        return []
    traits = []
    for name, (unit, measure) in TRAITS.items():
        sides = [[measure(answer.prediction or "", answer.answers) for answer in side] for side in (firsts, lasts)]
        own = [(one, other) for one, other in zip(*sides, strict=True) if one is not None and other is not None]
        if own:
            values = [pair[0] for pair in own], [pair[1] for pair in own]
            change = bootstrap_mean([one - other for other, one in own]) if unit == "characters" else estimate_change(*values)
            traits.append(Trait(name, unit, fmean(values[0]), fmean(values[1]), change))
    return traits


def measure_length(text: str, _answers: Sequence[str]) -> float:
    """Characters."""
    return float(len(text))


def is_refusal(text: str, _answers: Sequence[str]) -> float:
    """1 where the beginning says that the model will not or cannot answer, in English."""
    return float(REFUSAL.search(text[:OPENING].replace("’", "'")) is not None)


def has_form(text: str, answers: Sequence[str]) -> float | None:
    """1 where an answer is of the form that all right ones have: a letter, a number, one line, or a line of `####`.

    None where they have none of these in common, or no right answer is known.
    """
    for form in FORMS:
        if answers and all(form.fullmatch(answer) for answer in answers):
            return float(form.fullmatch(text) is not None)
    return None


FORMS = [
    re.compile(form, re.DOTALL)
    for form in (r"\s*[A-Za-z]\s*", r"\s*-?[\d.,]*\d\s*", r".*#### -?[\d.,]+\s*", r"\s*[^\s][^\n]*\s*")
]


def measure_repetition(text: str, _answers: Sequence[str]) -> float:
    """Share of the runs of four words that were said before in the same answer."""
    words = text.split()
    runs = list(zip(*(words[start:] for start in range(NUM_WORDS)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


TRAITS: dict[str, tuple[str, Callable[[str, Sequence[str]], float | None]]] = {
    "length": ("characters", measure_length),
    "refusals": ("share", is_refusal),
    "form kept": ("share", has_form),
    "repeated text": ("share", measure_repetition),
}
