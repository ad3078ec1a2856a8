"""The worker: one process per rank runs one round, and leaves word of it where it fails.

    python -m hftcli.training.worker RUN/rounds/00-sft
    deepspeed --num_gpus 8 --no_local_rank --module hftcli.training.worker RUN/rounds/00-sft

What the round does stands in round.py.
"""

import gc

gc.disable()  # A fifth of the time of the imports would go into looking for garbage, of which they make none.

import atexit
import os
import shutil
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from hftcli.launching.command import settle_devices

if __name__ == "__main__":
    settle_devices(os.environ)

import torch

from hftcli.errors import FULL_BYTES, SAVE_MEMORY, HftError, TrainingError, explain_os_error, make_disk_full
from hftcli.launching.processes import StopRequest, hold_round
from hftcli.launching.signals import ignore_signals
from hftcli.models.device import keep_freed_memory
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import Failure
from hftcli.training.round import run_round
from hftcli.training.trainers import silence_libraries

gc.enable()
gc.freeze()  # what was imported stays, so no later collection walks over it again


def explain_failure(error: Exception, round_: Round) -> HftError:
    """What the front shows of an error."""
    if isinstance(error, HftError):
        return error
    if shutil.disk_usage(round_.folder).free < FULL_BYTES:  # each library says it in its own way
        return make_disk_full(round_.folder)
    if isinstance(error, OSError) and (known := explain_os_error(error)):
        return known
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.distributed.DistBackendError) or "closed by peer" in line or "reset by peer" in line:
        return TrainingError(
            f"another rank is gone ({line}); {round_.describe_kept()}",
            f"see {round_.log_path} for what became of it, then run the same command again",
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in line:
        return TrainingError(f"out of memory: {line}; {round_.describe_kept()}", SAVE_MEMORY)
    return TrainingError(
        f"{type(error).__name__}: {line}; {round_.describe_kept()}",
        f"see the end of {round_.log_path}, or run again with --traceback",
    )


def main() -> None:
    """Run one rank of the round whose folder is the last argument; what goes wrong is left in failure.json."""
    atexit.register(gc.freeze)  # the interpreter's own last collection would take seconds
    round_ = Round(Path(sys.argv[-1]))
    if round_.is_done:  # started by hand: `hft` starts no round that is done
        print(f"{round_.folder} is done already, and is left as it is; hft report {round_.run_folder} shows it")
        return
    silence_libraries()
    keep_freed_memory()
    stop = StopRequest(round_)
    try:
        with hold_round(round_):
            stop.listen()
            run_round(round_, stop)
    except Exception as error:
        ignore_signals()
        known = explain_failure(error, round_)
        if not round_.failure_path.exists():
            failure = Failure(
                message=known.message, fix=known.fix, exit_code=known.exit_code, kind=type(known).__name__,
                traceback=traceback.format_exc(),
            )  # fmt: skip
            with suppress(OSError):  # on a full disk, the front sees it for itself
                write_model(round_.failure_path, failure)
        traceback.print_exc()
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
