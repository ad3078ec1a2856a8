"""The experiment on a real model (scripts/README.md): learning to follow instructions against forgetting what was known.

    python scripts/reproduce_instructions.py --model FOLDER --data FOLDER [--output FOLDER]

The model is a small chat model, such as MiniMind2-Small. The data folder holds sft/dolly3k.jsonl (conversations, the last forty
of which are held out), eval/arc_easy_test.jsonl and eval/nq_open_val.jsonl. Full and half fine-tuning take two learning rates
with three seeds each, two runs at a time; finished runs are not run again. What is learned and
what is forgotten is measured by likelihood, at four places of each run. Prints the comparison, and Markdown with mean and 95 %
interval (Student's t) over the seeds.
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

HFT = [sys.executable, "-m", "hftcli"]
SHARES = {"full": 1.0, "half": 0.5}
RATES = ("1e-5", "5e-5")
SEEDS = 3
NUM_HELD_OUT = 40
T_QUANTILE = 4.303  # two-sided 95 %, three seeds
HELD_OUT = "held-out rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/instructions"))
    arguments = parser.parse_args()
    folder, data = arguments.output, arguments.data.resolve()
    tasks = {name: data / "eval" / f"{name}.jsonl" for name in ("arc_easy_test", "nq_open_val")}
    folder.mkdir(parents=True, exist_ok=True)
    rows = (data / "sft" / "dolly3k.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:-NUM_HELD_OUT]))
    (folder / "held-out.jsonl").write_text("".join(rows[-NUM_HELD_OUT:]))
    settings = {
        "model.path": arguments.model.resolve(),
        "data.path": folder / "train.jsonl",
        "data.name": "null",
        "data.max_length": 160,
        "train.max_steps": 30,
        "train.global_batch_size": 4,
        "train.per_device_train_batch_size": 4,
        "checkpoint.format": "delta",
        "eval.tasks": f"[{', '.join(map(str, tasks.values()))}]",
        "eval.max_examples": 50,
        "eval.num_points": 4,
        "eval.held_out.path": folder / "held-out.jsonl",
    }
    with ThreadPoolExecutor(len(SHARES)) as pool:
        grids = list(
            pool.map(lambda name: run_grid(folder / name, settings | {"freeze.trainable_fraction": SHARES[name]}), SHARES)
        )
    runs = [run for grid in grids for run in grid]
    subprocess.run([*HFT, "compare", *runs, "--by", "nll", "--figure", str(folder / "frontier.svg")], check=True)
    print_table(runs, tasks)


def run_grid(folder: Path, settings: dict[str, object]) -> list[str]:
    """The folders of all runs, finished."""
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    grid = ["--recipe", "smollm2", "--vary", f"train.learning_rate={','.join(RATES)}", "--seeds", str(SEEDS)]
    command = [*HFT, "compare", *grid, *options, "--by", "nll", "--output", str(folder), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    return [run["run"] for settings in found["methods"].values() for setting in settings for run in setting["runs"]]


def print_table(runs: list[str], tasks: dict[str, Path]) -> None:
    """Gains and losses of likelihood in nats per token; scores in points."""
    arc, nq = (str(path) for path in tasks.values())
    print("| learning rate | trains | held-out rows, gain | ARC-easy, loss | NQ-open, loss | ARC-easy, points lost |")
    print(f"|{'---|' * 6}")
    for rate in RATES:
        for name in SHARES:
            scores = [
                json.loads((Path(run) / "rounds" / "00-sft" / "scores.json").read_text())
                for run in runs
                if f"{name}/learning_rate={rate}-" in run
            ]
            gain = describe([-change(score, HELD_OUT, "nll") for score in scores], 3)
            losses = [describe([change(score, task, "nll") for score in scores], 3) for task in (arc, nq)]
            points = describe([-100 * change(score, arc, "score") for score in scores], 1)
            print(f"| {rate} | {name} | {gain} | {losses[0]} | {losses[1]} | {points} |")


def change(scores: dict, task: str, kind: str) -> float:
    return scores["after"][task][kind] - scores["before"][task][kind]


def describe(values: list[float], decimals: int) -> str:
    half_width = T_QUANTILE * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.{decimals}f} ± {half_width:.{decimals}f}"


if __name__ == "__main__":
    main()
