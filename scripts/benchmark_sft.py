"""Speed, memory and start-up of `hft sft` at share 1.0 and 0.5, against a bare TRL script with the same settings.

    python scripts/benchmark_sft.py --model FOLDER --rows FILE.jsonl                 a real model, on this machine
    python scripts/benchmark_sft.py --shape 1b --rows FILE.jsonl                     random weights, where a GPU is at hand

Rows have `messages`, of which the first two turns serve, or `prompt` and `completion`. The three commands take turns, so that a
machine whose speed drifts is fair to all; the table gives medians over the rounds and, for ratios, the median of the ratios
within a round with their range. Nothing is in a cache when a command starts, so that all of them tokenize. Prints Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
}
VOCABULARY = 32000


@dataclass(frozen=True)
class Measurement:
    """One whole training run.

    Attributes:
        phases_s: by the name of a part of the start-up, the seconds since the command at which it was over.
    """

    tokens_per_s: float
    step_s: float
    peak_memory_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    phases_s: dict[str, float]

    @property
    def start_s(self) -> float:
        """From the command to the first step."""
        return max(self.phases_s.values())


def main() -> None:
    arguments = parse_arguments()
    if arguments.bare:
        run_bare(arguments)
        return
    arguments.float32 |= not is_faster_in_bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.shape:
            arguments.model = make_random_model(arguments.shape, Path(folder) / "model")
        arguments.rows = write_plain_rows(Path(arguments.rows), Path(folder) / "rows.jsonl")
        share = plan_share(arguments)
        rounds = []
        for number in range(arguments.repeats):
            rounds.append(
                {
                    "bare TRL": measure_bare(arguments),
                    "hft, share 1.0": measure_hft(arguments, 1.0, Path(folder) / f"full-{number}"),
                    "hft, share 0.5": measure_hft(arguments, 0.5, Path(folder) / f"half-{number}"),
                }
            )
            print(f"round {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
    print_table(rounds, share, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="a Hugging Face folder")
    start.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--rows", required=True, help="JSONL with messages, or with prompt and completion")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="sequences in an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences in a forward pass")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--float32", action="store_true", help="also where the device is faster in bfloat16")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)  # this file runs itself with it
    return parser.parse_args()


def write_plain_rows(source: Path, target: Path) -> str:
    """The rows as plain prompt and completion, so that no chat template can make a difference."""
    with target.open("w", encoding="utf-8") as file:
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "messages" in row:
                turns = [message["content"] for message in row["messages"] if message["role"] != "system"]
                row = {"prompt": turns[0] + "\n", "completion": turns[1]}
            file.write(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n")
    return str(target)


def hft_settings(arguments: argparse.Namespace, share: float) -> list[str]:
    settings = {
        "model.path": arguments.model,
        "model.dtype": "bfloat16" if has_gpu() else "float32",
        "data.path": arguments.rows,
        "data.max_length": arguments.max_length,
        "freeze.trainable_fraction": share,
        "train.max_steps": arguments.steps,
        "train.global_batch_size": arguments.batch,
        "train.per_device_train_batch_size": arguments.micro_batch,
        "train.learning_rate": 2e-5,
        "train.logging_steps": 1,
        "train.packing": "true",
        "train.activation_checkpointing": str(arguments.activation_checkpointing).lower(),
        "launch.num_processes": 1,
        "eval.tasks": "[]",
        "train.bf16": str(not arguments.float32).lower(),
    }
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def is_faster_in_bfloat16() -> bool:
    from hftcli.models.device import is_faster_in_bfloat16

    return is_faster_in_bfloat16()


def plan_share(arguments: argparse.Namespace) -> float:
    """The trainable share that `hft plan` computes."""
    command = [sys.executable, "-m", "hftcli", "plan", "--json", *hft_settings(arguments, 0.5)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["trainable_fraction"]


def measure_hft(arguments: argparse.Namespace, share: float, output: Path) -> Measurement:
    command = [sys.executable, "-m", "hftcli", "sft", "--output", str(output), *hft_settings(arguments, share)]
    environment = {**os.environ, "HFT_CACHE": str(output.with_suffix(".cache"))}
    started = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    begun = watch_phases(process, output / "rounds" / "00-sft")
    result = json.loads((output / "rounds" / "00-sft" / "result.json").read_text())
    ends = zip(begun, [*begun.values()][1:], strict=False)
    return Measurement(
        tokens_per_s=result["num_tokens"] / result["seconds"]["training"],
        step_s=result["seconds"]["training"] / result["num_steps"],
        peak_memory_bytes=result["peak_memory_bytes"],
        gradient_bytes=result["gradient_bytes"],
        optimizer_bytes=result["optimizer_bytes"],
        phases_s={phase: end - started for phase, end in ends},
    )


def watch_phases(process: subprocess.Popen, round_: Path) -> dict[str, float]:
    """The times, in seconds since the epoch, at which the parts of a start-up began, in their order; waits for the end."""
    begun = {"front": time.time()}
    while process.poll() is None:
        time.sleep(0.01)
        if "imports" not in begun and (round_ / "round.json").exists():
            begun["imports"] = time.time()
        if "training" not in begun and (round_ / "progress.json").exists():
            begun.setdefault(json.loads((round_ / "progress.json").read_text())["phase"], time.time())
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} ended with {process.returncode}")
    return begun


def measure_bare(arguments: argparse.Namespace) -> Measurement:
    """Run this file in a process of its own, as the bare script."""
    command = [sys.executable, __file__, "--bare", "--model", arguments.model, "--rows", arguments.rows]
    command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    command += ["--micro-batch", str(arguments.micro_batch)]
    command += ["--max-length", str(arguments.max_length)]
    command += ["--activation-checkpointing"] if arguments.activation_checkpointing else []
    command += ["--float32"] if arguments.float32 else []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_DATASETS_CACHE": cache}
        started = time.time()
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    phases_s = {phase: end - started for phase, end in found.pop("ends").items()}
    return Measurement(**found, phases_s=phases_s)


def run_bare(arguments: argparse.Namespace) -> None:
    """What a user of TRL would write, with the settings that `hft` is given."""
    import resource

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Start(TrainerCallback):
        def on_step_begin(self, *_, **__):
            ends.setdefault("set-up", time.time())

    ends = {"imports": time.time()}
    rows = [json.loads(line) for line in Path(arguments.rows).read_text().splitlines()]
    gpu = has_gpu()
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=arguments.steps,
        learning_rate=2e-5,
        warmup_steps=0.03,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
        packing=True,
        max_length=arguments.max_length,
        activation_checkpointing=arguments.activation_checkpointing,
        bf16=not arguments.float32,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=42,
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        callbacks=[Start()],
    )
    ends["model and tokenizing"] = time.time()
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    states = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measurement = {
        "tokens_per_s": trainer.state.log_history[-2]["num_tokens"] / seconds,
        "step_s": seconds / arguments.steps,
        "peak_memory_bytes": peak,
        "gradient_bytes": sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        "optimizer_bytes": sum(value.nbytes for value in states if value.dim() > 0),
        "ends": ends,
    }
    print(json.dumps(measurement))


def make_random_model(shape: str, folder: Path) -> str:
    """A Llama of a published shape with random weights, and the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import hftcli

    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=VOCABULARY, max_position_embeddings=4096, dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(hftcli.__file__).parent / "tinyworld" / "model").save_pretrained(folder)
    return str(folder)


def print_table(rounds: list[dict[str, Measurement]], share: float, arguments: argparse.Namespace) -> None:
    def median(name: str, field: str) -> float:
        return statistics.median(getattr(round_[name], field) for round_ in rounds)

    def ratio(above: str, below: str, field: str) -> str:
        ratios = sorted(getattr(round_[above], field) / getattr(round_[below], field) for round_ in rounds)
        return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"

    print(
        f"{Path(arguments.model).name}, {arguments.steps} steps of {arguments.batch} x {arguments.max_length} tokens "
        f"in micro-batches of {arguments.micro_batch}, "
        f"medians of {len(rounds)} interleaved rounds; ratios: median (range) within a round\n"
    )
    print("| | tokens/s | s/step | gradients MiB | optimizer MiB | peak memory MiB |")
    print("|---|---|---|---|---|---|")
    for name in rounds[0]:
        sizes = [median(name, f"{kind}_bytes") / 2**20 for kind in ("gradient", "optimizer", "peak_memory")]
        cells = [
            f"{median(name, 'tokens_per_s'):,.0f}",
            f"{median(name, 'step_s'):.3f}",
            *(f"{size:,.1f}" for size in sizes),
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    full, half = "hft, share 1.0", "hft, share 0.5"
    print("\n| ratio | |\n|---|---|")
    print(f"| tokens/s, hft at share 1.0 over bare TRL | {ratio(full, 'bare TRL', 'tokens_per_s')} |")
    print(f"| step time, half over full fine-tuning | {ratio(half, full, 'step_s')} |")
    print(f"| trainable share that `hft plan` computes | {share:.3f} |")
    print(f"| gradients, half over full | {ratio(half, full, 'gradient_bytes')} |")
    print(f"| optimizer state, half over full | {ratio(half, full, 'optimizer_bytes')} |")
    print(f"| peak memory, half over full | {ratio(half, full, 'peak_memory_bytes')} |")
    print(f"| from the command to the first step, hft at share 0.5 over bare TRL | {ratio(half, 'bare TRL', 'start_s')} |")
    print("\n| seconds since the command, when it was over |\n|---|")
    for name in ("bare TRL", half):
        phases = rounds[0][name].phases_s
        ends = {phase: statistics.median(round_[name].phases_s[phase] for round_ in rounds) for phase in phases}
        print(f"| {name}: {', '.join(f'{phase} {end:.2f}' for phase, end in ends.items())} |")


if __name__ == "__main__":
    main()
