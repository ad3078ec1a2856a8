"""Starting a worker: the command for it, and watching it through the files that it writes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hftcli.errors import HftError, InputError, Interrupted, TrainingError, VerificationError
from hftcli.recipe import LaunchSection
from hftcli.run import Failure, Progress, Round, RoundResult, read_model

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # between asking a worker to stop and killing it


def count_gpus() -> int:
    """GPUs that a worker on this machine would see, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def resolve_launch(launch: LaunchSection) -> LaunchSection:
    """Fill in the number of processes: every GPU, or one process where there is none.

    Raises:
        InputError: more processes than GPUs.
    """
    num_gpus = count_gpus()
    num_processes = launch.num_processes or max(num_gpus, 1)
    if num_gpus and num_processes > num_gpus:
        raise InputError(
            f"launch.num_processes is {num_processes}, but this machine has {num_gpus} GPUs",
            f"set it to {num_gpus} or less, or leave it out to take them all",
        )
    return launch.model_copy(update={"num_processes": num_processes})


def worker_command(folder: Path, launch: LaunchSection, port: int) -> list[str]:
    """The command that runs a prepared round: one process, or DeepSpeed's launcher on this machine."""
    if launch.num_processes == 1:
        return [sys.executable, "-m", "hftcli.worker", str(folder)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(launch.num_processes)]
    return [*launcher, "--master_port", str(port), "--no_local_rank", "--module", "hftcli.worker", str(folder)]


def worker_environment(launch: LaunchSection) -> dict[str, str]:
    """The environment of a worker, where it differs from the front's."""
    changes = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1"}
    if count_gpus() == 0:
        changes["DS_ACCELERATOR"] = "cpu"
        if launch.num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            changes["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // launch.num_processes, 1))
    return changes


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def launch_round(round_: Round, launch: LaunchSection, on_progress: Callable[[Progress], None]) -> RoundResult:
    """Run a prepared round in processes of its own and wait for its result.

    Raises:
        HftError: of the kind and exit code that the worker reported.
    """
    for path in (round_.failure_path, round_.progress_path, round_.result_path):
        path.unlink(missing_ok=True)
    command = worker_command(round_.folder, launch, find_free_port())
    with round_.log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **worker_environment(launch)},
            start_new_session=True,  # a signal to the front reaches the worker once, through _stop
        )
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        last = None
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if round_.progress_path.exists() and (now := read_model(round_.progress_path, Progress)) != last:
                on_progress(now)
                last = now
    except KeyboardInterrupt:
        raise HftError(
            f"stopped by a signal; finished rounds are kept, {round_.name} starts again", "run the same command again"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(process)
    return _read_outcome(round_, process.returncode)


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen) -> None:
    """End a worker and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _read_outcome(round_: Round, code: int) -> RoundResult:
    """Launchers turn every exit code into 1, so the files decide."""
    result = round_.read_result()
    if result is not None and not round_.failure_path.exists():
        return result
    if round_.failure_path.exists():
        failure = read_model(round_.failure_path, Failure)
        kinds = {kind.exit_code: kind for kind in (HftError, InputError, VerificationError, Interrupted)}
        error = kinds[failure.exit_code](failure.message, failure.fix)
        error.add_note(failure.traceback)
        raise error
    raise TrainingError(
        f"the worker of {round_.name} ended with code {code} and left no word; nothing of this round is kept, "
        "finished rounds are untouched",
        f"see the end of {round_.log_path}",
    )
