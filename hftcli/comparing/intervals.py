"""Intervals of a change over questions that stay true where few questions changed, and of means over tasks.

All are of 95 %. A bootstrap of 25 questions of which one was lost never draws what it has not seen, and covers far less.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from hftcli.comparing.statistics import CONFIDENCE, Estimate, bootstrap_mean, find_t_bound
from hftcli.runs.scores import Prediction

FEW_CHANGED = 10  # questions with degrees of right: where fewer of them changed, their bootstrap says too little
EDGE = 1e-12  # of the range of a difference, where its variance is zero


def estimate_change(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean gain in score over the same questions.

    Where every answer is right or wrong, Tango's score interval for the difference of paired shares, which is Wilson's where
    questions went one way only. Where there are degrees, the bootstrap's, and with few questions changed at least as wide as if
    each had gone from right to wrong, or back.
    """
    changes = [last - first for first, last in zip(before, after, strict=True)]
    num_lost, num_won = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    mean, count = math.fsum(changes) / len(changes), len(changes)
    low, high = find_paired_interval(num_lost, num_won, count)
    if {*before, *after} <= {0, 1}:
        return Estimate(mean, low, high, count)
    drawn = bootstrap_mean(changes)
    if drawn.interval is not None and num_lost + num_won >= FEW_CHANGED:
        return drawn
    ends = drawn.interval or (mean, mean)
    return Estimate(mean, min(low, ends[0]), max(high, ends[1]), count)


def find_paired_interval(num_lost: int, num_won: int, num_items: int) -> tuple[float, float]:
    """Tango's score interval of the share won less the share lost (Statistics in Medicine 17, 1998, equations 7 to 9)."""
    from scipy.special import ndtri  # takes a fifth of a second, which most commands need not pay

    bound = float(ndtri((1 + CONFIDENCE) / 2))

    def measure(difference: float) -> float:
        """The score statistic at a supposed difference; it falls as that rises."""
        linear = -num_won - num_lost + (2 * num_items - num_won + num_lost) * difference
        constant = -num_lost * difference * (1 - difference)
        lost = (math.sqrt(max(linear**2 - 8 * num_items * constant, 0.0)) - linear) / (4 * num_items)
        variance = num_items * (2 * lost + difference * (1 - difference))
        distance = num_won - num_lost - num_items * difference
        return distance / math.sqrt(variance) if variance > 0 else distance * math.inf if distance else 0.0

    def solve(target: float) -> float:
        low, high = -1 + EDGE, 1 - EDGE
        while high - low > EDGE:
            middle = (low + high) / 2
            low, high = (middle, high) if measure(middle) > target else (low, middle)
        return min(max((low + high) / 2, -1.0), 1.0)

    return solve(bound), solve(-bound)


def find_share_interval(share: float, num_items: int) -> tuple[float, float]:
    """Wilson's score interval of a share in [0, 1] of so many things (J. of the American Statistical Association 22, 1927)."""
    from scipy.special import ndtri  # takes a fifth of a second, which most commands need not pay

    weight = float(ndtri((1 + CONFIDENCE) / 2)) ** 2 / num_items
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def estimate_rise(before: Sequence[Prediction], after: Sequence[Prediction]) -> Estimate:
    """The rise of the negative log-likelihood of the right answers in nats per token, with a t interval over the questions.

    A question's weight is its tokens; the error is by the delta method.
    """
    changes, weights = [], []
    for first, last in zip(before, after, strict=True):
        if first.nll is not None and last.nll is not None and first.num_tokens is not None and last.num_tokens is not None:
            changes.append(last.nll * last.num_tokens - first.nll * first.num_tokens)
            weights.append((first.num_tokens + last.num_tokens) / 2)  # the likeliest of several right answers may change
    mean, count = math.fsum(changes) / math.fsum(weights), len(changes)
    if count < 2:
        return Estimate(mean, None, None, count)
    squares = math.fsum((change - mean * weight) ** 2 for change, weight in zip(changes, weights, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / math.fsum(weights)
    half = find_t_bound(count - 1) * error
    return Estimate(mean, mean - half, mean + half, count)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates: the distances to their ends are squared and added up, as variances are.

    Zou and Donner, Statistics in Medicine 27, 2008. Without an interval where one of them has none.
    """
    mean, count = fmean(one.mean for one in estimates), sum(one.num_values for one in estimates)
    intervals = [one.interval for one in estimates]
    known = [ends for ends in intervals if ends is not None]
    if len(known) < len(intervals):
        return Estimate(mean, None, None, count)
    below, above = (
        math.sqrt(math.fsum((one.mean - ends[side]) ** 2 for one, ends in zip(estimates, known, strict=True))) / len(known)
        for side in (0, 1)
    )
    return Estimate(mean, mean - below, mean + above, count)
