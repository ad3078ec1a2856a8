"""How often `hft compare` says what is not so, and how often it finds what is: simulated, with known curves.

    python scripts/simulate_comparison.py [--draws 1000] [--output scripts/comparison.json] [--figure .github/comparison.svg]

Two methods have a curve of forgetting over learning, convex or a line. A run of a learning rate ends at a place on it; which
place depends on the rate, what is measured there on the seed, shared by all runs of it, and on the questions, new in each run.
Grids have 2 to 9 learning rates, which reach over the same learning. Where the curves are the same, every difference that is
shown is false, and the pairs are compared as `hft compare` does it. Where one method forgets half as much, it should be found.
"""

import argparse
import json
import time
from itertools import combinations
from pathlib import Path

import numpy as np

from hftcli.comparing.frontiers import compare_at_equal_learning, correct_by_holm

CURVES = {"linear": lambda learning: 0.6 * learning, "convex": lambda learning: 0.6 * learning**4}
GRIDS = ((3, 5), (2, 9), (9, 9), (2, 3, 5, 9))
SEEDS = (3, 5, 10)
SPREAD = 0.02  # of a seed's learning and forgetting, standard deviation
NUM_QUESTIONS = 400  # behind a score: the error of what is measured
NUM_POINTS = 15  # measured within a run
FIRST, LAST = 0.15, 0.95  # learning at the end of the runs with the lowest and the highest rate
LEVEL = 0.05


def measure(draw: np.random.Generator, share: np.ndarray) -> np.ndarray:
    """A share, as so many questions show it."""
    return draw.binomial(NUM_QUESTIONS, np.clip(share, 0, 1)) / NUM_QUESTIONS


def draw_method(
    draw: np.random.Generator, curve: str, factor: float, num_rates: int, seeds: dict[int, tuple[float, float]], within: bool
) -> dict[tuple[int, ...], list[list[tuple[float, float]]]]:
    """By seed, the trail of each learning rate's run.

    Args:
        seeds: how far a seed's learning and forgetting lie beside the curve; it fades in as a run learns.
    """
    found = {}
    for seed, (apart, above) in seeds.items():
        trails = []
        for end in np.linspace(FIRST, LAST, num_rates):
            steps = np.arange(1, NUM_POINTS + 1) / NUM_POINTS if within else np.ones(1)
            reached = np.clip(steps * (end + apart), 0, 1)
            lost = factor * CURVES[curve](reached) + above * reached
            trails.append([*zip(measure(draw, reached).tolist(), measure(draw, lost).tolist(), strict=True)])
        found[seed,] = trails
    return found


def count_claims(draw: np.random.Generator, curve: str, factors: tuple[float, ...], grid: tuple[int, ...], num_seeds: int,
                 within: bool) -> tuple[int, int, bool, bool]:  # fmt: skip
    """Of one draw: pairs, pairs with a difference shown, and whether the first pair's was shown, and as less for the first."""
    seeds = {seed: (draw.normal(0, SPREAD), draw.normal(0, SPREAD)) for seed in range(num_seeds)}
    methods = []
    for factor, num_rates in zip(factors, grid, strict=True):
        # Half of a seed's spread is its own in each method: the order of the data is shared, the half that trains is not.
        own = {seed: tuple((value + draw.normal(0, SPREAD)) / np.sqrt(2) for value in values) for seed, values in seeds.items()}
        methods.append(draw_method(draw, curve, factor, num_rates, own, within))
    found = [compare_at_equal_learning(one, other, within) for one, other in combinations(methods, 2)]
    p_values = correct_by_holm([pair.p_value if pair else None for pair in found])
    shown = [p_value is not None and p_value < LEVEL for p_value in p_values]
    return len(shown), sum(shown), shown[0], bool(shown[0] and found[0] and found[0].difference.mean < 0)


def draw_figure(rows: list[dict], path: Path) -> None:
    """False and true differences that were shown, a dot for each grid and number of seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    kinds = [("at their ends", "linear"), ("at their ends", "convex"), ("within the runs", "linear"),
             ("within the runs", "convex")]  # fmt: skip
    parts = (("false_any", 0.05, "false: shown where the curves are one"), ("found", 0.8, "found: one forgets half as much"))
    for axes, (key, limit, title) in zip(figure.subplots(1, 2, sharey=True), parts, strict=True):
        for place, kind in enumerate(reversed(kinds)):
            values = [100 * row[key] for row in rows if (row["measured"], row["curve"]) == kind and key in row]
            axes.plot(values, [place] * len(values), "o", color="#0072b2", markersize=5, alpha=0.5)
        axes.axvline(100 * limit, color="#d55e00", linewidth=1.2, linestyle="--")
        axes.set_title(f"{title}, % of draws", fontsize=9)
        axes.set_yticks(range(len(kinds)), [f"{measured}, {curve}" for measured, curve in reversed(kinds)], fontsize=9)
        axes.set_xlim(-0.3 if key == "false_any" else -3, 6 if key == "false_any" else 103)
        axes.set_ylim(-0.6, len(kinds) - 0.4)
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hft"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--draws", type=int, default=1000, help="0 draws the figure anew from the result that is there")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("comparison.json"))
    parser.add_argument("--figure", type=Path, default=Path(__file__).parent.parent / ".github" / "comparison.svg")
    asked = parser.parse_args()
    if asked.draws == 0:
        draw_figure(json.loads(asked.output.read_text(encoding="utf-8")), asked.figure)
        return
    rows, started = [], time.perf_counter()
    for case, (within, curve, grid, num_seeds) in enumerate(
        (within, curve, grid, num_seeds)
        for within in (False, True) for curve in CURVES for grid in GRIDS for num_seeds in SEEDS
    ):  # fmt: skip
        draw = np.random.default_rng(case)
        same = [count_claims(draw, curve, (1.0,) * len(grid), grid, num_seeds, within) for _ in range(asked.draws)]
        row = {
            "measured": "within the runs" if within else "at their ends", "curve": curve, "rates": grid, "seeds": num_seeds,
            "pairs": same[0][0], "draws": asked.draws,
            "false_pairs": sum(shown for _, shown, *_ in same) / sum(pairs for pairs, *_ in same),
            "false_any": sum(shown > 0 for _, shown, *_ in same) / asked.draws,
        }  # fmt: skip
        if len(grid) == 2:
            half = [count_claims(draw, curve, (0.5, 1.0), grid, num_seeds, within) for _ in range(asked.draws)]
            row["found"] = sum(is_less for *_, is_less in half) / asked.draws
        rows.append(row)
        print(json.dumps(row), f"{time.perf_counter() - started:.0f} s", flush=True)
    asked.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw_figure(rows, asked.figure)


if __name__ == "__main__":
    main()
