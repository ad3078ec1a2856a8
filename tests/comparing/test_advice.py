"""Successive halving by hand, and what may be expected of a further seed."""

import math
from pathlib import Path

import pytest

from hftcli.comparing.advice import (
    Candidate,
    Finding,
    describe,
    expect,
    fit_steps,
    judge,
    list_candidates,
    list_rungs,
    promise_by,
    rank,
    summarize,
)
from hftcli.recipe.loading import load_recipe


def find(arm: str, learning: float, forgetting: float, num_steps: int = 9, rate: float = 1e-4) -> Finding:
    return Finding(Candidate(arm, (), rate), num_steps, learning, forgetting)


def test_the_point_that_counts_learned_most_within_the_limit():
    trail = ((0.1, 0.0), (0.3, 0.04), (0.5, 0.06), (0.4, -0.01))
    assert judge(trail, 0.05) == (0.4, -0.01)
    assert judge(trail, 0.06) == (0.5, 0.06)
    assert judge(((0.3, 0.2), (-0.1, 0.0)), 0.05) == (0.0, 0.0)  # what unlearns is no better than the start


def test_the_better_learn_more_and_of_equals_forget_less():
    findings = [find("a", 0.2, 0.0), find("b", 0.3, 0.04), find("c", 0.3, 0.01)]
    assert [one.candidate.arm for one in rank(findings)] == ["c", "b", "a"]


def test_a_third_goes_on_and_trains_three_times_as_long():
    assert list_rungs(20, 90) == [(20, 10), (6, 30), (2, 90)]
    assert list_rungs(4, 20) == [(4, 5), (2, 6), (2, 20)]


def test_steps_fit_into_the_time():
    """By hand: 20 x 10 + 6 x 30 + 2 x 90 + 3 x 90 = 830 steps and 31 runs; at 2 s a run and 0.1 s a step, 145 s."""
    assert fit_steps(20, 90, 3, 145.1, 2.0, 0.1) == 90
    assert fit_steps(20, 90, 3, 144.9, 2.0, 0.1) == 81
    assert fit_steps(20, 90, 3, 62.0, 2.0, 0.1) is None


def test_a_further_seed_is_less_sure_than_the_mean():
    """By hand: of 1, 2, 3 the mean is 2, the deviation 1, t(2) 4.3027, so 4.3027 sqrt(4/3) = 4.9683."""
    found = expect([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.9683, 2 + 4.9683), abs=1e-4)
    assert expect([1.0]).low is None


@pytest.mark.parametrize(
    ("learning", "forgetting", "leasts", "words"),
    [
        ([0.3], [0.0], [0.0], "no promise"),
        ([0.3, -0.1, 0.2], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "that it learns anything is not shown"),
        ([0.30, 0.31, 0.30], [0.01, 0.02, 0.015], [0.0, 0.001, 0.0], "that it stays within 0.02 is not shown"),
        ([0.30, 0.31, 0.30], [0.01, 0.02, 0.015], [0.01, 0.02, 0.015], "it may lose more than 0.02 at every point"),
        ([0.30, 0.31, 0.0], [0.01, 0.01, 0.0], [0.01, 0.01, math.inf], "it may lose more than 0.02 at every point"),
        ([0.30, 0.31, 0.30], [0.01, 0.011, 0.01], [0.01, 0.011, 0.01], "of a further one expect"),
    ],
)
def test_no_more_is_said_than_the_seeds_carry(learning, forgetting, leasts, words):
    promise = promise_by(list(zip(learning, forgetting, strict=True)), leasts, 0.02)
    sentence = describe(promise, 0.02)
    assert words in sentence
    assert ("not shown" in sentence) == ("not shown" in words)
    if "at every point" in words:  # a seed that keeps nothing has learned nothing
        assert promise.learning.low <= 0


def test_an_arm_goes_by_its_best_where_it_trained_longest():
    short = [find("a", 0.9, 0.0, 3), find("a", 0.1, 0.0, 3, 1e-3), find("b", 0.2, 0.0, 3)]
    long = [find("a", 0.4, 0.0, 9)]
    assert summarize({0: short, 1: long}) == [long[0], short[2]]


@pytest.mark.parametrize("named", [None, Path("kept rows.jsonl")])
def test_every_candidate_is_a_recipe(named):
    candidates = list_candidates(Path("my rows.jsonl"), named)
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    for candidate in candidates:
        recipe = load_recipe(None, ["model.path=m", *candidate.settings], "sft")
        assert (recipe.data.path or recipe.data.sources[0].path) == "my rows.jsonl"
        assert (recipe.freeze.keep is not None) == (named is not None and candidate.arm.startswith("quiet"))
        assert len(recipe.data.sources) == 2 * candidate.arm.endswith("+ replay")


@pytest.mark.parametrize(("num_named", "expected"), [(9, 64), (64, 64), (200, 200), (5000, 256)])
def test_all_rows_that_are_named_are_read_within_reason(num_named: int, expected: int):
    """Where there are fewer than 64, so many are read as there are."""
    candidates = list_candidates(Path("rows.jsonl"), Path("named.jsonl"), num_named)
    quiet = [candidate for candidate in candidates if candidate.arm.startswith("quiet")]
    for candidate in quiet:
        assert load_recipe(None, ["model.path=m", *candidate.settings], "sft").freeze.keep.samples == expected
    assert len({candidate.arm for candidate in quiet}) == 2
