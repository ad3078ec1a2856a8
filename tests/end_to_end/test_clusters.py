"""Several machines, for real: two network namespaces with addresses and sshd of their own, a Slurm of one node, and rounds that
are launched by hand. What is not installed, or not allowed, is skipped and named."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hftcli.runs.files import read_model
from hftcli.runs.run import Round
from hftcli.runs.spec import Progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BIN = Path(sys.executable).parent
SHORT = {
    "eval.tasks": "[]",
    "train.max_steps": 4,
    "train.logging_steps": 1,
    "train.global_batch_size": 8,
    "train.per_device_train_batch_size": 4,
}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in Round(run / "rounds" / "00-sft").read_metrics()]


@pytest.fixture(scope="module")
def one_machine(hft, settings, tmp_path_factory) -> Path:
    """The same round on two ranks of this machine."""
    run = tmp_path_factory.mktemp("runs") / "one"
    hft("sft", "--output", run, "--num-processes", 2, *settings(SHORT))
    return run


@pytest.mark.parametrize("launcher", ["torchrun --nproc_per_node 2 -m", "deepspeed --num_gpus 2 --module"])
def test_a_prepared_round_is_launched_by_hand(hft, settings, one_machine, tmp_path, launcher):
    run = tmp_path / "run"
    hft("sft", "--output", run, "--num-processes", 2, "--dry-run", *settings(SHORT))
    program, *options = launcher.split()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [BIN / program, *options, "hftcli.training.worker", run / "rounds" / "00-sft"]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert losses(run) == losses(one_machine)
    # The command that prepared it finds it done.
    result = (run / "rounds" / "00-sft" / "result.json").stat().st_mtime_ns
    hft("sft", "--output", run, "--num-processes", 2, *settings(SHORT))
    assert (run / "rounds" / "00-sft" / "result.json").stat().st_mtime_ns == result


def test_another_number_of_ranks_than_prepared_is_refused(hft, settings, tmp_path):
    run = tmp_path / "run"
    hft("sft", "--output", run, "--num-processes", 2, "--dry-run", *settings(SHORT))
    folder = run / "rounds" / "00-sft"
    done = subprocess.run([sys.executable, "-m", "hftcli.training.worker", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is prepared for 2 ranks, and 1 were started" in json.loads((folder / "failure.json").read_text())["message"]


@dataclass(frozen=True)
class Hosts:
    """Two hosts that share this machine's disk."""

    hostfile: Path
    namespaces: tuple[str, str]
    environment: dict[str, str]

    def start(self, *arguments: object) -> subprocess.Popen:
        """`hft` on the first host."""
        command = ["ip", "netns", "exec", self.namespaces[0], sys.executable, "-m", "hftcli", *map(str, arguments)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def find_processes(self, index: int) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.namespaces[index]], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]


def _run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.fixture
def two_hosts(tmp_path) -> Iterator[Hosts]:
    """10.77.0.1 and 10.77.0.2, a network namespace each, with sshd and a key, and no other way to each other."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if os.geteuid() != 0 or sshd is None or shutil.which("ip") is None:
        pytest.skip("needs root, OpenSSH's sshd and iproute2")
    names = tuple(f"hft-{os.getpid()}-{index}" for index in (1, 2))
    for name in names:
        if (made := _run("ip", "netns", "add", name)).returncode:
            pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
    servers = []
    try:
        _run("ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
        (tmp_path / "authorized").write_text((tmp_path / "key.pub").read_text())
        Path("/run/sshd").mkdir(exist_ok=True)
        key = (tmp_path / "key.pub").read_text().split()[:2]
        (tmp_path / "known").write_text("".join(f"10.77.0.{index} {' '.join(key)}\n" for index in (1, 2)))
        for index, name in enumerate(names, start=1):
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{index}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")
            options = [
                f"HostKey={tmp_path}/key", f"AuthorizedKeysFile={tmp_path}/authorized", "StrictModes=no", "UsePAM=no",
                f"ListenAddress=10.77.0.{index}", "PermitRootLogin=yes", "PidFile=none",
            ]  # fmt: skip
            server = [
                "ip",
                "netns",
                "exec",
                name,
                sshd,
                "-D",
                "-f",
                "/dev/null",
                *(part for o in options for part in ("-o", o)),
            ]
            servers.append(subprocess.Popen(server, stderr=subprocess.DEVNULL))
        (tmp_path / "config").write_text(
            f"IdentityFile {tmp_path}/key\nUserKnownHostsFile {tmp_path}/known\nHost second\n  HostName 10.77.0.2\n"
        )
        (tmp_path / "ssh").write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -F {tmp_path}/config "$@"\n')
        (tmp_path / "ssh").chmod(0o755)
        hostfile = tmp_path / "hosts"
        hostfile.write_text("10.77.0.1 slots=1\nsecond slots=1\n")
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "eth0", "NO_COLOR": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        time.sleep(1)
        yield Hosts(hostfile, names, environment)
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for name in names:
            for pid in _run("ip", "netns", "pids", name).stdout.split():
                os.kill(int(pid), 9)
            _run("ip", "netns", "del", name)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_train_as_two_ranks_of_one_machine_do(settings, two_hosts, one_machine, tmp_path, stage):
    run = tmp_path / "run"
    recipe = SHORT | {"launch.num_processes": "null", "launch.zero_stage": stage}
    front = two_hosts.start("sft", "--output", run, "--hostfile", two_hosts.hostfile, *settings(recipe))
    _, errors = front.communicate(timeout=500)
    assert front.returncode == 0, errors + (run / "rounds" / "00-sft" / "worker.log").read_text()
    assert losses(run) == pytest.approx(losses(one_machine), abs=1e-3)
    result = Round(run / "rounds" / "00-sft").read_result()
    assert result.hardware.num_processes == 2
    assert result.verification.passed
    # Rank 1 was on the second host, and both spoke over the wire.
    log = (run / "rounds" / "00-sft" / "worker.log").read_text()
    assert "second: " in log
    assert "10.77.0.1: " in log
    doctor = two_hosts.start("doctor", "--hostfile", two_hosts.hostfile, "--output", run, "--set", "launch.num_processes=null")
    shown = doctor.communicate(timeout=200)[0]
    assert doctor.returncode == 0
    assert shown.count("reachable, same versions, shared folder") == 2


@pytest.mark.parametrize("fault", ["killed", "unplugged"])
def test_a_lost_host_ends_the_job_with_its_name_and_the_rerun_finishes(settings, two_hosts, tmp_path, fault):
    run = tmp_path / "run"
    longer = settings(SHORT | {"launch.num_processes": "null", "train.max_steps": 150})
    arguments = ["sft", "--output", run, "--hostfile", two_hosts.hostfile, *longer]
    front = two_hosts.start(*arguments)
    round_ = Round(run / "rounds" / "00-sft")
    deadline = time.monotonic() + 300
    while not (round_.progress_path.exists() and read_model(round_.progress_path, Progress).done >= 3):
        assert time.monotonic() < deadline
        assert front.poll() is None, (round_.folder / "worker.log").read_text()
        time.sleep(0.2)
    if fault == "killed":
        for pid in two_hosts.find_processes(1):
            os.kill(pid, 9)
    else:
        _run("ip", "-n", two_hosts.namespaces[1], "link", "set", "eth0", "down")
    _, errors = front.communicate(timeout=200)
    assert front.returncode == 1
    assert f"lost second ({two_hosts.hostfile}:2)" in errors
    deadline = time.monotonic() + 100  # the host that stays ends its rank; the one cut off finds the line silent
    while any(b"hftcli.training.worker" in _read_command(pid) for index in (0, 1) for pid in two_hosts.find_processes(index)):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.5)
    two_hosts.hostfile.write_text("10.77.0.1 slots=2\n")
    again = two_hosts.start(*arguments)
    _, errors = again.communicate(timeout=900)
    assert again.returncode == 0, errors
    assert round_.read_result().verification.passed


def _read_command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends while it is read
        return b""


SLURM_CONF = """\
ClusterName=hft
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=15
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[None]:
    """A Slurm of one node with two cores."""
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name, path="/usr/sbin:/usr/bin") is None
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm; not found: {', '.join(missing)}")
    for folder in ("state", "spool", "munge"):
        (tmp_path / folder).mkdir()
    (tmp_path / "munge.key").write_bytes(os.urandom(1024))
    (tmp_path / "munge.key").chmod(0o600)
    host = _run("hostname", "-s").stdout.strip()
    (tmp_path / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=tmp_path))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    places = {
        name: f"--{name}={tmp_path}/munge/{name.removesuffix('-file')}"
        for name in ("socket", "pid-file", "log-file", "seed-file")
    }
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={tmp_path}/munge.key", *places.values()],
        ["slurmctld", "-D", "-c", "-f", tmp_path / "slurm.conf"],
        ["slurmd", "-D", "-f", tmp_path / "slurm.conf"],
    ]
    running = []
    try:
        for daemon in daemons:
            running.append(subprocess.Popen(daemon, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(2)
        deadline = time.monotonic() + 60
        while "idle" not in _run("sinfo", "-h", "-o", "%T").stdout:
            assert time.monotonic() < deadline, (tmp_path / "slurmctld.log").read_text()
            time.sleep(1)
        yield
    finally:
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait()


def wait_for_job(job: str, run: Path) -> str:
    """What a job printed, once it has come to a good end."""
    deadline = time.monotonic() + 900
    while _run("squeue", "-h", "-j", job).stdout.strip():
        assert time.monotonic() < deadline, (run / f"slurm-{job}.log").read_text()
        time.sleep(1)
    log = (run / f"slurm-{job}.log").read_text()
    assert "JobState=COMPLETED" in _run("scontrol", "show", "job", job).stdout, log
    return log


@pytest.mark.usefixtures("slurm")
def test_a_job_of_slurm_runs_the_round(hft, settings, one_machine, tmp_path):
    run = tmp_path / "run"
    recipe = settings(SHORT | {"launch.slurm.gres": "none"})
    job = hft("sft", "--output", run, "--num-processes", 2, "--slurm", "--submit", *recipe).stdout.strip()
    log = wait_for_job(job, run)
    assert losses(run) == losses(one_machine)
    assert "verified" in log


@pytest.mark.usefixtures("slurm")
def test_a_job_of_slurm_runs_round_after_round(hft, settings, tmp_path):
    run = tmp_path / "run"
    recipe = {"launch.slurm.gres": "none", "train.max_steps": 2, "eval.max_examples": 4}
    shown = hft("continual", "--output", run, "--slurm", "--submit", *settings(recipe)).stdout
    job = shown.splitlines()[-1]
    wait_for_job(job, run)
    assert len(list(run.glob("rounds/*/result.json"))) == len(list(run.glob("rounds/*/round.json"))) > 1


@pytest.mark.usefixtures("slurm")
def test_a_job_that_is_warned_is_queued_again_and_one_that_is_cancelled_is_not(hft, settings, tmp_path):
    """Both leave a checkpoint of the step that they were at."""
    run = tmp_path / "run"
    round_ = Round(run / "rounds" / "00-sft")
    long = SHORT | {"train.max_steps": 100_000, "launch.slurm.gres": "none"}
    job = hft("sft", "--output", run, "--num-processes", 1, "--slurm", "--submit", *settings(long)).stdout.strip()

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not what():
            assert time.monotonic() < deadline, (run / f"slurm-{job}.log").read_text()
            time.sleep(0.5)

    def is_past(step: int) -> bool:
        place = read_model(round_.progress_path, Progress) if round_.progress_path.exists() else None
        return place is not None and place.phase == "training" and place.done > step

    def has_state(state: str) -> bool:
        return f"JobState={state}" in _run("scontrol", "show", "job", job).stdout

    wait_for(lambda: is_past(2))
    _run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does ahead of the limit
    wait_for(lambda: has_state("PENDING"))
    (first,) = round_.saved_steps
    assert first > 2
    assert "the job is queued again" in (run / f"slurm-{job}.log").read_text()

    wait_for(lambda: is_past(first))  # once the credential of the first start has expired, which SLURM_CONF has it do soon
    _run("scancel", job)
    wait_for(lambda: has_state("CANCELLED"))
    assert round_.saved_steps[0] > first
    time.sleep(5)
    assert has_state("CANCELLED")
