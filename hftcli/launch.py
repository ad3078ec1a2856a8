"""Starting a worker: the command for it, and watching it through the files that it writes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hftcli.errors import (
    FULL_BYTES,
    SAVE_MEMORY,
    HftError,
    InputError,
    Interrupted,
    TrainingError,
    VerificationError,
    make_disk_full,
)
from hftcli.hosts import count_slots, read_hostfile
from hftcli.processes import FRONT_VARIABLE, await_ranks, describe_front
from hftcli.recipe import LaunchSection
from hftcli.run import Failure, Progress, Round, RoundResult, read_model
from hftcli.signals import SIGNALS
from hftcli.slurm import make_step_command

POLL_SECONDS = 0.1
LOG_TAIL_BYTES = 1 << 16


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
    """Fill in the numbers of machines and processes, and check them against the hostfile or this machine's GPUs.

    Raises:
        InputError: settings that do not go together, a faulty hostfile, or more processes than slots or GPUs.
    """
    if launch.hostfile and launch.slurm:
        raise InputError("launch.hostfile and launch.slurm both say where to run", "drop one of them")
    if launch.hostfile:
        return _resolve_hosts(launch)
    if launch.slurm and launch.num_processes is None:
        raise InputError(
            "launch.num_processes is null, and the GPUs of Slurm's nodes cannot be counted from here",
            "give --num-processes: the processes on each node, one per GPU",
        )
    num_gpus = count_gpus()
    num_processes = launch.num_processes or max(num_gpus, 1)
    is_here = not launch.slurm and (launch.num_nodes or 1) == 1
    if is_here and num_gpus and num_processes > num_gpus:
        raise InputError(
            f"launch.num_processes is {num_processes}, but this machine has {num_gpus} GPUs",
            f"set it to {num_gpus} or less, or leave it out to take them all",
        )
    return launch.model_copy(update={"num_processes": num_processes, "num_nodes": launch.num_nodes or 1})


def _resolve_hosts(launch: LaunchSection) -> LaunchSection:
    hosts = read_hostfile(launch.hostfile)
    if launch.num_nodes not in (None, len(hosts)):
        raise InputError(
            f"launch.num_nodes is {launch.num_nodes}, but {launch.hostfile} names {len(hosts)} hosts",
            "leave launch.num_nodes out: the hostfile says it",
        )
    update = {
        "hostfile": str(Path(launch.hostfile).resolve()),
        "num_nodes": len(hosts),
        "num_processes": count_slots(hosts, launch.num_processes),
    }
    return launch.model_copy(update=update)


def count_ranks(launch: LaunchSection) -> int:
    """Processes on all machines, on which this machine need not be one: a launch is planned before there are devices for it.

    Raises:
        InputError: a faulty hostfile.
    """
    if launch.hostfile:
        launch = _resolve_hosts(launch)
    return (launch.num_processes or max(count_gpus(), 1)) * (launch.num_nodes or 1)


def worker_command(folder: Path, launch: LaunchSection, port: int) -> list[str]:
    """The command that runs a prepared round from this machine.

    One process; or DeepSpeed's launcher here; or, for several machines, DeepSpeed's launcher on each host of the hostfile
    (see cluster.py), or Slurm's srun.

    Raises:
        InputError: several machines, with neither a hostfile nor Slurm to reach them.
    """
    if launch.hostfile:
        return [sys.executable, "-m", "hftcli.cluster", str(folder.resolve()), str(port)]
    worker = [sys.executable, "-m", "hftcli.worker", str(folder)]
    if launch.slurm:
        return make_step_command(worker, launch, port)
    if (launch.num_nodes or 1) > 1:
        raise InputError(
            f"launch.num_nodes is {launch.num_nodes}, and nothing says how to reach the machines",
            "give --hostfile or --slurm; or start the round that --dry-run prepares on each machine, with torchrun",
        )
    if launch.num_processes == 1:
        return worker
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(launch.num_processes)]
    return [*launcher, "--master_port", str(port), "--no_local_rank", "--module", *worker[2:]]


def worker_environment(launch: LaunchSection) -> dict[str, str]:
    """The environment of a worker, where it differs from the front's."""
    changes = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1"}
    if launch.hostfile is None and count_gpus() == 0:  # the hosts of a hostfile each look at their own devices
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
    await_ranks(round_)
    for path in (round_.failure_path, round_.progress_path, round_.result_path, round_.stop_path):
        path.unlink(missing_ok=True)
    command = worker_command(round_.folder, launch, find_free_port())
    log_start = round_.log_path.stat().st_size if round_.log_path.exists() else 0
    with round_.log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **worker_environment(launch), FRONT_VARIABLE: describe_front()},
            start_new_session=True,  # a signal to the front's group reaches the worker once, through the file `stop`
        )
    try:
        _watch(round_, process, launch.timeout_minutes, on_progress)
    except KeyboardInterrupt:
        raise HftError(f"stopped at once; {round_.describe_kept()}", "run the same command again") from None
    finally:
        _kill(process)
    return _read_outcome(round_, process.returncode, log_start)


def _watch(
    round_: Round, process: subprocess.Popen, timeout_minutes: float | None, on_progress: Callable[[Progress], None]
) -> None:
    """Show a worker's progress until it ends.

    Raises:
        TrainingError: it makes none for `timeout_minutes`.
    """
    last, changed = None, time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if round_.progress_path.exists() and (now := read_model(round_.progress_path, Progress)) != last:
            on_progress(now)
            last, changed = now, time.monotonic()
        if last is None or last.phase == "starting" or timeout_minutes is None:
            continue
        if time.monotonic() - changed > 60 * timeout_minutes:
            count = f" at {last.done} of {last.total}" if last.total else ""
            raise TrainingError(
                f"the worker hangs: no progress for {timeout_minutes:g} minutes while {last.phase}{count}; "
                f"{round_.describe_kept()}",
                "run the same command again; a rank that is slow and not hung needs a longer launch.timeout_minutes",
            )


def _kill(process: subprocess.Popen) -> None:
    """End a worker that still runs, and all that it started, at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_outcome(round_: Round, code: int, log_start: int = 0) -> RoundResult:
    """What a worker that ended leaves. Launchers turn every exit code into 1, so the files decide.

    Args:
        log_start: where in worker.log this start's lines begin, bytes.
    """
    result = round_.read_result()
    if result is not None and not round_.failure_path.exists():
        return result
    first = _find_first_code(round_.log_path, log_start)
    is_killed = first is not None and first < 0  # and what the other ranks then wrote is only that they miss it
    if round_.failure_path.exists() and not is_killed:
        failure = read_model(round_.failure_path, Failure)
        kinds = {kind.exit_code: kind for kind in (HftError, InputError, VerificationError, Interrupted)}
        error = kinds[failure.exit_code](failure.message, failure.fix)
        error.add_note(failure.traceback)
        raise error
    if shutil.disk_usage(round_.folder).free < FULL_BYTES:
        raise make_disk_full(round_.folder)
    code = first or (128 - code if code > 128 else code)  # shells, and srun, tell a signal so
    if -code in SIGNALS:
        raise Interrupted(f"stopped by a signal while starting; {round_.describe_kept()}", "run the same command again")
    raise TrainingError(
        f"a rank of {round_.name} ended with code {code} and left no word; {round_.describe_kept()}",
        f"it was killed from outside, most often by the kernel for want of memory: {SAVE_MEMORY}. Otherwise run the same "
        "command again"
        if code == -signal.SIGKILL
        else f"see the end of {round_.log_path}, then run the same command again",
    )


def _find_first_code(log: Path, start: int) -> int | None:
    """The exit code of the rank that ended first, as DeepSpeed's launcher tells it; it is negative for a signal."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - LOG_TAIL_BYTES, start))
        # Of the launcher on this machine: with a hostfile, lines begin with the host's name, and cluster.py judges them.
        found = re.findall(rb"^\[.*exits with return code = (-?\d+)", file.read(), re.MULTILINE)
    return int(found[-1]) if found else None
