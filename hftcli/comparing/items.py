"""Item by item: which questions a model answered before, and which of them it lost or won."""

from collections.abc import Sequence
from dataclasses import dataclass

from hftcli.comparing.answers import read_answers
from hftcli.comparing.intervals import estimate_change
from hftcli.comparing.statistics import (
    Adjusted,
    Estimate,
    Transitions,
    adjust_for_chance,
    compute_mcnemar,
    count_transitions,
)
from hftcli.runs.run import Run
from hftcli.runs.scores import Prediction


@dataclass(frozen=True)
class ItemChange:
    """What became of the questions of one task.

    Attributes:
        change: mean gain in score over the questions, a share, with its interval (intervals.py).
        transitions: known and lost, or won; None where scores have degrees.
        p_value: of McNemar's exact test that as many were lost as won; None like `transitions`.
        adjusted: of multiple choice, the shares of the questions lost and won, less what guessing would show; None elsewhere.
    """

    change: Estimate
    transitions: Transitions | None
    p_value: float | None
    adjusted: Adjusted | None


def compare_items(before: Sequence[Prediction], after: Sequence[Prediction]) -> ItemChange | None:
    """The same questions of one task, answered by two models; both by the task's own metric.

    Returns:
        None where a question has no score.
    """
    pairs = [
        (first.score, last.score)
        for first, last in zip(before, after, strict=True)
        if first.score is not None and last.score is not None
    ]
    if len(pairs) < len(before):
        return None
    firsts, lasts = ([pair[side] for pair in pairs] for side in (0, 1))
    change, transitions = estimate_change(firsts, lasts), count_transitions(firsts, lasts)
    if transitions is None:
        return ItemChange(change, None, None, None)
    groups: dict[int | None, list[tuple[float, float]]] = {}
    for prediction, pair in zip(before, pairs, strict=True):
        groups.setdefault(prediction.num_choices, []).append(pair)
    counted = {
        num_choices: moved
        for num_choices, group in groups.items()
        if num_choices is not None and (moved := count_transitions(*zip(*group, strict=True))) is not None
    }
    return ItemChange(
        change=change,
        transitions=transitions,
        p_value=compute_mcnemar(transitions.num_lost, transitions.num_won),
        adjusted=adjust_for_chance(counted) if len(counted) == len(groups) else None,
    )


def read_item_changes(run: Run) -> dict[str, ItemChange]:
    """By task, what became of its questions between the start of a run and the last of its finished rounds.

    Only tasks of which both kept every question's score are there.
    """
    changes = {task: compare_items(*pairs) for task, pairs in read_answers(run).items()}
    return {task: change for task, change in changes.items() if change is not None}
