"""Step b: the quick starts as commands. On the GPU in float32 as on the CPU, in bfloat16 besides; verified; killed and resumed.

The commands run side by side: none of their times is a result.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from gpu.record import Recorder

TOLERANCE = 1e-3  # nats, over all steps
BF16_TOLERANCE = 0.3  # nats, of the mean loss
COMMANDS = ("sft", "dpo", "continual")
SETTINGS = {
    "sft": {},
    "dpo": {},
    "continual": {"train.max_steps": 20, "eval.max_examples": 20},
}
REHEARSED = {
    "sft": {"train.max_steps": 6, "eval.tasks": "[]"},
    "dpo": {"train.max_steps": 2, "eval.tasks": "[]", "data.max_examples": 64, "eval.held_out.path": "null"},
    "continual": {"train.max_steps": 2, "continual.tasks": "[tinyworld/sum]", "eval.tasks": "[]",
                  "eval.max_examples": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
        losses: of every step, by round.
    """

    folder: Path
    code: int
    seconds: float
    words: str
    losses: dict[str, list[float]]

    @property
    def flat(self) -> list[float]:
        return [loss for name in sorted(self.losses) for loss in self.losses[name]]


def run(recorder: Recorder) -> None:
    device = "cpu" if recorder.rehearse else "gpu"  # a rehearsal takes one run for both
    num_at_once = 2 if recorder.rehearse else max(min(len(os.sched_getaffinity(0)) - 2, 12), 2)
    with ThreadPoolExecutor(num_at_once) as pool:
        waiting = {
            (command, kind): pool.submit(train, recorder, command, kind)
            for kind in ("cpu", "gpu", "bf16")
            for command in reversed(COMMANDS)  # the longest first
            if not recorder.rehearse or kind == "cpu" or (command, kind) == ("sft", "bf16")
        }
        resumed = pool.submit(kill_and_resume, recorder)
        for command in COMMANDS:
            with recorder.measuring(f"hft {command}, float32"):
                on_cpu = waiting[command, "cpu"].result()
                compare(recorder, command, on_cpu, waiting[command, device].result())
        with recorder.measuring("killed and resumed"):
            show_resumed(recorder, *resumed.result(), waiting["sft", device].result())
        for command, kind in waiting:
            if kind == "bf16":
                with recorder.measuring(f"hft {command}, bfloat16"):
                    compare_bf16(recorder, command, waiting[command, device].result(), waiting[command, "bf16"].result())


def train(recorder: Recorder, command: str, kind: str) -> Done:
    """Run a quick start to its end."""
    folder = recorder.room / f"{command}-{kind}"
    started = time.monotonic()
    done = subprocess.run(make_command(recorder, command, kind, folder), env=make_environment(kind), text=True, check=False,
                          capture_output=True)  # fmt: skip
    return Done(folder, done.returncode, time.monotonic() - started, done.stderr[-600:], read_losses(folder))


def make_command(recorder: Recorder, command: str, kind: str, folder: Path) -> list[str]:
    given = {"train.logging_steps": 1, **(REHEARSED if recorder.rehearse else SETTINGS)[command]}
    given["train.bf16"] = "true" if kind == "bf16" else "false"
    options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "hftcli", command, "--output", str(folder), *options]


def make_environment(kind: str) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    return {**environment, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if kind == "cpu" else environment


def read_losses(folder: Path) -> dict[str, list[float]]:
    files = sorted(folder.glob("rounds/*/metrics.jsonl"))
    return {
        file.parent.name: [json.loads(line)["loss"] for line in file.read_text(encoding="utf-8").splitlines()] for file in files
    }


def measure_gap(first: Done, second: Done) -> float:
    """The largest difference of a step's loss; infinite where one has more steps."""
    if not first.flat or len(first.flat) != len(second.flat):
        return float("inf")
    return max(abs(left - right) for left, right in zip(first.flat, second.flat, strict=True))


def verify(recorder: Recorder, folder: Path) -> int:
    """The exit code of `hft verify`; the step's planted fault is a frozen byte that changed."""
    if recorder.fault:
        change_frozen_byte(next(iter(sorted((folder / "rounds").iterdir()))))
    done = subprocess.run([sys.executable, "-m", "hftcli", "verify", str(folder)], capture_output=True, check=False, timeout=60)
    return done.returncode


def change_frozen_byte(round_folder: Path) -> None:
    plan = json.loads((round_folder / "freeze_plan.json").read_text(encoding="utf-8"))
    path = round_folder / "checkpoint" / "model.safetensors"
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        place = 8 + length + header[plan["frozen"][0]]["data_offsets"][0]
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def compare(recorder: Recorder, command: str, on_cpu: Done, on_gpu: Done) -> None:
    gap = measure_gap(on_cpu, on_gpu)
    is_checked = not recorder.rehearse or command == "sft"
    code = verify(recorder, on_gpu.folder) if is_checked else 0
    passed = gap <= TOLERANCE and code == 0 and on_cpu.code == on_gpu.code == 0
    recorder.add(
        f"hft {command}, float32", passed, steps=len(on_gpu.flat), largest_gap=gap, last_loss=(on_gpu.flat or [None])[-1],
        codes=f"CPU {on_cpu.code}, GPU {on_gpu.code}, verify {code if is_checked else 'not asked'}", seconds_gpu=on_gpu.seconds,
        seconds_cpu=on_cpu.seconds, said="" if passed else f"{on_cpu.words} {on_gpu.words}",
    )  # fmt: skip


def compare_bf16(recorder: Recorder, command: str, exact: Done, rounded: Done) -> None:
    code = verify(recorder, rounded.folder)
    means = [sum(done.flat) / max(len(done.flat), 1) for done in (exact, rounded)]
    passed = abs(means[0] - means[1]) <= BF16_TOLERANCE and code == 0 and rounded.code == 0 and bool(rounded.flat)
    recorder.add(
        f"hft {command}, bfloat16", passed, mean_loss=means[1], mean_loss_float32=means[0],
        largest_gap=measure_gap(exact, rounded), codes=f"GPU {rounded.code}, verify {code}", seconds=rounded.seconds,
        said="" if passed else rounded.words,
    )  # fmt: skip


def kill_and_resume(recorder: Recorder) -> tuple[int | None, Done]:
    """SIGKILL to the command and its worker once a step checkpoint is complete, then the same command again.

    Returns:
        The step of the last checkpoint that was complete, None where there was none in time; and the second command.
    """
    folder = recorder.room / "sft-killed"
    every = 2 if recorder.rehearse else 20
    command = [*make_command(recorder, "sft", "gpu", folder), "--set", f"checkpoint.save_steps={every}"]
    first = subprocess.Popen(command, env=make_environment("gpu"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    steps: list[int] = []
    while not steps and first.poll() is None and time.monotonic() < deadline:
        steps = [int(path.name) for path in folder.glob("rounds/00-sft/steps/*") if path.name.isdigit()]
        time.sleep(0.02)
    if first.poll() is None:
        workers = psutil.Process(first.pid).children(recursive=True)
        for process in (first, *workers):
            process.kill()
        psutil.wait_procs(workers)
    first.wait()
    started = time.monotonic()
    done = subprocess.run(command, env=make_environment("gpu"), capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    return max(steps, default=None), Done(folder, done.returncode, seconds, done.stderr[-600:], read_losses(folder))


def show_resumed(recorder: Recorder, step: int | None, resumed: Done, whole: Done) -> None:
    result = json.loads((resumed.folder / "rounds" / "00-sft" / "result.json").read_text(encoding="utf-8"))
    gap = measure_gap(whole, resumed)
    passed = step is not None and result["resumed_from"] is not None and gap <= TOLERANCE and resumed.code == 0
    recorder.add(
        "killed and resumed", passed, killed_after=step, resumed_from=result["resumed_from"], largest_gap=gap,
        is_bit_identical=gap == 0.0, code=resumed.code, said="" if passed else resumed.words,
    )  # fmt: skip
