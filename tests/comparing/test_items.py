"""Two models' answers compared question by question."""

import pytest
from written_runs import make_answers, make_predictions

from hftcli.comparing.items import compare_items


def test_scores_with_degrees_have_an_interval_and_no_test():
    found = compare_items(make_predictions(0.25, 0.5, 1.0), make_predictions(0.5, 0.5, 1.0))
    assert found.change.mean == pytest.approx(0.25 / 3)
    assert found.transitions is None
    assert found.p_value is None


def test_questions_with_other_numbers_of_choices_are_counted_apart():
    before = make_answers(1, 1, 0, 0) + make_answers(1, 0, num_choices=2)
    after = make_answers(0, 1, 0, 0) + make_answers(0, 1, num_choices=2)
    guessed = 2 * 3 / (4 * 3) + 1 * 1 / (2 * 1)
    assert compare_items(before, after).adjusted.lost == pytest.approx((2 - guessed) / 6)


def test_questions_without_a_score_are_not_compared():
    assert compare_items(make_predictions(1, 0), make_predictions(1, None)) is None
