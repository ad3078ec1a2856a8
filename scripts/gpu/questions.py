"""Step g: questions per second of `hft eval`, by likelihood and by generation, at the shapes of 135M and 1B.

The weights are random, so nearly every answer is generated to its longest: the slowest case. The tokenizer is the embedded
model's, whose every token the larger vocabulary has.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu.record import Recorder
from gpu.shapes import DEVICE, clear_memory, make_model, write_config
from hftcli import PACKAGE

TASKS = {"tinyworld/facts": "likelihood", "tinyworld/sale": "generation"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def run(recorder: Recorder) -> None:
    for shape in ("tiny",) if recorder.rehearse else ("135M", "1B"):
        with recorder.measuring(f"{shape}: a checkpoint"):
            folder = write_checkpoint(shape, recorder.room / shape)
            ask(recorder, shape, folder)


def write_checkpoint(shape: str, folder: Path) -> Path:
    """A folder that hft takes for a model."""
    write_config(shape, folder)
    model = make_model(folder, torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source := PACKAGE / "tinyworld" / "model" / name).exists():
            shutil.copy(source, folder)
    del model
    clear_memory()
    return folder


def ask(recorder: Recorder, shape: str, folder: Path) -> None:
    """Twice as a command: the first time it may compile kernels."""
    tasks = ["tinyworld/nowhere"] if recorder.fault else list(TASKS)
    command = [sys.executable, "-m", "hftcli", "eval", "--model", str(folder), "--tasks", ",".join(tasks), "--json"]
    command += ["--dtype", "bfloat16", "--max-length", "256"]
    command += ["--max-examples", "8"] if recorder.rehearse else []
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole_s = time.monotonic() - started
    if done.returncode != 0:
        recorder.add(f"{shape}: hft eval", False, code=done.returncode, said=done.stderr[-600:])
        return
    found = json.loads(done.stdout)
    for task, way in TASKS.items():
        num_questions, seconds = found["tasks"][task]["num_examples"], found["seconds"][task]
        recorder.add(f"{shape}: hft eval, {task}", None, way=way, questions=num_questions, seconds=seconds,
                     questions_per_s=num_questions / seconds, command_s=whole_s, device=DEVICE.type)  # fmt: skip
