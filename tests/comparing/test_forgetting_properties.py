"""What is true of the metrics of every matrix, holes and unfinished runs included."""

from fractions import Fraction

import pytest
from comparing.matrices import name_tasks
from hypothesis import given
from hypothesis import strategies as st

from hftcli.comparing.forgetting import ForgettingMetrics, compute_metrics

Rows = list[list[float | None]]
SCORES = st.integers(0, 64).map(lambda part: part / 64)  # sums and differences of these are exact


@st.composite
def matrices(draw: st.DrawFn, holes: bool = True) -> Rows:
    """The base model's row, and one for each of up to five tasks."""
    num_tasks = draw(st.integers(1, 5))
    cells = draw(st.sampled_from([SCORES, SCORES | SCORES | SCORES | st.none()] if holes else [SCORES]))
    row = st.lists(cells, min_size=num_tasks, max_size=num_tasks)
    return draw(st.lists(row, min_size=num_tasks + 1, max_size=num_tasks + 1))


def measure(rows: Rows, lower_is_better: bool = False) -> ForgettingMetrics:
    return compute_metrics(name_tasks(len(rows[0])), rows, lower_is_better)


def average(values: list[Fraction | None], denominator: int | None = None) -> Fraction | None:
    return None if not values or None in values else sum(values) / (denominator or len(values))


def subtract(one: Fraction | None, other: Fraction | None) -> Fraction | None:
    return None if one is None or other is None else one - other


def measure_directly(rows: Rows) -> dict[str, Fraction | None]:
    """The definitions as the papers write them: R[t][i], t = 0 the base model, i from 1, T tasks."""
    T = len(rows[0])
    R = {(t, i + 1): None if value is None else Fraction(value) for t, row in enumerate(rows) for i, value in enumerate(row)}
    changes = [subtract(R[T, i], R[i, i]) for i in range(1, T)]
    best, peak = [], []
    for i in range(1, T):
        since, before = [R[t, i] for t in range(i, T)], [R[t, i] for t in range(i) if R[t, i] is not None]
        best.append(None if None in since else max(since))
        peak.append(None if None in since else max(since + before))
    return {
        "op": average([R[T, i] for i in range(1, T + 1)]),
        "bwt": average(changes),
        "bwt_over_t": average(changes, T),
        "bwt_clipped": None if None in changes else average([min(change, Fraction(0)) for change in changes], T),
        "forgetting": average([subtract(best[i - 1], R[T, i]) for i in range(1, T)]),
        "loss_from_peak": average([subtract(peak[i - 1], R[T, i]) for i in range(1, T)]),
        "fwt": average([subtract(R[i - 1, i], R[0, i]) for i in range(2, T + 1)]),
        "plasticity": average([R[i, i] for i in range(1, T + 1)]),
    }


@given(matrices())
def test_metrics_are_those_of_exact_fractions(rows: Rows):
    found = measure(rows).model_dump(exclude={"per_task"})
    expected = measure_directly(rows)
    assert {name for name, value in found.items() if value is None} == {
        name for name, value in expected.items() if value is None
    }
    assert found == {
        name: None if value is None else pytest.approx(float(value), abs=1e-12) for name, value in expected.items()
    }


@given(matrices())
def test_likelihoods_are_scores_the_other_way_round(rows: Rows):
    """Levels keep their sign, gains are gains."""
    nats = measure(rows, lower_is_better=True).model_dump(exclude={"per_task"})
    turned = measure([[None if value is None else -value for value in row] for row in rows]).model_dump(exclude={"per_task"})
    levels = {"op", "plasticity"}
    assert nats == {name: -value if name in levels and value is not None else value for name, value in turned.items()}


@given(matrices(holes=False), st.data())
def test_cells_before_a_task_s_own_round_count_only_where_they_are_asked_for(rows: Rows, data: st.DataObject):
    """Blanked, they leave all but the two that look back: the loss from the peak, which may fall, and forward transfer."""
    places = [(t, i) for i in range(len(rows[0])) for t in range(i + 1)]
    gone = data.draw(st.sets(st.sampled_from(places)))
    whole, holed = (
        measure(rows),
        measure([[None if (t, i) in gone else v for i, v in enumerate(row)] for t, row in enumerate(rows)]),
    )
    looking_back = {"loss_from_peak", "fwt", "per_task"}
    assert holed.model_dump(exclude=looking_back) == whole.model_dump(exclude=looking_back)
    if whole.forgetting is not None:
        assert whole.forgetting <= holed.loss_from_peak <= whole.loss_from_peak
    is_asked_for = any((0, i) in gone or (i, i) in gone for i in range(1, len(rows[0])))
    assert holed.fwt == (None if is_asked_for else whole.fwt)


@given(matrices(), st.lists(SCORES, min_size=5, max_size=5))
def test_a_task_that_is_easier_by_a_constant_moves_levels_alone(rows: Rows, shifts: list[float]):
    shifted = [[None if value is None else value + shift for value, shift in zip(row, shifts, strict=False)] for row in rows]
    levels = {"op", "plasticity", "per_task"}
    assert measure(shifted).model_dump(exclude=levels) == measure(rows).model_dump(exclude=levels)


@given(matrices(holes=False))
def test_what_is_lost_is_at_least_what_was_learned_and_lost(rows: Rows):
    found = measure(rows)
    if len(rows[0]) > 1:
        assert found.forgetting >= -found.bwt
        assert found.bwt_clipped <= min(found.bwt_over_t, 0)
        assert found.bwt_over_t * len(rows[0]) == pytest.approx(found.bwt * (len(rows[0]) - 1))


@given(matrices(holes=False), st.integers(1, 5))
def test_rounds_that_are_missing_are_rounds_that_were_not_measured(rows: Rows, num_rows: int):
    done = rows[:num_rows]
    blanked = done + [[None] * len(rows[0])] * (len(rows) - len(done))
    assert measure(done) == measure(blanked)
