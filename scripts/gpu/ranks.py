"""Step c: one rank under DeepSpeed's launcher, ZeRO 1, 2 and 3, in float32 and bfloat16: the losses of one process.

hft itself starts one process without DeepSpeed, so the round is prepared by hft and run by `one_rank.py`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.commands import TOLERANCE, read_losses
from gpu.record import Recorder

STAGES = (1, 2, 3)
BF16_TOLERANCE = 0.05  # nats, of the mean loss


def run(recorder: Recorder) -> None:
    kinds = {"float32": "false", "bfloat16": "true"}
    cases = [(kind, stage) for kind in kinds for stage in STAGES if not recorder.rehearse or (kind, stage) in REHEARSED]
    with ThreadPoolExecutor(2 if recorder.rehearse else 8) as pool:
        alone = {kind: pool.submit(train_alone, recorder, kind) for kind in dict.fromkeys(kind for kind, _ in cases)}
        ranks = {case: pool.submit(train_rank, recorder, *case) for case in cases}
        for kind, stage in cases:
            name = f"ZeRO {stage}, {kind}"
            with recorder.measuring(name):
                compare(recorder, name, kind, alone[kind].result(), *ranks[kind, stage].result())


REHEARSED = (("float32", 2),)  # each start of DeepSpeed's launcher imports all libraries three times


def make_command(recorder: Recorder, kind: str, stage: int, folder: Path) -> list[str]:
    values = {
        "train.max_steps": 3 if recorder.rehearse else 30,
        "train.logging_steps": 1,
        "train.bf16": "true" if kind == "bfloat16" else "false",
        "model.dtype": kind,
        "eval.tasks": "[]",
        "launch.num_processes": 1,
        "launch.zero_stage": stage,
        "checkpoint.save_every_minutes": "null",
    }
    options = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "hftcli", "sft", "--output", str(folder), *options]


def train_alone(recorder: Recorder, kind: str) -> Path:
    folder = recorder.room / f"alone-{kind}"
    subprocess.run(make_command(recorder, kind, 2, folder), check=True, capture_output=True, text=True)
    return folder


def train_rank(recorder: Recorder, kind: str, stage: int) -> tuple[Path, int, float, str]:
    """Prepare a round and start one rank of it; gives its folder, exit code, seconds and last words."""
    folder = recorder.room / f"zero{stage}-{kind}"
    subprocess.run([*make_command(recorder, kind, stage, folder), "--dry-run"], check=True, capture_output=True, text=True)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(port)]
    rate = ["--learning-rate-factor=3"] if recorder.fault else []
    command = [*launcher, "--no_local_rank", "--module", "gpu.one_rank", *rate, str(folder / "rounds" / "00-sft")]
    started = time.monotonic()
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ["PYTHONPATH"]])
    environment = {"OMP_NUM_THREADS": "2", **os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return folder, done.returncode, time.monotonic() - started, " / ".join(words[-6:])[-900:]


def compare(recorder: Recorder, name: str, kind: str, alone: Path, folder: Path, code: int, seconds: float, words: str) -> None:
    expected = next(iter(read_losses(alone).values()))
    losses = next(iter(read_losses(folder).values()), [])
    held_path = folder / "held.json"
    held = json.loads(held_path.read_text(encoding="utf-8")) if held_path.exists() else {}
    if len(losses) != len(expected):
        recorder.add(name, False, code=code, error=f"{len(losses)} steps of {len(expected)}", said=words)
        return
    gap = max(abs(left - right) for left, right in zip(losses, expected, strict=True))
    mean_gap = abs(sum(losses) - sum(expected)) / len(losses)
    is_near = gap <= TOLERANCE if kind == "float32" else mean_gap <= BF16_TOLERANCE
    # Padding to DeepSpeed's alignment aside: every weight that trains has a master and two moments, and no other has.
    trained = held.get("num_trained", 0)
    is_whole = all(trained <= held.get(key, 0) <= trained + 4096 for key in ("num_masters", "num_first_moments"))
    dtypes = {held.get("masters_dtype"), held.get("moments_dtype")}
    passed = is_near and is_whole and dtypes == {"torch.float32"} and code == 0 and held.get("verified", False)
    recorder.add(
        name, passed, largest_gap=gap, mean_gap=mean_gap, dtypes=" ".join(sorted(map(str, dtypes))), **held, code=code,
        seconds=seconds, said="" if passed else words,
    )  # fmt: skip
