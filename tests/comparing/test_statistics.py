"""Intervals cover what they should, tests agree with numbers worked out by hand or printed in tables."""

import math
import random
import statistics
from itertools import product

import numpy as np
import pytest

from hftcli.comparing.statistics import (
    Estimate,
    Transitions,
    adjust_for_chance,
    bootstrap_mean,
    compute_mcnemar,
    count_transitions,
    estimate_difference,
    estimate_mean,
    find_frontier,
    find_t_bound,
)

NUM_DRAWS = 1000
THREE, FIVE, EQUAL = [0.31, 0.27, 0.36], [1.5, -0.25, 0.75, 0.5, 2.0], [0.1, 0.1, 0.1]


def check_coverage(covered: list[bool]) -> None:
    """95 % intervals hold the truth in 93 to 97 % of the draws."""
    assert len(covered) == NUM_DRAWS
    assert 0.93 <= sum(covered) / NUM_DRAWS <= 0.97


@pytest.mark.parametrize(
    ("num_free", "bound"),
    # Printed tables of Student's t, two-sided 95 %.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_t_bound(num_free, bound):
    assert find_t_bound(num_free) == pytest.approx(bound, abs=5e-4)


def test_t_bound_tends_to_the_normal_distribution():
    assert find_t_bound(10**6) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=3e-3)


# The expected numbers of the tests below come from the series of Abramowitz and Stegun for Student's t, inverted by bisection,
# and from sums of binomial coefficients.


@pytest.mark.parametrize(
    ("num_free", "bound"),
    [
        (1, 12.706204736174678),
        (2, 4.30265272974946),
        (3, 3.1824463052837064),
        (4, 2.776445105197791),
        (7, 2.3646242515927836),
        (30, 2.042272456301238),
        (100, 1.9839715185235463),
        (1000, 1.9623390808263785),
    ],
)
def test_t_bound_stays_what_it_was(num_free, bound):
    assert find_t_bound(num_free) == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "won", "p_value"),
    [
        (3, 9, 0.14599609375),
        (30, 70, 7.85013964559367e-05),
        (121, 59, 4.434449263755176e-06),
        (0, 40, 1.8189894035458565e-12),
        (400, 600, 2.7284641560660184e-10),
    ],
)
def test_mcnemar_stays_what_it_was(lost, won, p_value):
    assert compute_mcnemar(lost, won) == pytest.approx(p_value, rel=1e-9, abs=0)


def spread(found: Estimate) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (estimate_mean(THREE), (0.3133333333333333, 0.20131735970645132, 0.4253493069602153)),
        (estimate_mean(FIVE), (0.9, -0.18867099766627338, 1.9886709976662735)),
        (estimate_mean(EQUAL), (0.1, 0.1, 0.1)),
        (estimate_difference(THREE, FIVE), (-0.5866666666666667, -1.6777346256312557, 0.5044012922979224)),
        (estimate_difference(EQUAL, THREE), (-0.21333333333333326, -0.32534930696021525, -0.1013173597064513)),
        (estimate_difference(EQUAL, EQUAL), (0, 0, 0)),
        (bootstrap_mean([0, 1, 1, 0, 1, 0, 0, 0, 1, 1]), (0.5, 0.2, 0.8)),
        (bootstrap_mean([0.125, 0.5, 0.75, 0.25, 1, 0.0625]), (0.4479166666666667, 0.19791666666666666, 0.7291666666666666)),
        (bootstrap_mean([0.125, 0.5, 0.75, 0.25, 1, 0.0625], 3), (0.4479166666666667, 0.17708333333333334, 0.71875)),
    ],
)
def test_intervals_stay_what_they_were(found, expected):
    assert spread(found) == pytest.approx(expected, abs=1e-9)


def test_mean_over_seeds_by_hand():
    found = estimate_mean([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert estimate_mean([5.0]).low is None


def test_welch_by_hand():
    """Variances 1 and 4 over 3 and 4 seeds: t at (1/3 + 1)^2 / (1/9/2 + 1/3) = 4.57 degrees of freedom, taken as 4."""
    found = estimate_difference([1.0, 2.0, 3.0], [-3.0, 0.0, 0.0, 1.0])
    variances = 1 / 3 + statistics.variance([-3, 0, 0, 1]) / 4
    free = variances**2 / ((1 / 3) ** 2 / 2 + (variances - 1 / 3) ** 2 / 3)
    assert found.mean == 2.5
    assert found.high - 2.5 == pytest.approx(find_t_bound(math.floor(free)) * math.sqrt(variances))


@pytest.mark.parametrize(
    ("lost", "won", "expected"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (121, 59, 4.434e-06),  # R: mcnemar.exact of package exact2x2, its example
    ],
)
def test_mcnemar(lost, won, expected):
    assert compute_mcnemar(lost, won) == pytest.approx(expected, rel=1e-3)


def test_transitions_are_counted():
    found = count_transitions([1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1])
    assert found == Transitions(num_kept=2, num_lost=2, num_won=1, num_never=1)
    assert found.num_known == 4
    assert count_transitions([1, 0.5], [1, 1]) is None
    assert count_transitions([1, None], [1, 1]) is None


def test_chance_correction_by_hand():
    """Half right before and after, ten of a hundred lost and ten won, four choices: chance moves 0.25 / 3 of the items."""
    moved = Transitions(num_kept=40, num_lost=10, num_won=10, num_never=40)
    found = adjust_for_chance({4: moved})
    assert found.lost == found.won == pytest.approx(0.1 - 0.25 / 3)
    # Beside a hundred with two choices, of which chance would move a quarter: more than were moved.
    both = adjust_for_chance({4: moved, 2: Transitions(num_kept=30, num_lost=40, num_won=20, num_never=10)})
    guessed = 25 / 3 + 30 * 50 / 100
    assert (both.lost, both.won) == pytest.approx(((50 - guessed) / 200, (30 - guessed) / 200))
    assert adjust_for_chance({2: moved}).lost == 0  # a share is not below zero


def test_two_models_that_only_guess_have_lost_and_won_nothing():
    draw = random.Random(0)
    before, after = ([int(draw.random() < 0.25) for _ in range(20_000)] for _ in range(2))
    found = count_transitions(before, after)
    assert found.num_lost / found.num_items == pytest.approx(3 / 16, abs=0.01)
    adjusted = adjust_for_chance({4: found})
    assert (adjusted.lost, adjusted.won) == pytest.approx((0, 0), abs=0.01)


def test_what_guessing_adds_is_taken_off_whatever_the_numbers_of_choices():
    """Two models that know 40 % and 30 % of the questions, whichever, and guess at the rest among 2, 4 or 5 choices.

    28 % were known and are not, 18 % the reverse; where the model that does not know guesses right, nobody can tell.
    """
    draw = random.Random(1)
    groups, kept = {}, []
    for num_choices in (2, 4, 5):
        known = [(draw.random() < 0.4, draw.random() < 0.3) for _ in range(20_000)]
        scores = [[int(knows or draw.random() < 1 / num_choices) for knows in pair] for pair in known]
        groups[num_choices] = count_transitions(*zip(*scores, strict=True))
        kept.append(1 - 1 / num_choices)
    found = adjust_for_chance(groups)
    shown = statistics.fmean(kept)
    assert (found.lost, found.won) == pytest.approx((0.28 * shown, 0.18 * shown), abs=0.01)
    assert sum(moved.num_lost for moved in groups.values()) / 60_000 > found.lost + 0.05


def test_bootstrap_covers_a_known_difference_of_items():
    """200 items, of which a model loses each with probability 0.2 and wins each with 0.1."""
    generator = np.random.default_rng(1)
    covered = []
    for draw in range(NUM_DRAWS):
        found = bootstrap_mean(generator.choice([-1, 0, 1], size=200, p=[0.2, 0.7, 0.1]), seed=draw)
        covered.append(found.low <= -0.1 <= found.high)
    check_coverage(covered)


def test_bootstrap_is_repeatable_and_agrees_with_the_standard_error():
    values = [random.Random(index).random() for index in range(500)]
    found = bootstrap_mean(values)
    assert found == bootstrap_mean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(500)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_mean_over_three_seeds_covers_the_truth():
    draw = random.Random(2)
    intervals = [estimate_mean([draw.gauss(0.3, 0.05) for _ in range(3)]) for _ in range(NUM_DRAWS)]
    check_coverage([found.low <= 0.3 <= found.high for found in intervals])


def test_frontier_leaves_out_what_is_beaten():
    points = [(0.9, 0.5), (0.1, 0.0), (0.5, 0.1), (0.8, 0.6), (0.4, 0.1), (0.5, 0.3)]
    assert find_frontier(points) == [1, 2, 0]
    for index, frontier in product(range(len(points)), [find_frontier(points)]):
        beaten = any(points[i][0] >= points[index][0] and points[i][1] <= points[index][1] for i in frontier if i != index)
        assert (index in frontier) != beaten
