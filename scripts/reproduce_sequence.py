"""The table of tinyworld's sequence (scripts/README.md): full and half fine-tuning and the methods, by seed.

    python scripts/reproduce_sequence.py [--output FOLDER] [--jobs 2] [NAME...]

Finished runs are not run again; a NAME takes only that row. A seed draws the half, the order of the data and what a method
draws. Each job has one thread. Prints Markdown: mean and 95 % interval (Student's t) over the seeds, in points.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FULL = {"freeze.trainable_fraction": 1.0}
SEEDS = 3
SETTINGS: dict[str, dict[str, object]] = {
    "full": FULL,
    "half": {},
    "full, replay": FULL | {"method.replay.fraction": 0.1},
    "full, EWC": FULL | {"method.ewc.strength": 4e6},  # of 4e2, 4e4, 4e6, on two of the tasks with another seed
    "full, GEM": FULL | {"method.gem": "{}"},
    "full, A-GEM": FULL | {"method.agem": "{}"},
}
T_QUANTILE = 4.303  # two-sided 95 %, three seeds
METRICS = {"op": "OP", "bwt": "BWT", "forgetting": "forgetting", "plasticity": "learned"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows: {'; '.join(SETTINGS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/sequence"))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.names or list(SETTINGS)
    jobs = [(name, seed) for name in names for seed in range(SEEDS)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = dict(zip(jobs, pool.map(lambda job: measure(arguments.output, *job), jobs), strict=True))
    print(f"| trains | seeds | {' | '.join(METRICS.values())} | facts known at the end |\n|{'---|' * (len(METRICS) + 3)}")
    for name in names:
        values = [found[name, seed] for seed in range(SEEDS)]
        cells = [describe([100 * value[metric] for value in values]) for metric in METRICS]
        facts = describe([100 * value["general"]["tinyworld/facts"]["last"] for value in values])
        print(f"| {name} | {len(values)} | {' | '.join(cells)} | {facts} |")


def measure(folder: Path, name: str, seed: int) -> dict:
    """The report of a run."""
    output = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    settings = {**SETTINGS[name], "freeze.seed": seed, "train.seed": seed}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    hft = [sys.executable, "-m", "hftcli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*hft, "continual", "--output", str(output), *options], check=True, capture_output=True, env=environment)
    print(f"{output} is done", file=sys.stderr, flush=True)
    return json.loads(subprocess.run([*hft, "report", str(output), "--json"], check=True, capture_output=True).stdout)


def describe(values: list[float]) -> str:
    half_width = T_QUANTILE * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1f} ± {half_width:.1f}"


if __name__ == "__main__":
    main()
