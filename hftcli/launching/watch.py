"""A round's worker from start to end, watched through the files that it writes."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from hftcli.errors import (
    FULL_BYTES,
    SAVE_MEMORY,
    HftError,
    InputError,
    Interrupted,
    OverBudget,
    TrainingError,
    VerificationError,
    make_disk_full,
)
from hftcli.launching.command import find_free_port, worker_command, worker_environment
from hftcli.launching.processes import FRONT_VARIABLE, await_ranks, describe_front
from hftcli.launching.signals import SIGNALS
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.files import read_model
from hftcli.runs.records import RoundResult
from hftcli.runs.run import Round
from hftcli.runs.spec import Failure, Progress

POLL_SECONDS = 0.1
LOG_TAIL_BYTES = 1 << 16


def launch_round(round_: Round, launch: LaunchSection, on_progress: Callable[[Progress], None]) -> RoundResult:
    """Run a prepared round in processes of its own and wait for its result.

    Raises:
        HftError: of the kind and exit code that the worker reported.
    """
    await_ranks(round_)
    for path in (round_.failure_path, round_.outlook_path, round_.progress_path, round_.result_path):
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
    round_: Round, process: subprocess.Popen[bytes], timeout_minutes: float | None, on_progress: Callable[[Progress], None]
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


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker that still runs, and all that it started, at once."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_outcome(round_: Round, code: int, log_start: int = 0) -> RoundResult:
    """What a worker that ended leaves. Launchers turn every exit code into 1, so the files decide.

    Args:
        log_start: where in worker.log this start's lines begin, bytes.
    """
    if round_.is_done and not round_.failure_path.exists():
        return round_.read_result()
    first = _find_first_code(round_.log_path, log_start)
    is_killed = first is not None and first < 0  # and what the other ranks then wrote is only that they miss it
    if round_.failure_path.exists() and not is_killed:
        failure = read_model(round_.failure_path, Failure)
        kinds = {kind.exit_code: kind for kind in (HftError, InputError, VerificationError, Interrupted)}
        named = {kind.__name__: kind for kind in (TrainingError, OverBudget)}
        error = named.get(failure.kind, kinds[failure.exit_code])(failure.message, failure.fix)
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
