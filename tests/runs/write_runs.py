"""Write small runs as the installed hft leaves them, for later versions to read: `python tests/runs/write_runs.py FOLDER`.

    start/            a random Llama of some hundred weights, with a tokenizer of characters
    rows.jsonl        rows for `hft sft`
    tasks/            two tasks for `hft continual`
    *.yaml            the recipes of the runs
    sft/              a finished run
    stopped/          the same run, stopped by a signal after a step checkpoint
    continual/        a finished run of two rounds

`version_1/` holds those of the first version of every form, from before files named it. In all files, `/ROOT` stands for the
folder that they were written in.
"""

import json
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hftcli

ROOT = "/ROOT"
# What reading makes again, and what tells more of the machine than of the run.
LEFT_OUT = (".*", "report.html", "figures", "worker.log", "failure.json")
TRAIN = {
    "learning_rate": 0.01,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "logging_steps": 1,
}
SHARED = {"model": {"path": f"{ROOT}/start"}, "launch": {"num_processes": 1}}
SFT = SHARED | {
    "data": {"path": f"{ROOT}/rows.jsonl", "max_length": 64},
    "train": {**TRAIN, "max_steps": 12},
    "checkpoint": {"save_steps": 1, "keep": 1},
    "eval": {"tasks": ["tinyworld/newcomers"], "max_examples": 2},
}
CONTINUAL = SHARED | {
    "data": {"root": f"{ROOT}/tasks", "max_length": 64},
    "train": {**TRAIN, "max_steps": 3},
    "continual": {"tasks": ["colours", "sums"]},
    "eval": {"max_examples": 2},
}
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow"}


def write_start(folder: Path) -> None:
    characters = ["<pad>", "<end>", "<unknown>", *string.printable[:-3]]
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(characters)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )  # fmt: skip
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_inputs(root: Path) -> None:
    write_start(root / "start")
    colours = [{"prompt": f"Which colour has {thing}?\nAnswer:", "answer": f" {name}"} for thing, name in COLOURS.items()]
    sums = [{"prompt": f"What is {a} + {b}?\nAnswer:", "answer": f" {a + b}"} for a in range(3) for b in range(2)]
    for task, rows in {"colours": colours, "sums": sums}.items():
        (root / "tasks" / task).mkdir(parents=True)
        for split in ("train", "test"):
            (root / "tasks" / task / f"{split}.json").write_text(json.dumps(rows))
        (root / "tasks" / task / "task.yaml").write_text("max_new_tokens: 8\n")
    lines = [json.dumps({"prompt": row["prompt"], "completion": row["answer"]}) + "\n" for row in colours]
    (root / "rows.jsonl").write_text("".join(lines))
    for name, recipe in {"sft": SFT, "stopped": SFT, "continual": CONTINUAL}.items():
        text = yaml.safe_dump({**recipe, "output": f"{ROOT}/{name}"}, sort_keys=False)
        (root / f"{name}.yaml").write_text(text.replace(ROOT, str(root)))


def stop_run(command: list[str], steps: Path) -> None:
    """Start a run and stop it by a signal once it has a step checkpoint."""
    front = subprocess.Popen(command)
    while front.poll() is None and not any(path.name.isdigit() for path in steps.glob("*")):
        time.sleep(0.001)
    front.send_signal(signal.SIGTERM)
    assert front.wait() == 75, "the run ended before it was stopped"


def tidy(root: Path) -> None:
    """Leave out what LEFT_OUT says, and the names of this machine."""
    for path in [path for pattern in LEFT_OUT for path in root.rglob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in root.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            path.write_text(path.read_text().replace(str(root), ROOT).replace(f"{Path(hftcli.__file__).parent}/", ""))


def write_runs(root: Path) -> None:
    root.mkdir(parents=True)
    write_inputs(root)
    hft = [sys.executable, "-m", "hftcli"]
    for command, name in (("sft", "sft"), ("continual", "continual")):
        subprocess.run([*hft, command, "--recipe", f"{root}/{name}.yaml"], check=True)
    stop_run([*hft, "sft", "--recipe", f"{root}/stopped.yaml"], root / "stopped" / "rounds" / "00-sft" / "steps")
    tidy(root)


if __name__ == "__main__":
    write_runs(Path(sys.argv[1]).resolve())
