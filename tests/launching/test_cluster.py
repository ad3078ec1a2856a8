"""Many hosts: the command of each, and what happens when one of them fails.

In place of ssh stands a script that runs the command here, so that all else is real: processes, pipes and signals. Real hosts
with addresses of their own are in end_to_end/test_clusters.py.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching.nodes import make_node

from hftcli.errors import InputError
from hftcli.launching import cluster
from hftcli.launching.cluster import describe_end, describe_nodes, make_nodes, run_nodes
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.spec import Failure

SSH = """\
#!/bin/bash
if [ "$1" = -G ]; then echo "user me"; echo "hostname ${2/alias/10.0.0.1}"; exit; fi
command=${!#}
shift $(($# - 2))
if [ "$1" = gone ]; then echo "ssh: connect to host gone port 22: Connection refused" >&2; exit 255; fi
exec bash -c "$command"
"""


@pytest.fixture
def _ssh(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kept = {number: signal.getsignal(number) for number in cluster.SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends while it is read
        return False


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)
    return path.read_text().strip()


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is left"
        time.sleep(0.05)


@pytest.mark.usefixtures("_ssh")
def test_every_host_has_its_ranks_and_finds_rank_0(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("alias slots=4\nme@b slots=4\n")
    launch = LaunchSection(hostfile=str(tmp_path / "hosts"), num_nodes=2, num_processes=2)
    nodes = make_nodes(tmp_path / "r", launch, 29501, {"HF_TOKEN": "secret", "NCCL_DEBUG": "INFO"})
    assert [(node.host.name, node.first_rank) for node in nodes] == [("alias", 0), ("me@b", 2)]
    for rank, node in enumerate(nodes):
        program, module, name, world, *rest = node.order.command
        assert (program, module, name) == (sys.executable, "-m", "deepspeed.launcher.launch")
        world = json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))
        assert world == {"alias": [0, 1], "me@b": [0, 1]}
        place = [f"--node_rank={rank}", "--master_addr=10.0.0.1", "--master_port=29501"]
        assert rest == [*place, "--no_local_rank", "--module", "hftcli.training.worker", str(tmp_path / "r")]
    shown = describe_nodes(nodes)
    assert "# alias: ranks 0 to 1\n" in shown
    assert "# me@b: ranks 2 to 3\n" in shown
    assert shown.count("NCCL_DEBUG=INFO") == 2
    assert "secret" not in shown
    with pytest.raises(InputError, match="names 2 hosts, and the round was prepared for 3"):
        make_nodes(tmp_path, launch.model_copy(update={"num_nodes": 3}), 1, {})


@pytest.mark.usefixtures("_ssh")
def test_hosts_that_finish_leave_nothing_to_say(capfd):
    lines = run_nodes([make_node("a", "echo $MARK; echo $DS_ACCELERATOR"), make_node("b", "echo there")])
    assert describe_end(lines, None) is None
    shown = capfd.readouterr().out.splitlines()
    assert {"a: m", "a: cpu", "b: there"} <= set(shown)


@pytest.mark.usefixtures("_ssh")
def test_a_host_that_fails_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SETTLE_SECONDS", 0.5)
    pid = tmp_path / "pid"
    script = f"while [ ! -s {pid} ]; do sleep 0.1; done; kill -9 $$"
    lines = run_nodes([make_node("a", script), make_node("b", f"echo $$ > {pid}; sleep 600")])
    assert not is_alive(int(pid.read_text()))
    failure = describe_end(lines, None)
    assert failure.exit_code == 1
    assert "a ended with code 137" in failure.message
    spoken = Failure(message="why", exit_code=3)
    assert describe_end(lines, spoken) == spoken


@pytest.mark.usefixtures("_ssh")
def test_a_lost_host_is_named_over_what_its_peers_saw():
    # 255 is ssh's own code for a line that broke.
    lines = run_nodes([make_node("a", "echo 'Connection closed by peer'; exit 1"), make_node("b", "exit 255")])
    failure = describe_end(lines, Failure(message="Connection closed by peer", exit_code=1, traceback="where"))
    assert failure.message.startswith("lost b (hosts:b): no answer; the other ranks were ended")
    assert (failure.exit_code, failure.traceback) == (1, "where")
    stopped = Failure(message="stopped after a checkpoint", exit_code=75)
    assert describe_end(lines, stopped) == stopped


@pytest.mark.usefixtures("_ssh")
def test_a_host_that_does_not_start_is_the_users_to_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SETTLE_SECONDS", 0.5)
    failure = describe_end(run_nodes([make_node("a", "sleep 600"), make_node("gone", "true")]), None)
    assert failure.exit_code == 2
    assert failure.message == "hosts:gone: gone did not start: ssh: connect to host gone port 22: Connection refused"


FRONT = """\
import sys
from hftcli.launching.cluster import run_nodes
sys.path.insert(0, {tests!r})
from launching.nodes import make_node
lines = run_nodes([make_node(name, {script!r}.replace("NAME", name)) for name in ("a", "b")])
sys.exit(max(line.ssh.returncode for line in lines))
"""


def start_front(script: str) -> subprocess.Popen:
    code = FRONT.format(tests=str(Path(__file__).parents[1]), script=script)
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


@pytest.mark.usefixtures("_ssh")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_front_reaches_the_ranks_of_every_host(tmp_path, number):
    name = number.name.removeprefix("SIG")
    script = f"trap 'echo {name} > {tmp_path}/NAME.got; exit 75' {name}; echo 1 > {tmp_path}/NAME; while :; do sleep 0.1; done"
    front = start_front(script)
    for host in ("a", "b"):
        wait_for(tmp_path / host)
    os.killpg(front.pid, number)
    assert front.wait(30) == 75
    assert [(tmp_path / f"{host}.got").read_text().strip() for host in ("a", "b")] == [name] * 2


@pytest.mark.usefixtures("_ssh")
def test_a_front_that_is_killed_leaves_no_rank_behind(tmp_path):
    front = start_front(f"echo $$ > {tmp_path}/NAME; sleep 600")
    pids = [int(wait_for(tmp_path / name)) for name in ("a", "b")]
    os.killpg(front.pid, signal.SIGKILL)
    front.wait(30)
    for pid in pids:
        wait_for_end(pid)
