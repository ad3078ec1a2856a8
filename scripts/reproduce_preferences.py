"""Preferences against knowledge: what DPO of all weights, of half and of the quiet half learns of pairs, and what it loses.

    python scripts/reproduce_preferences.py [--model FOLDER --pairs FILE --texts FILE] [--output FOLDER] [--jobs 2]

By itself, the embedded model learns to answer politely, 60 steps of 32 pairs, and is asked its 800 facts in two wordings
(fifteen seconds of one core for a run). With a model, such as MiniMind2-Small: one pass over 96 real pairs of at most 800
characters with both answers, in batches of 8, and 96 others to measure on, drawn by the seed; what is known is how 16 texts of
the kind that the model was made for go on, as in reproduce_stream.py (three minutes of one core for a run).

Every arm at each of its learning rates, five seeds, each run measured at four places. A run that preferences.json beside this
file has is not run again. The tables of scripts/README.md are made of it.
"""

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from reproduce_skill import FREEZES
from reproduce_stream import DEFENDED, MAX_LENGTH, WAYS, Stream, read_lines, run_hft

RESULTS = Path(__file__).with_name("preferences.json")
EMBEDDED = "tinyworld"
SEEDS = (1, 2, 3, 4, 5)
NUM_PAIRS = 96
MAX_CHARACTERS = 800
RATES = {
    EMBEDDED: {"full": (5e-5, 1e-4, 2e-4), "half": (1e-4, 2e-4, 4e-4), "quiet": (2e-4, 4e-4, 8e-4)},  # margins of about a size
    "MiniMind2-Small": dict.fromkeys(DEFENDED, (3e-5, 1e-4)),
}
REAL = {
    "data.max_length": 512, "train.max_steps": -1, "train.num_train_epochs": 1, "train.global_batch_size": 8,
    "train.per_device_train_batch_size": 8, "eval.held_out.max_examples": "null",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="with a chat template; without, the embedded model")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="JSONL with text or messages")
    parser.add_argument("--output", type=Path, default=Path("runs/preferences"), metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    model = arguments.model.name if arguments.model else EMBEDDED
    if model not in RATES:
        parser.error(f"--model {arguments.model}: learning rates are known for {', '.join(RATES)}")
    if arguments.model and not (arguments.pairs and arguments.texts):
        parser.error("--model needs --pairs and --texts")
    folder = arguments.output / model
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.model:
        Stream(arguments.model, folder, tasks=(), max_length=MAX_LENGTH).write_rows({}, arguments.texts)
        lines = read_lines(arguments.pairs)
        for seed in SEEDS:
            write_pairs(folder / f"pairs-{seed}", lines, seed)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = results.setdefault(model, {})
    missing = [
        (arm, rate, seed)
        for arm in DEFENDED
        for rate in RATES[model][arm]
        for seed in SEEDS
        if all(run["seed"] != seed for run in found.get(arm, {}).get(f"{rate:g}", ()))
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = pool.map(lambda job: measure(arguments.model, folder, *job), missing)
        for (arm, rate, _), run in zip(missing, runs, strict=True):
            found.setdefault(arm, {}).setdefault(f"{rate:g}", []).append(run)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def write_pairs(folder: Path, lines: list[str], seed: int) -> None:
    """Pairs to train on and as many others to measure on."""
    short = [line for line in lines if len(line) <= MAX_CHARACTERS]
    drawn = random.Random(seed).sample(short, 2 * NUM_PAIRS)
    folder.mkdir(exist_ok=True)
    for name, part in (("train", drawn[:NUM_PAIRS]), ("test", drawn[NUM_PAIRS:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def measure(model: Path | None, folder: Path, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """A run.

    Returns:
        Reward accuracy on held-out pairs, in points, the margin of the rewards and the KL to the start in nats per token; how
        much less likely the answers to what was known became, in nats per token; and the margin and that loss within the run.
    """
    output = folder / f"{arm}-{rate:g}-{seed}"
    given: dict[str, object] = {
        "train.learning_rate": rate, "train.seed": seed, "freeze.seed": seed, "train.bf16": "false", "launch.num_processes": 1,
        "eval.generate": "false", "eval.num_points": 4,
    }  # fmt: skip
    if model is None:
        given |= FREEZES[arm].given
    else:
        pairs = folder / f"pairs-{seed}"
        given |= WAYS[arm] | REAL | {
            "model.path": model, "data.path": pairs / "train.jsonl", "eval.held_out.path": pairs / "test.jsonl",
            "eval.tasks": f"[{folder / 'known.jsonl'}]",
        }  # fmt: skip
    options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    run_hft(["dpo", "--recipe", "tinyworld-dpo", "--output", str(output), *options])
    round_ = output / "rounds" / "00-dpo"
    scores = json.loads((round_ / "scores.json").read_text(encoding="utf-8"))
    pairs_after = json.loads((round_ / "result.json").read_text(encoding="utf-8"))["pairs"]["after"]

    def find_loss(now: dict[str, Any]) -> float:
        return fmean(now[name]["nll"] - start["nll"] for name, start in scores["before"].items())

    found = {
        "accuracy": 100 * pairs_after["reward_accuracy"], "margin": pairs_after["reward_margin"], "kl": pairs_after["kl"],
        "lost": find_loss(scores["after"]),
    }  # fmt: skip
    print(f"{output.name}: accuracy {found['accuracy']:.1f}, lost {found['lost']:+.3f}", file=sys.stderr, flush=True)
    trail = [(point["pairs"]["reward_margin"], find_loss(point["scores"])) for point in scores["points"]]
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {"seed": seed} | rounded | {"trail": [[round(value, 4) for value in place] for place in trail]}


if __name__ == "__main__":
    main()
