"""The README's table of the quick start: full and half fine-tuning at three learning rates, three seeds each.

    python scripts/reproduce_quick_start.py [FOLDER]        about 12 minutes on two cores; finished runs are not run again

A seed draws the half and the order of the data. Prints Markdown: mean and standard deviation over the seeds, in points.
"""

import json
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

LEARNING_RATES = ("3.0e-4", "5.0e-4", "7.0e-4")
SEEDS = (1, 2, 3)
SHARES = {"full": "1.0", "half": "0.5"}
TASKS = ("tinyworld/skill", "tinyworld/facts", "tinyworld/facts-reworded")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quick-start")
    print("| learning rate | trains | skill | facts | facts, reworded |\n|---|---|---|---|---|")
    for rate, (name, share) in product(LEARNING_RATES, SHARES.items()):
        scores = [train(folder / f"{rate}-{name}-{seed}", rate, share, seed) for seed in SEEDS]
        print(
            f"| {rate} | {name} | " + " | ".join(summarize([score[task] for score in scores]) for task in TASKS) + " |",
            flush=True,
        )


def train(output: Path, rate: str, share: str, seed: int) -> dict[str, float]:
    """Points on each task after a run of the quick start."""
    settings = {"train.learning_rate": rate, "freeze.trainable_fraction": share, "freeze.seed": seed, "train.seed": seed}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    subprocess.run([sys.executable, "-m", "hftcli", "sft", "--output", str(output), *options], check=True, capture_output=True)
    after = json.loads((output / "rounds" / "00-sft" / "scores.json").read_text(encoding="utf-8"))["after"]
    return {task: 100 * after[task]["score"] for task in TASKS}


def summarize(points: list[float]) -> str:
    each = ", ".join(f"{value:.1f}" for value in points)
    return f"{statistics.mean(points):.1f} ± {statistics.stdev(points):.1f} ({each})"


if __name__ == "__main__":
    main()
