"""`hft` for tests that start it often: a process that has what commands import, and copies itself for each of them.

It never computes itself, so that a copy finds no threads of libraries that it does not have. A line of JSON on its standard
input is a command, with the environment, the folder and the files for its output; the answer is the exit code.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from typing import IO, Any, NoReturn


class ForkServer:
    """The process, as tests use it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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


def serve(requests: IO[str]) -> None:
    """Answer until the requests end."""
    for line in requests:
        child = os.fork()
        if child == 0:
            become_command(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become_command(request: dict[str, Any]) -> NoReturn:
    """What a new process would have: its own streams, arguments, folder and environment; it ends here."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, request["output"]), (2, request["error"])):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["hft", *request["arguments"]]
        from hftcli.commands.cli import main

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
    import hftcli.models.arithmetic
    import hftcli.training.outlook  # noqa: F401

    serve(sys.stdin)
