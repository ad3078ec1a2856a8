"""Two methods at equal learning, along curves of which only points are known.

A method's curve is forgetting over learning. Between two of its points a chord lies above a convex curve, the more so the
farther they are apart, so that chords would find the method with fewer learning rates to forget more. What is known between two
points is a band: a convex curve lies below its chord, and above the chords of the neighbours, prolonged; a concave one the
other way round. A difference is claimed only where the bands are apart.

    tracks of a seed      measured within runs: a track for each run, from the start on, where learning and forgetting are 0
                          measured at the ends of runs alone: one track through the ends, by learning
    choice of a track     at each level of learning, the one with the least forgetting by the mean of the other seeds: a track
                          chosen by its own luck would be flattered, and the more so the more there are

Shapes: G levels of learning.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hftcli.comparing.statistics import Estimate, Seed, estimate_difference, estimate_mean, find_frontier

NUM_LEVELS = 100  # of learning, at which curves are read
NUM_PARTS = 5  # of the range of learning: in each the bands are averaged, so that chance at single points makes none wide
ORIGIN = (0.0, 0.0)

Trail = Sequence[tuple[float, float]]  # learning and forgetting of one run: what was measured within it, its end the last
Track = Sequence[tuple[float, float]]
Array = np.ndarray


@dataclass(frozen=True)
class Stretch:
    """What the points say of forgetting at levels of learning (G,); NaN where the track does not reach, or has no neighbour.

    Attributes:
        chord: of the two points about a level.
        before, after: the chords of the neighbours, prolonged.
        least, most: forgetting at the two points.
        turns: 1 where the neighbours' chords rise on one side and fall on the other, so that the curve turns back, else 0.
    """

    chord: Array
    before: Array
    after: Array
    least: Array
    most: Array
    turns: Array


@dataclass(frozen=True)
class EqualLearning:
    """How much more the first method forgets than the second, where both learn equally much.

    Attributes:
        difference: forgetting of the first less that of the second, mean over the range of learning, along the chords.
        least, most: the same with the bands' ends: at least so much, and at most.
        low, high: the range of learning.
        is_paired: whether the seeds are the same, so that each is compared with itself.
        is_within: whether the curves were measured within the runs.
        p_value: two-sided, that the bands are apart as far as they are by chance; None with one seed.
    """

    difference: Estimate
    least: Estimate
    most: Estimate
    low: float
    high: float
    is_paired: bool
    is_within: bool
    p_value: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """From the lower end of the interval of the least to the upper end of that of the most; None with one seed."""
        if self.least.low is None or self.most.high is None:
            return None
        return self.least.low, self.most.high


def compare_at_equal_learning(
    first: Mapping[Seed, Sequence[Trail]], second: Mapping[Seed, Sequence[Trail]], is_within: bool
) -> EqualLearning | None:
    """Compare two methods along their curves.

    Args:
        first: by seed, the trail of each setting, the settings in the same order for each seed.
        second: the same of the other method.
        is_within: whether trails hold what was measured within the runs; if not, each is one point.

    Returns:
        None where there is no learning that all seeds of both reach.
    """
    methods = (first, second)
    tracks = [_lay_tracks(method, is_within) for method in methods]
    if is_within:
        low, high = 0.0, min(_find_reach(method) for method in tracks)
    else:
        ends = [[x for x, _ in seed[0][1:]] for method in tracks for seed in method.values()]
        low, high = max(0.0, *map(min, ends)), min(map(max, ends))
    if low >= high:
        return None
    levels_G = np.linspace(low, high, NUM_LEVELS + 1)
    levels_G = (levels_G[1:] + levels_G[:-1]) / 2
    stretches = [_choose_stretches(method, levels_G) for method in tracks]
    levels = [{seed: float(np.mean(part.chord)) for seed, part in method.items()} for method in stretches]
    (first_below, first_above), (second_below, second_above) = (_find_widths(list(method.values())) for method in stretches)
    is_paired = first.keys() == second.keys()
    if is_paired:
        difference = estimate_mean([levels[0][seed] - levels[1][seed] for seed in first])
    else:
        difference = estimate_difference(list(levels[0].values()), list(levels[1].values()))
    least = _shift(difference, -first_below - second_above)
    most = _shift(difference, first_above + second_below)
    return EqualLearning(difference, least, most, low, high, is_paired, is_within, find_p_value(least, most))


def _shift(estimate: Estimate, distance: float) -> Estimate:
    low, high = estimate.low, estimate.high
    if low is not None and high is not None:
        low, high = low + distance, high + distance
    return replace(estimate, mean=estimate.mean + distance, low=low, high=high)


def find_p_value(least: Estimate, most: Estimate) -> float | None:
    """Of the nearer end of the band: one-sided that it is on the other side of 0, doubled for the two sides, at most 1."""
    if least.interval is None or most.interval is None:
        return None
    from scipy.special import stdtr  # takes a fifth of a second, which most commands need not pay

    sides = []
    for estimate, sign in ((least, -1), (most, 1)):
        distance = sign * estimate.mean
        if estimate.error:
            sides.append(float(stdtr(estimate.num_free, distance / estimate.error)))
        else:
            sides.append(0.0 if distance < 0 else 1.0)
    return min(1.0, 2 * min(sides))


def correct_by_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over the pairs that were compared: a pair's p value among so many of them."""
    known = sorted((value, place) for place, value in enumerate(p_values) if value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    reached = 0.0
    for rank, (value, place) in enumerate(known):
        reached = max(reached, min(1.0, value * (len(known) - rank)))
        corrected[place] = reached
    return corrected


def _lay_tracks(method: Mapping[Seed, Sequence[Trail]], is_within: bool) -> dict[Seed, list[Track]]:
    """From the start, where learning and forgetting are 0."""
    if is_within:
        return {seed: [(ORIGIN, *trail) for trail in trails] for seed, trails in method.items()}
    tracks: dict[Seed, list[Track]] = {}
    for seed, trails in method.items():
        judges = [other for other in method if other != seed] or [seed]
        means = [tuple(np.mean([method[judge][place][-1] for judge in judges], axis=0)) for place in range(len(trails))]
        ends = [trails[place][-1] for place in find_frontier(means)]
        tracks[seed] = [(ORIGIN, *_merge_equal(ends))]
    return tracks


def _merge_equal(points: Trail) -> list[tuple[float, float]]:
    """In the order of learning, with the mean forgetting where several learned the same."""
    found: dict[float, list[float]] = {}
    for learning, forgetting in points:
        found.setdefault(learning, []).append(forgetting)
    return [(learning, float(np.mean(found[learning]))) for learning in sorted(found)]


def _find_reach(method: Mapping[Seed, Sequence[Track]]) -> float:
    """The most that every seed learned in a run of one setting."""
    num_tracks = len(next(iter(method.values())))
    return max(min(max(x for x, _ in tracks[place]) for tracks in method.values()) for place in range(num_tracks))


def _choose_stretches(method: Mapping[Seed, Sequence[Track]], levels_G: Array) -> dict[Seed, Stretch]:
    """For each seed what the track says that the other seeds choose at each level."""
    found = {seed: [find_stretch(track, levels_G) for track in tracks] for seed, tracks in method.items()}
    chosen, places_G = {}, np.arange(len(levels_G))
    for seed, own in found.items():
        judges = [other for other in found if other != seed] or [seed]
        costs = np.array([np.mean([found[judge][place].chord for judge in judges], axis=0) for place in range(len(own))])
        costs[np.isnan([part.chord for part in own]) | np.isnan(costs)] = np.inf  # a seed does not reach
        best_G = costs.argmin(0)
        chosen[seed] = Stretch(*(np.array([vars(part)[key] for part in own])[best_G, places_G] for key in vars(own[0])))
    return chosen


def find_stretch(track: Track, levels_G: Array) -> Stretch:
    """What the points of a track say of forgetting at levels of learning.

    Along a run, a level is where learning first reached it: between the measured point that did and the one before. Through the
    ends of runs, the points are in the order of learning already.
    """
    reached, reaches, pieces = track[0][0], [], []
    for place in range(1, len(track)):
        (x0, y0), (x1, y1) = track[place - 1], track[place]
        if x1 <= reached:
            continue
        reached = x1
        before = _find_slope(track, place - 1, range(place - 2, -1, -1), x1 - x0)
        after = _find_slope(track, place, range(place + 1, len(track)), x1 - x0)
        reaches.append(x1)
        # Where each line is at 0, and its slope; then the two points, and whether the curve turns back.
        lines = [(y - slope * x, slope) for x, y, slope in ((x0, y0, (y1 - y0) / (x1 - x0)), (x0, y0, before), (x1, y1, after))]
        pieces.append([part for line in lines for part in line] + [min(y0, y1), max(y0, y1), float(before * after < 0)])
    pieces.append([np.nan] * 9)
    place_G = np.searchsorted(reaches, levels_G)
    starts_3G, slopes_3G, (least, most, turns) = np.split(np.array(pieces)[place_G].T[[0, 2, 4, 1, 3, 5, 6, 7, 8]], 3)
    chord, before_G, after_G = starts_3G + slopes_3G * levels_G
    return Stretch(chord, before_G, after_G, least, most, turns)


def _find_slope(track: Track, place: int, others: Iterable[int], width: float) -> float:
    """Of the chord from a point to the first of the others that is as far from it in learning as the chord is to be prolonged.

    Prolonged farther than it reaches, a chord would carry chance farther than it says something. Where none is so far, the
    farthest will do; NaN where none is apart.
    """
    x, y = track[place]
    slope, reach = math.nan, 0.0
    for other in others:
        run = abs(track[other][0] - x) if (track[other][0] > x) == (other > place) else 0.0
        if run > reach:
            slope, reach = (track[other][1] - y) / (track[other][0] - x), run
        if reach >= width:
            break
    return slope


def _find_widths(seeds: Sequence[Stretch]) -> tuple[float, float]:
    """How far the curve may lie below and above the chords, mean over the levels of learning.

    By what the seeds say in the mean, which differs less by chance than what each says. Where the neighbours' chords are below
    the chord, the curve is convex and lies above both of them; where they are above it, concave and below both. Else it turns
    in between, and may be anywhere among them. It does not leave the range of its two points, unless it is seen to turn back.
    """
    chord_G, *ends, turns_G = (_average([vars(part)[key] for part in seeds]) for key in vars(seeds[0]))
    before, after, least, most = (_average(list((values_G - chord_G).reshape(NUM_PARTS, -1).T)) for values_G in ends)
    lines = np.array([np.where(np.isnan(line), other, line) for line, other in ((before, after), (after, before))])
    is_alone = np.isnan(lines).any(0)  # no neighbour on either side
    lowest, highest = (np.where(is_alone, end, line) for end, line in ((least, lines.min(0)), (most, lines.max(0))))
    is_convex, is_concave = ~is_alone & (highest <= 0), ~is_alone & (lowest >= 0)
    low = np.where(is_convex, highest, np.where(is_concave, 0.0, np.minimum(lowest, 0.0)))
    high = np.where(is_convex, 0.0, np.where(is_concave, lowest, np.maximum(highest, 0.0)))
    stays = turns_G.reshape(NUM_PARTS, -1).mean(1) < 0.5
    low, high = np.where(stays, np.maximum(low, least), low), np.where(stays, np.minimum(high, most), high)
    return -float(low.mean()), float(high.mean())


def _average(arrays: Sequence[Array]) -> Array:
    """The mean of those that are there; NaN where none is."""
    stacked = np.array(arrays)
    counts = (~np.isnan(stacked)).sum(0)
    return np.where(counts > 0, np.nansum(stacked, axis=0) / np.maximum(counts, 1), np.nan)
