"""Time per pair and memory of `hft dpo` with its three references, at share 0.5 and 1.0, against `trl dpo` with its defaults.

    python scripts/benchmark_dpo.py --model FOLDER --pairs FILE.jsonl

Pairs are {"prompt": messages, "chosen": text, "rejected": text}. All commands train the same ones
for the same epochs in batches of one size, and take turns, so that a machine whose speed drifts is fair to all. The time is
that of training with the pass of the reference. The table gives medians over the rounds and, for ratios, the median of the
ratios within a round with their range. Prints Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

REFERENCES = ("precompute", "shared", "full")
BARE = "trl dpo"


@dataclass(frozen=True)
class Measurement:
    """One whole training run.

    Attributes:
        held_bytes: weights, gradients, optimizer state and reference, as counted.
        peak_memory_bytes: as measured, with activations and libraries.
    """

    pair_s: float
    held_bytes: int
    peak_memory_bytes: int


def main() -> None:
    arguments = parse_arguments()
    if arguments.bare:
        run_bare(arguments)
        return
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.repeats):
            rounds.append(measure_round(arguments, Path(folder) / str(number)))
            print(f"round {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
    print_table(rounds, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder with a chat template")
    parser.add_argument("--pairs", required=True, help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)  # this file runs itself with it
    return parser.parse_args()


def measure_round(arguments: argparse.Namespace, folder: Path) -> dict[str, Measurement]:
    found = {BARE: measure_bare(arguments)}
    for share, reference in product((1.0, 0.5), REFERENCES):
        found[f"hft dpo, share {share}, {reference}"] = measure_hft(
            arguments, share, reference, folder / f"{share}-{reference}"
        )
    return found


def measure_hft(arguments: argparse.Namespace, share: float, reference: str, output: Path) -> Measurement:
    settings = {
        "model.path": arguments.model,
        "model.dtype": "bfloat16" if has_gpu() else "float32",
        "data.path": arguments.pairs,
        "data.max_length": arguments.max_length,
        "data.max_examples": arguments.num_pairs,
        "freeze.trainable_fraction": share,
        "reference": reference,
        "train.max_steps": -1,
        "train.num_train_epochs": arguments.epochs,
        "train.learning_rate": 1e-6,
        "train.warmup_steps": 0,
        "train.global_batch_size": arguments.batch,
        "train.per_device_train_batch_size": arguments.batch,
        "train.bf16": "true",
        "launch.num_processes": 1,
        "eval.tasks": "[]",
        "eval.held_out.path": "null",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    # A cache of its own: the reference is computed anew.
    environment = {**os.environ, "HFT_CACHE": f"{output}-cache"}
    command = [sys.executable, "-m", "hftcli", "dpo", "--output", str(output), *options]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    result = json.loads((output / "rounds" / "00-dpo" / "result.json").read_text())
    plan = [sys.executable, "-m", "hftcli", "plan", "--json", *options, "--set", "dpo.beta=0.1"]
    memory = json.loads(subprocess.run(plan, check=True, capture_output=True, text=True).stdout)["memory"]["half"]
    return Measurement(
        pair_s=(result["seconds"]["training"] + result["seconds"]["referencing"]) / (arguments.epochs * arguments.num_pairs),
        held_bytes=sum(memory[f"{part}_bytes"] for part in ("weights", "gradients", "optimizer", "reference")),
        peak_memory_bytes=result["peak_memory_bytes"],
    )


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measure_bare(arguments: argparse.Namespace) -> Measurement:
    """Run this file in a process of its own, as the bare script."""
    kept = ("model", "pairs", "num_pairs", "epochs", "batch", "max_length")
    options = [part for name in kept for part in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    done = subprocess.run([sys.executable, __file__, "--bare", *options], check=True, capture_output=True, text=True)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def run_bare(arguments: argparse.Namespace) -> None:
    """What `trl dpo` does with the same pairs: its defaults, so a second model and activation checkpointing."""
    import resource

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in Path(arguments.pairs).read_text().splitlines()[: arguments.num_pairs]]
    for row in rows:
        row |= {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    gpu = has_gpu()
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch,
        max_length=arguments.max_length,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    models = [*trainer.model.parameters(), *trainer.ref_model.parameters()]
    states = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
    gradients = [value for value in trainer.model.parameters() if value.requires_grad]
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measurement = Measurement(
        pair_s=seconds / (arguments.epochs * arguments.num_pairs),
        held_bytes=sum(value.nbytes for value in (*models, *gradients, *states)),
        peak_memory_bytes=peak,
    )
    print(json.dumps(asdict(measurement)))


def print_table(rounds: list[dict[str, Measurement]], arguments: argparse.Namespace) -> None:
    def median(name: str, field: str) -> float:
        return statistics.median(getattr(round_[name], field) for round_ in rounds)

    def ratio(name: str, below: str, field: str) -> str:
        ratios = sorted(getattr(round_[name], field) / getattr(round_[below], field) for round_ in rounds)
        return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"

    full = "hft dpo, share 1.0, full"
    print(
        f"{Path(arguments.model).name}, {arguments.num_pairs} pairs x {arguments.epochs} epochs, batches of {arguments.batch}, "
        f"at most {arguments.max_length} tokens an answer; medians of {len(rounds)} interleaved rounds; "
        "ratios: median (range) within a round\n"
    )
    print(f"| | s/pair | over {BARE} | weights, states, reference MiB | over share 1.0, full | peak memory MiB |")
    print("|---|---|---|---|---|---|")
    for name in rounds[0]:
        held, peak = (median(name, field) / 2**20 for field in ("held_bytes", "peak_memory_bytes"))
        print(
            f"| {name} | {median(name, 'pair_s'):.4f} | {ratio(name, BARE, 'pair_s')} "
            f"| {held:,.1f} | {ratio(name, full, 'held_bytes')} | {peak:,.1f} |"
        )


if __name__ == "__main__":
    main()
