"""The machines of a run: DeepSpeed's hostfile, and what of the environment goes along to them.

    # the first host has rank 0
    worker-0 slots=8
    worker-1 slots=8

A host is named as `ssh` takes it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hftcli.errors import InputError

# Variables that shape what a process computes or reaches, and so must be the same on every machine. Which devices a process
# sees (CUDA_VISIBLE_DEVICES) is each machine's own affair.
FORWARDED_PREFIXES = (
    "DS_", "FI_", "GLOO_", "HF_", "HFT_", "HUGGING_FACE_", "MKL_", "NCCL_", "OMP_", "PYTHON", "TOKENIZERS_", "TORCH_",
    "TRANSFORMERS_", "UCX_",
    # Where the trackers of `train.report_to` are, and who tells them: rank 0 may be on another machine.
    "AZUREML_", "CLEARML_", "COMET_", "DAGSHUB_", "DVCLIVE_", "DVC_", "MLFLOW_", "NEPTUNE_", "SWANLAB_", "TENSORBOARD_",
    "TRACKIO_", "WANDB_",
)  # fmt: skip
FORWARDED_NAMES = ("CUDA_HOME", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "http_proxy", "https_proxy", "no_proxy")
SECRET = re.compile(r"TOKEN$|SECRET|WEBHOOK|PASSWORD|PASSWD|CREDENTIAL|(ACCESS|API|AUTH|PRIVATE)_?KEY", re.IGNORECASE)
PASSWORD_IN_ADDRESS = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile.

    Attributes:
        name: what `ssh` takes: a name, an address, or `user@name`.
        num_slots: processes that it has room for, at least 1.
        place: `file:line`, for messages.
    """

    name: str
    num_slots: int
    place: str

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path | str) -> tuple[Host, ...]:
    """The hosts of a hostfile, in order.

    Raises:
        InputError: no such file, or naming every line that is not DeepSpeed's format, a host that stands twice, or a name by
            which the others would not find the first host.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fix = "give a file with a line `host slots=8` per machine"
        raise InputError(f"launch.hostfile {path} cannot be read: {error}", fix) from None
    hosts: dict[str, Host] = {}
    faults = []
    for number, line in enumerate(lines, start=1):
        place, text = f"{path}:{number}", line.partition("#")[0].strip()
        found = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d+)", text)
        if not text:
            continue
        if found is None or int(found[2]) < 1:
            faults.append(f"{place}: expected `host slots=8`, with one slot or more, got {text!r}")
        elif found[1] in hosts:
            faults.append(f"{place}: {found[1]} is given twice, first at {hosts[found[1]].place}")
        else:
            hosts[found[1]] = Host(found[1], int(found[2]), place)
    named = tuple(hosts.values())
    if not named and not faults:
        faults.append(f"{path}: names no host")
    if len(named) > 1 and named[0].address == "localhost":
        faults.append(f"{named[0].place}: rank 0 is at localhost, where the other hosts find themselves")
    if faults:
        raise InputError("\n".join(faults), "write one line `host slots=N` per machine, by names that all of them know")
    return named


def count_slots(hosts: tuple[Host, ...], num_processes: int | None) -> int:
    """Processes on each host: what is asked for, or every slot where the hosts have equally many.

    Raises:
        InputError: a host with fewer slots than asked for, or hosts that differ with nothing asked for.
    """
    least = min(hosts, key=lambda host: host.num_slots)
    if num_processes is None and any(host.num_slots != least.num_slots for host in hosts):
        most = max(hosts, key=lambda host: host.num_slots)
        raise InputError(
            f"{least.place}: {least.name} has {least.num_slots} slots, but {most.name} has {most.num_slots} ({most.place}), "
            "and every host runs equally many processes",
            f"give --num-processes {least.num_slots} or less, or change the file",
        )
    if num_processes is not None and num_processes > least.num_slots:
        raise InputError(
            f"{least.place}: launch.num_processes is {num_processes}, but {least.name} has {least.num_slots} slots",
            f"set it to {least.num_slots} or less, or change the file",
        )
    return num_processes or least.num_slots


def collect_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What of this machine's environment the other machines get.

    That is what computes (NCCL, OpenMP, PyTorch), what finds models and data (the hub's and hft's variables) and trackers, and,
    as with DeepSpeed's own launcher, the lines `NAME=value` of `.deepspeed_env` here and in the home folder, or of the file
    that DS_ENV_FILE names.

    Raises:
        InputError: a line of such a file is not `NAME=value`.
    """
    found = {
        name: value for name, value in environment.items() if name.startswith(FORWARDED_PREFIXES) or name in FORWARDED_NAMES
    }
    file = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / file, Path(file)):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, equals, value = text.partition("=")
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
                raise InputError(f"{path}:{number}: expected NAME=value, got {text!r}", "mend the line, or remove it")
            found[name.strip()] = value.strip()
    return dict(sorted(found.items()))


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value must not be shown, nor stand in a file or on a command line."""
    return SECRET.search(name) is not None or PASSWORD_IN_ADDRESS.search(value) is not None
