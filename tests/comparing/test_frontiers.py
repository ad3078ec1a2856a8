"""Two methods at equal learning: by hand, covered as often as said, and not decided by how the points are spaced."""

import math

import numpy as np
import pytest

from hftcli.comparing.frontiers import compare_at_equal_learning, correct_by_holm, find_stretch

NUM_DRAWS = 600


def end(*points: tuple[float, float]) -> list[list[tuple[float, float]]]:
    """Runs that were measured at their ends alone, a learning rate each."""
    return [[point] for point in points]


def test_equal_learning_by_hand():
    """Both curves cover learning from 0.2 to 0.6: heights 0.2 to 0.6, mean 0.4, against 0.1 throughout."""
    first = {1: end((0.1, 0.1), (0.6, 0.6))}
    second = {1: end((0.2, 0.1), (0.5, 0.1 + 1e-12), (0.9, 0.1 + 2e-12))}
    found = compare_at_equal_learning(first, second, is_within=False)
    assert (found.low, found.high) == (0.2, 0.6)
    assert found.difference.mean == pytest.approx(0.3)
    assert found.interval is None
    assert found.p_value is None


def test_within_runs_by_hand():
    """From the start on: of lines that rise by 1 and by one half, the means to 0.4 are 0.2 and 0.1."""
    first = {1: [[(0.2, 0.2), (0.4, 0.4), (0.8, 0.8)]]}
    second = {1: [[(0.1, 0.05), (0.4, 0.2)]]}
    found = compare_at_equal_learning(first, second, is_within=True)
    assert (found.low, found.high) == (0.0, 0.4)
    assert found.difference.mean == pytest.approx(0.1)
    assert (found.least.mean, found.most.mean) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_level_is_where_learning_first_reached_it():
    """Half of the learning comes back down in between, and forgetting grows before anything is learned."""
    track = [(0.0, 0.0), (0.0, 0.3), (0.4, 0.5), (0.2, 0.6), (0.6, 0.8)]
    found = find_stretch(track, np.array([0.1, 0.39, 0.5]))
    assert found.chord == pytest.approx([0.35, 0.495, 0.75])


def test_a_convex_curve_lies_within_its_band_everywhere():
    points = [0.0, 0.1, 0.35, 0.5, 0.8, 0.95]
    track = [(x, 0.6 * x**4) for x in points]
    levels = np.linspace(0.01, 0.94, 200)
    found = find_stretch(track, levels)
    truth = 0.6 * levels**4
    assert (truth <= found.chord + 1e-12).all()
    assert (np.nanmax([found.before, found.after], axis=0) <= truth + 1e-12).all()
    # And a concave one in its own.
    found = find_stretch([(x, math.sqrt(x)) for x in points], levels)
    assert (np.sqrt(levels) >= found.chord - 1e-12).all()
    assert (np.nanmin([found.before, found.after], axis=0) >= np.sqrt(levels) - 1e-12).all()


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_two_grids_on_one_convex_curve_show_no_difference(num_seeds):
    """Chords alone would find the method with fewer learning rates to forget more, the surer the more seeds there are."""
    generator = np.random.default_rng(0)
    few, many = (0.2, 0.55, 0.9), (0.2, 0.4, 0.55, 0.7, 0.9)

    def run(rates: tuple[float, ...]) -> list[list[tuple[float, float]]]:
        return end(*((x, 0.6 * x**4 + float(generator.normal(0, 0.002))) for x in rates))

    first, second = ({seed: run(rates) for seed in range(num_seeds)} for rates in (few, many))
    found = compare_at_equal_learning(first, second, is_within=False)
    assert found.difference.low > 0
    low, high = found.interval
    assert low < 0 < high
    assert found.p_value > 0.05


def test_a_run_is_not_chosen_by_its_own_luck():
    """The seed's own run of the second rate was lucky; the other seeds chose the first."""
    runs = {seed: [[(0.5, 0.2)], [(0.5, 0.3)]] for seed in (1, 2, 3)}
    runs[1][1] = [(0.5, 0.0)]
    other = {seed: [[(0.5, 0.2)]] for seed in (1, 2, 3)}
    found = compare_at_equal_learning(runs, other, is_within=True)
    # Seeds 2 and 3 are told by seed 1 and by each other that the second rate forgets 0.15: less than 0.2.
    assert found.difference.mean == pytest.approx((0 + 0.05 + 0.05) / 3)


@pytest.mark.parametrize(("num_seeds", "is_paired"), [(3, True), (5, False)])
def test_difference_at_equal_learning_covers_the_known_one(num_seeds, is_paired):
    """The learning rates of one method teach other amounts than those of the other, and the truth is 0.05."""
    generator, covered = np.random.default_rng(4), 0

    def simulate(rates: list[float], forgets_more: float, effects: np.ndarray) -> dict[int, list[list[tuple[float, float]]]]:
        runs = {}
        for seed, effect in enumerate(effects):
            learning = np.array(rates) + generator.normal(0, 0.01, len(rates))
            forgetting = 0.5 * learning + forgets_more + effect + generator.normal(0, 0.02, len(rates))
            runs[seed] = end(*zip(learning.tolist(), forgetting.tolist(), strict=True))
        return runs

    for _ in range(NUM_DRAWS):
        effects = generator.normal(0, 0.03, (2, num_seeds))
        first = simulate([0.1, 0.3, 0.5, 0.7, 0.9], 0.05, effects[0])
        second = simulate([0.05, 0.2, 0.4, 0.65, 0.8], 0.0, effects[0 if is_paired else 1])
        if not is_paired:
            second = {seed + 100: runs for seed, runs in second.items()}
        found = compare_at_equal_learning(first, second, is_within=False)
        assert found.is_paired == is_paired
        assert found.interval[0] <= found.difference.low <= found.difference.high <= found.interval[1]
        covered += found.difference.low <= 0.05 <= found.difference.high
    assert 0.92 <= covered / NUM_DRAWS <= 0.98


def test_methods_that_never_learn_equally_much_are_not_compared():
    assert compare_at_equal_learning({1: end((0.1, 0.0), (0.2, 0.1))}, {1: end((0.3, 0.0), (0.9, 0.1))}, False) is None
    assert compare_at_equal_learning({1: end((0.5, 0.0))}, {1: end((0.5, 0.2))}, False) is None  # no line through one point
    assert compare_at_equal_learning({1: [[(-0.1, 0.0)]]}, {1: [[(0.5, 0.2)]]}, True) is None


def test_holm_by_hand():
    """The least of three counts three times, the next twice; none is less than the one before it."""
    assert correct_by_holm([0.03, None, 0.01, 0.04]) == pytest.approx([0.06, None, 0.03, 0.06])
    assert correct_by_holm([0.6, 0.7]) == [1.0, 1.0]
    assert correct_by_holm([]) == []
