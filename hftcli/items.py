"""Item by item: which questions a run's model answered before, and which of them it lost or won."""

from collections.abc import Sequence
from dataclasses import dataclass

from hftcli.run import Prediction, Run
from hftcli.statistics import Estimate, Transitions, bootstrap_mean, compute_mcnemar, count_transitions


@dataclass(frozen=True)
class ItemChange:
    """What became of the questions of one task.

    Attributes:
        change: mean gain in score over the questions, a share, with its paired bootstrap interval.
        transitions: known and lost, or won; None where scores have degrees.
        p_value: of McNemar's exact test that as many were lost as won; None like `transitions`.
    """

    change: Estimate
    transitions: Transitions | None
    p_value: float | None


def compare_items(before: Sequence[Prediction], after: Sequence[Prediction]) -> ItemChange:
    """The same questions of one task, answered by two models; both by the task's own metric."""
    scores = [[prediction.score for prediction in predictions] for predictions in (before, after)]
    transitions = count_transitions(*scores)
    return ItemChange(
        change=bootstrap_mean([last - first for first, last in zip(*scores, strict=True)]),
        transitions=transitions,
        p_value=transitions and compute_mcnemar(transitions.num_lost, transitions.num_won),
    )


def read_item_changes(run: Run) -> dict[str, ItemChange]:
    """By task, what became of its questions between the start of a run and the last of its finished rounds.

    Only tasks of which both kept every question's score are there.
    """
    last = run.last_finished
    if last is None:
        return {}
    first, found = run.rounds[0], {}
    for task in first.read_scores().before:
        if first.predictions_path("before", task).exists() and last.predictions_path("after", task).exists():
            before, after = first.read_predictions("before", task), last.read_predictions("after", task)
            if None not in {prediction.score for prediction in (*before, *after)}:
                found[task] = compare_items(before, after)
    return found
