"""What a round has learned and lost at a step of it, and what a forgetting budget makes of that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from hftcli.comparing.intervals import average, estimate_change, estimate_rise
from hftcli.comparing.statistics import Estimate
from hftcli.recipe.evaluation import StopSection
from hftcli.runs.scores import By, CurvePoint, Loss, PairScore, Prediction, Score

Answers = Mapping[str, Sequence[Prediction]]


@dataclass(frozen=True)
class Standing:
    """What a model knew before a round: scores, and the answers behind them, by task.

    Attributes:
        pairs: held-out preference pairs; None where there are none.
    """

    scores: Mapping[str, Score]
    answers: Answers
    pairs: PairScore | None = None


def make_point(
    step: int, start: Standing, now: Standing, learned: Sequence[str], known: Sequence[str]
) -> CurvePoint:  # fmt: skip
    """A point of a round's curve.

    Args:
        start: before the round.
        now: after a step of it.
        learned: what asks for what the round trains on.
        known: tasks that ask for what was known before.
    """
    kinds: tuple[By, ...] = ("score", "nll")
    gains = {by: [gain for name in learned if (gain := find_gain(start.scores[name], now.scores[name], by)) is not None]
             for by in kinds}  # fmt: skip
    if now.pairs is not None and start.pairs is not None:
        gains["score"].append(now.pairs.reward_accuracy - start.pairs.reward_accuracy)
    losses = {by: estimate_loss(start.answers, now.answers, known, by) for by in kinds}
    return CurvePoint(
        step=step,
        scores={name: now.scores[name] for name in (*learned, *known)},
        pairs=now.pairs,
        learning={by: fmean(found) for by, found in gains.items() if found},
        forgetting={by: Loss(mean=loss.mean, low=loss.low, high=loss.high) for by, loss in losses.items() if loss},
    )


def find_gain(before: Score, after: Score, by: By) -> float | None:
    """The gain in score, or the fall of the negative log-likelihood; None where that was not measured."""
    first, last = (before.score, after.score) if by == "score" else (after.nll, before.nll)
    return None if first is None or last is None else last - first


def estimate_loss(before: Answers, after: Answers, known: Sequence[str], by: By) -> Estimate | None:
    """The mean loss over the tasks that were known, with its interval over the questions; None where it is not measured."""
    losses = []
    for name in known:
        if by == "nll" and any(answer.nll is None for answer in (*before[name], *after[name])):
            return None
        if by == "nll":
            losses.append(estimate_rise(before[name], after[name]))
            continue
        firsts, lasts = ([answer.score for answer in answers[name]] for answers in (before, after))
        if None in firsts or None in lasts:
            return None
        # What is lost from before to after is gained from after to before.
        losses.append(estimate_change([score for score in lasts if score is not None], [s for s in firsts if s is not None]))
    return average(losses) if losses else None


def find_end(point: CurvePoint, stop: StopSection) -> str | None:
    """The key of `stop` by which a round ends at a measured step; None where it goes on."""
    loss, gain = point.forgetting.get(stop.by), point.learning.get(stop.by)
    lost = None if loss is None else loss.mean if loss.low is None else loss.low
    if stop.max_forgetting is not None and lost is not None and lost > stop.max_forgetting:
        return "max_forgetting"
    if stop.min_learning is not None and gain is not None and gain >= stop.min_learning:
        return "min_learning"
    return None


def is_better(point: CurvePoint, best: CurvePoint | None, stop: StopSection, within_budget: bool) -> bool:
    """Whether a point is to be kept in place of the best so far.

    Args:
        within_budget: only points that forgot no more than the budget count.
    """
    loss = point.forgetting.get(stop.by)
    if within_budget and stop.max_forgetting is not None and loss is not None and loss.mean > stop.max_forgetting:
        return False
    if best is None or stop.by not in point.learning:
        return True
    return point.learning[stop.by] > best.learning[stop.by]
