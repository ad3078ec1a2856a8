"""`hft` for tests: a process that has what commands and workers import, and copies itself for each of them.

Importing the libraries would take longer than most rounds of the tests. The copies are processes as others are, with their own
streams, environment and session, which signals end; only their start is not that of a user's. That is tried where a test starts
`python -m hftcli` or a launcher by itself, and in every round of several ranks.

The process never computes itself, so that a copy finds no threads of libraries that it does not have. A line of JSON on its
standard input is a command, with the environment, the folder and the files for its output; the answer is the exit code.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import IO, Any, NoReturn

OWN = ("CUDA_", "DS_", "HF_", "HOME", "OMP_", "PYTHON", "TOKENIZERS_", "TRANSFORMERS_", "WORLD_SIZE")  # read at imports
IMPORTED = (
    "hftcli.models.arithmetic", "hftcli.training.outlook", "hftcli.training.worker", "transformers.models.llama.modeling_llama",
)  # fmt: skip
WORKER = ["-m", "hftcli.training.worker"]


class ForkServer:
    """The process, as tests use it."""

    def __init__(self) -> None:
        self.environment = find_own(os.environ)
        # A worker on a machine without GPUs has DeepSpeed compute on the processor.
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def can_run(self, environment: dict[str, str]) -> bool:
        """Whether what a command would have imported is what this process has."""
        return find_own(environment) == self.environment

    def run(self, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
        """A command, waited for."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as error:
            request = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
            self.process.stdin.write(json.dumps({**request, "output": output.name, "error": error.name}) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(arguments, code, output.read(), error.read())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def find_own(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment decides what is imported, or how."""
    return {name: value for name, value in environment.items() if name.startswith(OWN)}


class Worker:
    """What `subprocess.Popen` is for a round's worker, and for it alone: a copy of the front."""

    def __init__(self, command: list[str], stdout: IO[bytes], env: dict[str, str], **_: object):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            become(self._work, command[len(WORKER) :], env, stdout.fileno(), stdout.fileno())

    @staticmethod
    def _work() -> None:
        from hftcli.training.worker import main

        main()

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit code, once it has ended."""
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def start_process(command: list[str], **options: Any) -> Any:
    """A worker as a copy of this process, and all else as a process of its own."""
    return Worker(command, **options) if command[1:3] == WORKER else subprocess.Popen(command, **options)


def serve(requests: IO[str]) -> None:
    """Answer until the requests end."""
    for line in requests:
        child = os.fork()
        if child == 0:
            become_command(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become_command(request: dict[str, Any]) -> NoReturn:
    """What a new process would be; it ends here."""
    output, error = (os.open(request[name], os.O_WRONLY) for name in ("output", "error"))
    os.chdir(request["folder"])
    become(run_command, ["hft", *request["arguments"]], request["environment"], output, error)


def run_command() -> None:
    """`hft`, whose workers are copies of it."""
    from hftcli.commands.cli import main
    from hftcli.launching import watch

    watch.subprocess = SimpleNamespace(Popen=start_process, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    main()


def become(main: Callable[[], None], arguments: list[str], environment: dict[str, str], output: int, error: int) -> NoReturn:
    """Take the streams, arguments and environment that a new process would have, run, and end."""
    for descriptor, place in enumerate((os.open(os.devnull, os.O_RDONLY), output, error)):
        os.dup2(place, descriptor)
    sys.stdin = os.fdopen(0, closefd=False)  # of a copy of a copy, the streams that were there may not close it
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = arguments
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    serve(sys.stdin)
