"""Reward accuracy of `hft dpo` on held-out real pairs, by seed.

    python scripts/reproduce_preferences.py --model FOLDER --pairs FILE.jsonl

Takes pairs of at most --max-characters with both answers, shuffles them by the seed, trains on the first --num-pairs and
measures on the next as many. Another seed draws other pairs, another half and another order. Prints Markdown.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder with a chat template")
    parser.add_argument("--pairs", required=True, help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--num-pairs", type=int, default=200)
    parser.add_argument("--max-characters", type=int, default=800)
    parser.add_argument("--learning-rate", default="3e-5")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--share", default="0.5")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = [line for line in Path(arguments.pairs).read_text().splitlines() if len(line) <= arguments.max_characters]
    if len(rows) < 2 * arguments.num_pairs:
        sys.exit(f"{arguments.pairs} has {len(rows)} pairs of at most {arguments.max_characters} characters")
    print("| seed | reward accuracy, points | reward margin | KL, nats/token |\n|---|---|---|---|")
    accuracies = []
    for seed in range(arguments.seeds):
        score = measure(rows, seed, arguments)
        accuracies.append(100 * score["reward_accuracy"])
        print(
            f"| {seed} | {accuracies[-1]:.1f} ± {100 * score['reward_accuracy_error']:.1f} "
            f"| {score['reward_margin']:.3f} | {score['kl']:.4f} |",
            flush=True,
        )
    print(f"| mean ± standard deviation | {statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} | | |")


def measure(rows: list[str], seed: int, arguments: argparse.Namespace) -> dict:
    """The held-out pairs' score after a run with a seed of its own."""
    drawn = random.Random(seed).sample(rows, 2 * arguments.num_pairs)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("train", drawn[: arguments.num_pairs]), ("test", drawn[arguments.num_pairs :])):
            (Path(folder) / f"{name}.jsonl").write_text("\n".join(part))
        settings = {
            "model.path": arguments.model,
            "data.path": f"{folder}/train.jsonl",
            "data.max_length": 512,
            "eval.tasks": "[]",
            "eval.held_out.path": f"{folder}/test.jsonl",
            "eval.held_out.max_examples": "null",
            "freeze.trainable_fraction": arguments.share,
            "freeze.seed": seed,
            "train.seed": seed,
            "train.max_steps": -1,
            "train.num_train_epochs": arguments.epochs,
            "train.learning_rate": arguments.learning_rate,
            "train.global_batch_size": 8,
            "train.per_device_train_batch_size": 8,
            "train.bf16": "false",
            "launch.num_processes": 1,
        }
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        output = Path(folder) / "run"
        subprocess.run(
            [sys.executable, "-m", "hftcli", "dpo", "--output", str(output), *options], check=True, capture_output=True
        )
        return json.loads((output / "rounds" / "00-dpo" / "result.json").read_text())["pairs"]["after"]


if __name__ == "__main__":
    main()
