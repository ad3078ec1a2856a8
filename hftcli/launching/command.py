"""Where a worker runs, and the command and environment that start it there."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.launching.hosts import count_slots, read_hostfile
from hftcli.launching.slurm import make_step_command
from hftcli.recipe.sections import LaunchSection

MASK = "CUDA_VISIBLE_DEVICES"
HELD_MASK = "HFT_VISIBLE_DEVICES"  # the mask, past DeepSpeed's launchers, which write their own numbers over it


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs that a worker on this machine would see, without importing torch."""
    visible = environment.get(MASK)
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
        return _resolve_hosts(launch, launch.hostfile)
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


def _resolve_hosts(launch: LaunchSection, hostfile: str) -> LaunchSection:
    hosts = read_hostfile(hostfile)
    if launch.num_nodes not in (None, len(hosts)):
        raise InputError(
            f"launch.num_nodes is {launch.num_nodes}, but {hostfile} names {len(hosts)} hosts",
            "leave launch.num_nodes out: the hostfile says it",
        )
    update = {
        "hostfile": str(Path(hostfile).resolve()),
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
        launch = _resolve_hosts(launch, launch.hostfile)
    return (launch.num_processes or max(count_gpus(), 1)) * (launch.num_nodes or 1)


def worker_command(folder: Path, launch: LaunchSection, port: int) -> list[str]:
    """The command that runs a prepared round from this machine.

    One process; or DeepSpeed's launcher here; or, for several machines, DeepSpeed's launcher on each host of the hostfile
    (see cluster.py), or Slurm's srun.

    Raises:
        InputError: several machines, with neither a hostfile nor Slurm to reach them.
    """
    if launch.hostfile:
        return [sys.executable, "-m", "hftcli.launching.cluster", str(folder.resolve()), str(port)]
    worker = [sys.executable, "-m", "hftcli.training.worker", str(folder)]
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
    changes["PYTHONSAFEPATH"] = "1"  # a file of the user's that is called as a module, csv.py, is not to be imported as it
    if PACKAGE.parent == Path.cwd():  # hft runs from the folder of its source
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    if launch.hostfile or launch.slurm:  # every machine looks at its own devices
        return changes
    if MASK in os.environ:
        changes[HELD_MASK] = os.environ[MASK]
    if count_gpus() == 0:
        changes["DS_ACCELERATOR"] = "cpu"  # for DeepSpeed's launcher too
        _, num_processes = launch.shape
        if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            changes["OMP_NUM_THREADS"] = str(_share_cores(num_processes))
    return changes


def settle_devices(environment: MutableMapping[str, str]) -> None:
    """Make a worker's environment say on what it computes, before torch is imported.

    The mask of the GPUs becomes the user's again, so that LOCAL_RANK counts within it. A rank that is alone sees one GPU: of
    several, transformers would make a DataParallel, which TRL refuses. Without GPUs, DeepSpeed computes on the processor, and
    ranks share its cores.

    Args:
        environment: `os.environ`, as the launcher left it.
    """
    if HELD_MASK in environment:
        environment[MASK] = environment.pop(HELD_MASK)
    num_gpus = count_gpus(environment)
    if num_gpus > 1 and int(environment.get("WORLD_SIZE", "1")) == 1:
        environment[MASK] = environment.get(MASK, "0").split(",")[0].strip()
    if num_gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        if (num_local := int(environment.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            environment.setdefault("OMP_NUM_THREADS", str(_share_cores(num_local)))


def _share_cores(num_processes: int) -> int:
    return max((os.cpu_count() or 1) // num_processes, 1)


def find_free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
