"""Intervals of changes over questions: against published values, and how often they hold the truth."""

import math
import random

import pytest
from written_runs import make_predictions

from hftcli.comparing.intervals import average, estimate_change, estimate_rise, find_paired_interval, find_share_interval
from hftcli.comparing.statistics import Estimate


@pytest.mark.parametrize(
    ("lost", "won", "items", "low", "high"),
    # Tango 1998, tables of the crossover trial and of its extreme cases; where one way only, Wilson's interval of the share.
    [(0, 0, 25, -(1.959964**2) / (25 + 1.959964**2), 1.959964**2 / (25 + 1.959964**2))],
)
def test_paired_interval_of_nothing_changed_is_wilsons(lost, won, items, low, high):
    assert find_paired_interval(lost, won, items) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("won", "items"), [(150, 150), (93, 150), (0, 8), (17.5, 40)])
def test_interval_of_a_share_ends_where_wilsons_test_does(won, items):
    """Its ends solve (share - p) ** 2 = z ** 2 p (1 - p) / n; 1.959964 is the normal distribution's place of 97.5 %."""
    share = won / items
    for end in find_share_interval(share, items):
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / items, abs=1e-7)
    assert find_share_interval(share, items)[0] <= share <= find_share_interval(share, items)[1]


def test_paired_interval_turns_with_the_sign():
    low, high = find_paired_interval(3, 9, 60)
    assert find_paired_interval(9, 3, 60) == pytest.approx((-high, -low), abs=1e-7)


@pytest.mark.parametrize(("lost", "won", "items"), [(0, 1, 25), (1, 0, 25), (2, 7, 40), (12, 1, 50), (0, 30, 30), (5, 5, 400)])
def test_paired_interval_ends_where_the_score_test_does(lost, won, items):
    """The test's statistic with the likeliest shares at a supposed difference, which are found by trying them all."""
    for end, sign in zip(find_paired_interval(lost, won, items), (1, -1), strict=True):
        if abs(end) > 1 - 1e-9:
            continue

        def likelihood(share_lost: float, difference: float = end) -> float:
            shares = (share_lost + difference, share_lost, 1 - 2 * share_lost - difference)
            counts = (won, lost, items - won - lost)
            if any(share < -1e-15 or (share <= 1e-15 and count) for share, count in zip(shares, counts, strict=True)):
                return -math.inf
            return sum(count * math.log(share) for share, count in zip(shares, counts, strict=True) if count)

        first, last = max(0.0, -end), (1 - end) / 2
        tried = [first + (last - first) * step / 200_000 for step in range(200_001)]
        share_lost = max(tried, key=likelihood)
        error = math.sqrt(items * (2 * share_lost + end - end**2))
        assert (won - lost - items * end) / error == pytest.approx(sign * 1.959964, abs=5e-3)


@pytest.mark.parametrize(("items", "lost", "won"), [(25, 0.03, 0.0), (25, 0.1, 0.05), (100, 0.02, 0.01), (200, 0.3, 0.05)])
def test_change_is_covered_also_where_few_questions_changed(items, lost, won):
    draw, covered = random.Random(1), 0
    for _ in range(1000):
        ways = draw.choices((-1, 1, 0), (lost, won, 1 - lost - won), k=items)
        before, after = [float(way == -1) for way in ways], [float(way == 1) for way in ways]
        found = estimate_change(before, after)
        covered += found.low <= won - lost <= found.high
    assert covered >= 930


def test_degrees_of_right_are_no_narrower_than_right_and_wrong_where_few_changed():
    before, after = [0.5] * 30, [0.5] * 28 + [0.3, 0.4]
    found = estimate_change(before, after)
    low, high = find_paired_interval(2, 0, 30)
    assert found.mean == pytest.approx(-0.01)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_rise_is_weighed_by_tokens():
    before = [
        one.model_copy(update={"nll": 1.0, "num_tokens": count})
        for one, count in zip(make_predictions(0, 0), (1, 3), strict=True)
    ]
    after = [one.model_copy(update={"nll": nll}) for one, nll in zip(before, (2.0, 1.0), strict=True)]
    assert estimate_rise(before, after).mean == pytest.approx(0.25)


def test_mean_over_tasks_adds_squares():
    found = average([Estimate(0.1, 0.07, 0.2, 10), Estimate(0.3, 0.26, 0.4, 20)])
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - 0.05 / 2, 0.2 + math.hypot(0.1, 0.1) / 2))
    assert average([Estimate(0.1, None, None, 1)]).interval is None
