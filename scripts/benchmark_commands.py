"""Whole commands on the same model and rows, from the shell's prompt to the saved model: hft, TRL and LLaMA-Factory.

    python scripts/benchmark_commands.py --model FOLDER --rows FILE.jsonl [--llamafactory .../bin/llamafactory-cli]
    python scripts/benchmark_commands.py --model FOLDER --pairs FILE.jsonl

Rows have `messages`, of which the first two turns serve; pairs have `prompt`, a list of messages, and `chosen` and `rejected`.
Every tool makes one pass over them, in batches of the same size, cut to the same length; once with its defaults, and once with
the settings that were found to be its fastest here: no checkpointing, bfloat16 over float32 masters, one row at a time on a
CPU, where padding costs more than small products. LLaMA-Factory needs an environment of its own (`pip install llamafactory`);
its freeze mode trains two layers, as `hft` does in the row that says so. The commands take turns, so that a machine whose
speed drifts is fair to all; the table gives medians and, for ratios, the median of those within a turn with their range. Prints
Markdown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HFT = "hft, share 0.5"
FREEZE_LAYERS = 2  # that LLaMA-Factory's freeze mode trains by default


def main() -> None:
    arguments = parse_arguments()
    arguments.model = arguments.model.resolve()
    with tempfile.TemporaryDirectory() as folder:
        commands = make_commands(arguments, Path(folder))
        turns = []
        for number in range(arguments.repeats):
            turns.append({name: time_command(command, Path(folder)) for name, command in commands.items()})
            print(f"turn {number + 1} of {arguments.repeats} done", file=sys.stderr, flush=True)
    print_table(turns, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a chat model")
    examples = parser.add_mutually_exclusive_group(required=True)
    examples.add_argument("--rows", type=Path, help="conversations, for supervised fine-tuning")
    examples.add_argument("--pairs", type=Path, help="for direct preference optimization")
    parser.add_argument("--num-rows", type=int, default=160)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--fast-batch", type=int, default=1, help="rows of a forward pass with the fastest settings")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llamafactory", type=Path, help="its command; with --rows only")
    arguments = parser.parse_args()
    if arguments.llamafactory and arguments.pairs:
        parser.error("--llamafactory goes with --rows")
    return arguments


def make_commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """By name; each writes its model to `folder/output`."""
    rows = folder / "rows"
    rows.mkdir()
    lines = (arguments.rows or arguments.pairs).read_text().splitlines()[: arguments.num_rows]
    examples = [make_pair(json.loads(line)) if arguments.pairs else make_row(json.loads(line)) for line in lines]
    (rows / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    depth = json.loads((arguments.model / "config.json").read_text())["num_hidden_layers"]
    top = FREEZE_LAYERS / depth
    two_layers = {"trainable_fraction": top, "frozen_prefix": 1 - top, "embeddings": "freeze", "head": "freeze"}
    commands = {
        HFT: write_hft(arguments, folder, "half", {}),
        "hft, share 1.0": write_hft(arguments, folder, "full", {"trainable_fraction": 1.0}),
        f"hft, the upper {FREEZE_LAYERS} layers": write_hft(arguments, folder, "upper", two_layers),
    }
    fast = {"per_device_train_batch_size": arguments.fast_batch}
    fast["gradient_accumulation_steps"] = arguments.batch // arguments.fast_batch
    precompute = {"precompute_ref_log_probs": True} if arguments.pairs else {}
    commands["trl, defaults"] = make_trl(arguments, folder, {})
    commands["trl, fastest"] = make_trl(arguments, folder, {"gradient_checkpointing": False, **fast, **precompute})
    if arguments.llamafactory:
        fast |= {"bf16": True, "disable_gradient_checkpointing": True}
        for kind in ("full", "freeze"):
            for name, extra in (("defaults", {}), ("fastest", fast)):
                path = write_factory(arguments, folder, f"{kind}-{name}", {"finetuning_type": kind, **extra})
                commands[f"LLaMA-Factory {kind}, {name}"] = [str(arguments.llamafactory), "train", str(path)]
    return commands


def make_row(row: dict) -> dict:
    return {"messages": row["messages"][:2]}


def make_pair(row: dict) -> dict:
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": row["prompt"], **answers}


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def write_hft(arguments: argparse.Namespace, folder: Path, name: str, freeze: dict[str, object]) -> list[str]:
    recipe = {
        "model": {"path": str(arguments.model)},
        "data": {"path": str(folder / "rows" / "train.jsonl"), "max_length": arguments.max_length},
        "freeze": freeze,
        "train": {"global_batch_size": arguments.batch, "per_device_train_batch_size": arguments.fast_batch},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    command = "dpo" if arguments.pairs else "sft"
    return [sys.executable, "-m", "hftcli", command, "--recipe", str(path), "--output", str(folder / "output")]


def make_trl(arguments: argparse.Namespace, folder: Path, settings: dict[str, object]) -> list[str]:
    settings = {
        "model_name_or_path": arguments.model,
        "dataset_name": folder / "rows",
        "max_length": arguments.max_length,
        "num_train_epochs": 1,
        "per_device_train_batch_size": arguments.batch,
        "output_dir": folder / "output",
        "report_to": "none",
        "use_cpu": not has_gpu(),
        **settings,
    }
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [str(Path(sys.executable).parent / "trl"), "dpo" if arguments.pairs else "sft", *options]


def write_factory(arguments: argparse.Namespace, folder: Path, name: str, settings: dict[str, object]) -> Path:
    rows = folder / "rows"
    values = {
        "do_train": True, "model_name_or_path": str(arguments.model), "dataset": "rows", "dataset_dir": str(rows),
        "template": "chatml", "cutoff_len": arguments.max_length, "num_train_epochs": 1,
        "per_device_train_batch_size": arguments.batch, "output_dir": str(folder / "output"), "report_to": "none",
        "use_cpu": not has_gpu(), **settings,
    }  # fmt: skip
    entry = {"file_name": "train.jsonl", "formatting": "sharegpt"}
    entry["tags"] = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry["columns"] = {"messages": "messages"}
    (rows / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"stage": "sft", **values}))
    return path


def time_command(command: list[str], folder: Path) -> float:
    """Seconds. Nothing is left in a cache of an earlier turn: hft's tokens, the others' datasets."""
    cache = folder / "cache"
    environment = {
        **os.environ,
        "HFT_CACHE": str(cache / "hft"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    seconds = time.perf_counter() - started
    if done.returncode or not list((folder / "output").rglob("*.safetensors")):
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    for used in (cache, folder / "output"):
        shutil.rmtree(used, ignore_errors=True)
    return seconds


def print_table(turns: list[dict[str, float]], arguments: argparse.Namespace) -> None:
    examples = "pairs" if arguments.pairs else "rows"
    print(
        f"{arguments.model.name}, {arguments.num_rows} {examples} of at most {arguments.max_length} tokens, batches of "
        f"{arguments.batch}; medians of {len(turns)} interleaved turns; ratios: median (range) within a turn\n"
    )
    print(f"| command | seconds | over {HFT} |\n|---|---|---|")
    for name in turns[0]:
        ratios = sorted(turn[name] / turn[HFT] for turn in turns)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {statistics.median(turn[name] for turn in turns):.1f} | {spread} |")


if __name__ == "__main__":
    main()
