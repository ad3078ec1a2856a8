"""A round on the hosts of a hostfile: DeepSpeed's per-node launcher on each of them, over plain ssh.

    python -m hftcli.launching.cluster RUN/rounds/00-sft PORT     here: one ssh a host, until all have ended
    python -m hftcli.launching.cluster                            on each host: read a NodeOrder from stdin, and carry it out

DeepSpeed's own way, pdsh, leaves ranks behind when a connection breaks, ends them by a pattern over all of a host's processes,
and forwards little of the environment, on the command line, where every user of the host can read it. Here the order goes
through ssh's stdin. The line then stays open: it carries signals, and when it closes or falls silent, the host ends its ranks.
"""

import base64
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hftcli.errors import HftError, InputError, Interrupted
from hftcli.launching.command import count_gpus, worker_environment
from hftcli.launching.hosts import Host, collect_environment, is_secret, read_hostfile
from hftcli.launching.signals import SIGNALS
from hftcli.recipe.section import Section
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.files import read_model, write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import Failure

SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4",
)  # fmt: skip
STARTED = "hft: the host has started its ranks"
POLL_SECONDS = 0.1
BEAT_SECONDS = 5.0  # between the empty lines that say that this side is there
SILENCE_SECONDS = 60.0  # without any: the host takes the line for cut
SETTLE_SECONDS = 10.0  # for ranks that lost a peer to end by themselves, saying why
KILL_SECONDS = 10.0  # between SIGTERM and SIGKILL, on a host whose line is cut
LOST_SECONDS = 45.0  # for a host to end its ranks; longer than ssh takes to find that it does not answer


class NodeOrder(Section):
    """What one host is to run."""

    command: tuple[str, ...]
    """The command and its arguments."""
    environment: dict[str, str]
    """What to add to the host's own environment."""
    num_processes: int
    """Ranks on this host."""


@dataclass(frozen=True)
class Node:
    """One host of a launch."""

    host: Host
    first_rank: int
    order: NodeOrder


def make_ssh_command(host: Host, arguments: Sequence[str]) -> list[str]:
    """ssh, and what it runs on a host: this Python with these arguments, in this folder, with modules found as here."""
    path = ["env", f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
    command = shlex.join([*path, sys.executable, *arguments])
    return [*SSH, host.name, f"cd {shlex.quote(os.getcwd())} && exec {command}"]


def make_nodes(folder: Path, launch: LaunchSection, port: int, environment: Mapping[str, str]) -> list[Node]:
    """What each host of a launch runs.

    Args:
        folder: the round's, at the same path on every host.
        launch: with a hostfile, and resolved.
        port: where rank 0 listens on the first host.
        environment: what goes along to every host.

    Raises:
        InputError: the hostfile changed, and does not fit the prepared round.
    """
    assert launch.hostfile is not None
    hosts, (num_nodes, num_processes) = read_hostfile(launch.hostfile), launch.shape
    if len(hosts) != num_nodes:
        raise InputError(
            f"{launch.hostfile} names {len(hosts)} hosts, and the round was prepared for {num_nodes}",
            "run the same `hft` command again, which prepares it anew",
        )
    worker = ["hftcli.training.worker", str(folder.resolve())]
    slots = {host.name: list(range(num_processes)) for host in hosts}
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    address = find_address(hosts[0]) if launch.num_ranks > 1 else ""
    nodes = []
    for index, host in enumerate(hosts):
        command = [sys.executable, "-m", *worker]
        if launch.num_ranks > 1:
            command = [
                sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={index}",
                f"--master_addr={address}", f"--master_port={port}", "--no_local_rank", "--module", *worker,
            ]  # fmt: skip
        order = NodeOrder(command=tuple(command), environment=dict(environment), num_processes=num_processes)
        nodes.append(Node(host, index * num_processes, order))
    return nodes


def find_address(host: Host) -> str:
    """The address that ssh's configuration gives a host, whose name may be an alias that only ssh knows."""
    done = subprocess.run(["ssh", "-G", host.name], capture_output=True, text=True, check=False)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("hostname ")]
    return found[0] if found else host.address


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Every host's command and environment, as one would type them there; secrets are not shown."""
    lines = []
    for node in nodes:
        last = node.first_rank + node.order.num_processes - 1
        ranks = f"rank {last}" if last == node.first_rank else f"ranks {node.first_rank} to {last}"
        shown = {name: "..." if is_secret(name, value) else value for name, value in node.order.environment.items()}
        command = shlex.join(["env", *_assign(shown), *node.order.command])
        lines += [f"# {node.host.name}: {ranks}", f"cd {shlex.quote(os.getcwd())} && {command}"]
    return "\n".join(lines)


def _assign(environment: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


class Line:
    """The line to one host: an ssh process, and a thread that hands on what the host prints under the host's name."""

    def __init__(self, node: Node):
        self.host = node.host
        self.has_started = False
        self.is_silent = False
        self.last_words = ""
        # In a session of its own, so that a signal to this process's group does not cut the line but goes through it.
        self.ssh = subprocess.Popen(
            make_ssh_command(node.host, ["-m", "hftcli.launching.cluster"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.ssh.stdin is not None
        assert self.ssh.stdout is not None
        self.stdin, self.stdout = self.ssh.stdin, self.ssh.stdout
        self.tell(node.order.model_dump_json())
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    @property
    def is_lost(self) -> bool:
        """Whether the host went away: ssh's own code for a broken line, or no answer."""
        return self.has_started and (self.is_silent or self.ssh.returncode == 255)

    def tell(self, text: str) -> None:
        """Send the host a line; to one whose ssh has ended, nothing is sent."""
        if not self.stdin.closed:
            with suppress(BrokenPipeError):  # ssh has ended: its code says why
                self.stdin.write(f"{text}\n".encode())
                self.stdin.flush()

    def close(self) -> None:
        """Have the host end its ranks."""
        with suppress(BrokenPipeError):
            self.stdin.close()

    def _read(self) -> None:
        with self.stdout:
            for line in self.stdout:
                text = line.decode(errors="replace").rstrip()
                if text == STARTED:
                    self.has_started = True
                elif text:
                    self.last_words = text
                print(f"{self.host.name}: {text}", flush=True)


def run_nodes(nodes: Sequence[Node]) -> list[Line]:
    """Run every host's order until all have ended. The first that fails ends the others; signals are handed on to all."""
    received: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: received.append(number))
    lines = [Line(node) for node in nodes]
    last_beat, failed_at = time.monotonic(), None
    while any(line.ssh.poll() is None for line in lines):
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        alive = [line for line in lines if line.ssh.poll() is None]
        if received or now - last_beat > BEAT_SECONDS:
            text = signal.Signals(received.pop(0)).name if received else ""
            for line in alive:
                line.tell(text)
            last_beat = now
        if failed_at is None and any(line.ssh.returncode for line in lines):
            failed_at = now
        if failed_at is None:
            continue
        if now - failed_at > SETTLE_SECONDS:
            for line in alive:
                line.close()
        if now - failed_at > SETTLE_SECONDS + LOST_SECONDS:
            for line in alive:
                line.is_silent = True
                line.ssh.kill()
    for line in lines:
        line.close()
        line.reader.join(timeout=1)  # a process that outlives its rank may hold the pipe
    return lines


def describe_end(lines: Sequence[Line], earlier: Failure | None) -> Failure | None:
    """What to tell of a launch's end.

    Args:
        lines: the hosts, all ended.
        earlier: what a rank wrote. A rank that lost its peer knows no better than that the connection closed, so a host that
            is gone is the better reason, unless the ranks had stopped at a signal already.

    Returns:
        None where all is well.
    """
    unstarted = [line for line in lines if line.ssh.returncode and not line.has_started]
    lost = [line for line in lines if line.is_lost]
    failed = [line for line in lines if line.ssh.returncode]
    if unstarted:
        words = "\n".join(f"{line.host.place}: {line.host.name} did not start: {line.last_words}" for line in unstarted)
        return Failure(message=words, fix="`hft doctor --hostfile FILE` checks every host", exit_code=InputError.exit_code)
    if lost and (earlier is None or earlier.exit_code != Interrupted.exit_code):
        names = ", ".join(f"{line.host.name} ({line.host.place})" for line in lost)
        said = "; ".join(dict.fromkeys(line.last_words for line in lost if line.last_words))
        return Failure(
            message=f"lost {names}: {said or 'no answer'}; the other ranks were ended, and what was finished before is kept",
            fix="see to the host or take it out of the hostfile, then run the same command again",
            exit_code=HftError.exit_code,
            traceback=earlier.traceback if earlier else "",
        )
    if failed and earlier is None:
        names = ", ".join(f"{line.host.name} ended with code {line.ssh.returncode}" for line in failed)
        return Failure(
            message=f"the ranks on {names} and left no word; what was finished before is kept",
            fix="see the end of worker.log: code 137 is a kill, mostly for want of memory",
            exit_code=HftError.exit_code,
        )
    return earlier


def serve() -> int:
    """Carry out an order from stdin on this host, and end it when the line closes or falls silent.

    Returns:
        The exit code: the command's, 128 and the signal's number where a signal ended it, or 2 where it cannot start.
    """
    line = os.fdopen(0, "rb", buffering=0, closefd=False)
    order = NodeOrder.model_validate_json(line.readline())
    os.environ.update(order.environment)  # which may say which devices are to be taken
    num_gpus = count_gpus()
    if 0 < num_gpus < order.num_processes:
        print(f"{num_gpus} GPUs for {order.num_processes} ranks: lower its slots or --num-processes", flush=True)
        return InputError.exit_code
    own = worker_environment(LaunchSection(num_processes=order.num_processes))
    process = subprocess.Popen(order.command, stdin=subprocess.DEVNULL, env={**own, **os.environ}, start_new_session=True)
    os.write(sys.stdout.fileno(), f"{STARTED}\n".encode())  # at once: a word of a rank could fall between a line and its end
    heard = time.monotonic()
    while process.poll() is None:
        if select.select([line], [], [], POLL_SECONDS)[0]:
            data = os.read(0, 4096)
            if not data:
                _end(process)
                break
            heard = time.monotonic()
            for name in data.decode().split():
                _signal(process, signal.Signals[name])
        elif time.monotonic() - heard > SILENCE_SECONDS:
            _end(process)
            break
    code = process.wait()
    return 128 - code if code < 0 else code


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the ranks and their launcher."""
    with suppress(ProcessLookupError):  # they have ended
        os.killpg(process.pid, number)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the ranks and their launcher; none may be left, and hold a device."""
    _signal(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    _signal(process, signal.SIGKILL)


def main() -> int:
    """Run a round on its hosts; without arguments, be one of them. Returns the exit code."""
    if len(sys.argv) == 1:
        return serve()
    round_ = Round(Path(sys.argv[1]))
    nodes = make_nodes(round_.folder, round_.read_spec().launch, int(sys.argv[2]), collect_environment(os.environ))
    lines = run_nodes(nodes)
    if round_.is_done:
        return 0
    earlier = read_model(round_.failure_path, Failure) if round_.failure_path.exists() else None
    failure = describe_end(lines, earlier)
    if failure is None:
        return 0
    write_model(round_.failure_path, failure)
    return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
