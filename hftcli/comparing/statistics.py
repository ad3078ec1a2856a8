"""Whether a difference is one: intervals and tests for items, for seeds, and for two methods at equal learning.

All intervals are of 95 %. Items of a task are resampled; seeds are few, so that a mean over them gets the t distribution.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000

Seed = tuple[int, ...]  # of a run: the numbers that its draws come from
Curve = Sequence[tuple[float, float]]  # learning and forgetting, one point per setting


@dataclass(frozen=True)
class Unit:
    """How numbers of a kind are shown: times `factor`, with so many decimals."""

    name: str
    note: str
    factor: float
    decimals: int

    def show(self, value: float | None, signed: bool = False) -> str:
        """A value as text, with its sign where it is a change; empty for None. What rounds to zero has no minus."""
        return "" if value is None else f"{self.factor * value:{'+' if signed else ''}z.{self.decimals}f}"


POINTS = Unit("points", "points (0 to 100)", 100.0, 1)  # of shares
NATS = Unit("nats per token", "nats per token, lower is better", 1.0, 3)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; `low` and `high` are None where one value alone says nothing of the spread.

    Attributes:
        error, num_free: standard error and degrees of freedom of a mean over seeds; None and 0 where its interval is not
            Student's.
    """

    mean: float
    low: float | None
    high: float | None
    num_values: int
    error: float | None = None
    num_free: float = 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends; None where there is no interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0, so that a difference is shown."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean over items, with the percentile interval of its bootstrap.

    The values of a paired comparison are the differences of each item: items, not models, are resampled.
    """
    items_N = np.asarray(values, dtype=np.float64)
    if len(items_N) < 2:
        return Estimate(float(items_N.mean()), None, None, len(items_N))
    # Equal values are drawn together: how often each is drawn is multinomial, and most scores are 0 or 1. scipy's bootstrap
    # draws every item by itself, so that its interval is of other draws, and slower.
    distinct_K, counts_K = np.unique(items_N, return_counts=True)
    shares_K = counts_K / len(items_N)
    draws_RK = np.random.default_rng(seed).multinomial(len(items_N), shares_K, size=NUM_RESAMPLES)
    means_R = draws_RK @ distinct_K / len(items_N)
    low, high = np.quantile(means_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(items_N.mean()), float(low), float(high), len(items_N))


def compute_mcnemar(num_lost: int, num_won: int) -> float:
    """McNemar's exact test: how probable a split at least as uneven is, if losing and winning an item are equally likely.

    Returns:
        The two-sided p value: 2 P(X <= min(lost, won)) for X ~ Binomial(lost + won, 1/2), at most 1.
    """
    from scipy.special import bdtr  # takes a fifth of a second, which most commands need not pay

    return min(2 * float(bdtr(min(num_lost, num_won), num_lost + num_won, 0.5)), 1.0)


@dataclass(frozen=True)
class Transitions:
    """How many items were answered right before and after."""

    num_kept: int
    num_lost: int
    num_won: int
    num_never: int

    @property
    def num_items(self) -> int:
        """Items that both answered."""
        return self.num_kept + self.num_lost + self.num_won + self.num_never

    @property
    def num_known(self) -> int:
        """Answered right before."""
        return self.num_kept + self.num_lost

    def count_guessed(self, num_choices: int) -> float:
        """How many items guessing alone would show as lost, and as many as won: n (1 - a)(1 - b) / (k - 1).

        With n items, accuracies a before and b after, and k choices. Who guesses at an unknown item is right with probability
        1/k, so a share (1 - a) / (k - 1) of all items was guessed right before; a share 1 - b of these is wrong after, if they
        are no harder than the others. They mostly are, so that some of what guessing shows stays in.

        Args:
            num_choices: k, 2 or more.
        """
        num_wrong_before, num_wrong_after = self.num_won + self.num_never, self.num_lost + self.num_never
        return num_wrong_before * num_wrong_after / (self.num_items * (num_choices - 1))


@dataclass(frozen=True)
class Adjusted:
    """Shares of the items that were lost and won, less what guessing would show, in [0, 1]."""

    lost: float
    won: float


def adjust_for_chance(groups: Mapping[int, Transitions]) -> Adjusted:
    """The correction of multiple choice of arXiv 2510.17776: max(0, share lost - guessed), max(0, share won - guessed).

    Args:
        groups: what became of the items, by their number of choices. The paper's items have the same number; here items that
            have not are counted apart and added up.
    """
    num_items = sum(moved.num_items for moved in groups.values())
    num_guessed = math.fsum(moved.count_guessed(num_choices) for num_choices, moved in groups.items())
    num_lost = sum(moved.num_lost for moved in groups.values())
    num_won = sum(moved.num_won for moved in groups.values())
    return Adjusted(max(num_lost - num_guessed, 0.0) / num_items, max(num_won - num_guessed, 0.0) / num_items)


def count_transitions(before: Sequence[float | None], after: Sequence[float | None]) -> Transitions | None:
    """The items known before and lost, or won; None where scores have degrees, so that none is simply right."""
    pairs = list(zip(before, after, strict=True))
    if any(score not in (0, 1) for pair in pairs for score in pair):
        return None
    return Transitions(
        num_kept=pairs.count((1, 1)), num_lost=pairs.count((1, 0)), num_won=pairs.count((0, 1)), num_never=pairs.count((0, 0))
    )


def estimate_mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds with its t interval; none with one seed."""
    count, mean = len(values), fmean(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    return _make_estimate(mean, math.sqrt(variance(values) / count), count - 1, count)


def estimate_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of the first less that of the second, over seeds that have nothing in common: Welch's t interval."""
    mean = fmean(first) - fmean(second)
    count = min(len(first), len(second))
    if count < 2:
        return Estimate(mean, None, None, count)
    errors = [variance(values) / len(values) for values in (first, second)]
    total = sum(errors)
    if total == 0:
        return _make_estimate(mean, 0.0, count - 1, count)
    spread = sum(error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True))
    return _make_estimate(mean, math.sqrt(total), int(total**2 / spread), count)  # rounded down: the wider interval


def _make_estimate(mean: float, error: float, num_free: int, count: int) -> Estimate:
    half = find_t_bound(num_free) * error
    return Estimate(mean, mean - half, mean + half, count, error, num_free)


def find_t_bound(num_free: int) -> float:
    """The t with P(|T| <= t) = 95 % at so many degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(num_free, (1 + CONFIDENCE) / 2))


def find_frontier(points: Curve) -> list[int]:
    """Which points no other one beats, learning at least as much and forgetting no more; in the order of learning."""
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], points[index][1]))
    frontier: list[int] = []
    for index in order:
        if not frontier or points[index][1] < points[frontier[-1]][1]:
            frontier.append(index)
    return frontier[::-1]
