"""Whole commands on the same model and rows, from the shell's prompt to the saved model: hft, TRL and LLaMA-Factory.

    python scripts/benchmark_commands.py --model FOLDER --rows FILE.jsonl [--llamafactory .../bin/llamafactory-cli]

Rows have `messages`, of which the first two turns serve. Every tool makes one pass over them, in batches of the same size, cut
to the same length; once with its defaults, and once with the settings that were found to be its fastest here. LLaMA-Factory
needs an environment of its own (`pip install llamafactory`). The commands take turns, so that a machine whose speed drifts is
fair to all; the table gives medians and, for ratios, the median of those within a turn with their range. Prints Markdown.
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

HFT = "hft sft, share 0.5"
FAST_FACTORY = {"bf16": True, "disable_gradient_checkpointing": True}


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
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--num-rows", type=int, default=160)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llamafactory", type=Path, help="its command")
    return parser.parse_args()


def make_commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """By name; each writes its model to `folder/output`."""
    lines = arguments.rows.read_text().splitlines()[: arguments.num_rows]
    messages = [json.loads(line)["messages"][:2] for line in lines]
    rows = folder / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in messages))
    commands = {name: make_hft(arguments, rows, share) for name, share in ((HFT, 0.5), ("hft sft, share 1.0", 1.0))}
    trl = [
        str(Path(sys.executable).parent / "trl"),
        "sft",
        "--model_name_or_path",
        str(arguments.model),
        "--dataset_name",
        str(rows),
    ]
    trl += ["--max_length", str(arguments.max_length), "--num_train_epochs", "1", "--output_dir", str(folder / "output")]
    trl += ["--report_to", "none", "--use_cpu", str(not has_gpu())]
    batch = ["--per_device_train_batch_size", str(arguments.batch)]
    commands["trl sft, defaults"] = [*trl, *batch]
    commands["trl sft, no checkpointing"] = [*trl, *batch, "--gradient_checkpointing", "false"]
    if arguments.llamafactory:
        for kind in ("full", "freeze"):
            for name, extra in (("defaults", {}), ("bf16, no checkpointing", FAST_FACTORY)):
                path = write_factory(arguments, folder, rows, f"{kind}-{len(extra)}", {"finetuning_type": kind, **extra})
                commands[f"LLaMA-Factory {kind}, {name}"] = [str(arguments.llamafactory), "train", str(path)]
    return commands


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def make_hft(arguments: argparse.Namespace, rows: Path, share: float) -> list[str]:
    settings = {
        "model.path": arguments.model,
        "data.path": rows / "train.jsonl",
        "data.name": "null",
        "data.max_length": arguments.max_length,
        "freeze.trainable_fraction": share,
        "train.global_batch_size": arguments.batch,
        "train.per_device_train_batch_size": arguments.batch,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "hftcli", "sft", "--recipe", "smollm2", "--output", str(rows.parent / "output"), *options]


def write_factory(arguments: argparse.Namespace, folder: Path, rows: Path, name: str, settings: dict[str, object]) -> Path:
    """Its configuration, in JSON, which is YAML."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (rows / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    values = {
        "stage": "sft", "do_train": True, "model_name_or_path": str(arguments.model), "dataset": "rows",
        "dataset_dir": str(rows), "template": "chatml", "cutoff_len": arguments.max_length, "num_train_epochs": 1,
        "per_device_train_batch_size": arguments.batch, "output_dir": str(folder / "output"), "report_to": "none",
        "use_cpu": not has_gpu(), **settings,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
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
    print(
        f"{arguments.model.name}, {arguments.num_rows} rows of at most {arguments.max_length} tokens, batches of "
        f"{arguments.batch}; medians of {len(turns)} interleaved turns; ratios: median (range) within a turn\n"
    )
    print(f"| command | seconds | over {HFT} |\n|---|---|---|")
    for name in turns[0]:
        ratios = sorted(turn[name] / turn[HFT] for turn in turns)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {statistics.median(turn[name] for turn in turns):.1f} | {spread} |")


if __name__ == "__main__":
    main()
