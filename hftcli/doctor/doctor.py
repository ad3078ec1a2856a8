"""`hft doctor`: what stands between this machine, or the hosts of a hostfile, and a run.

    python -m hftcli.doctor.doctor FILE     on a host: a HostReport as JSON, and whether FILE, written here, is there too

Every check is a function that returns findings. A fault keeps the run from working; a warning may.
"""

import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from pydantic import ValidationError

from hftcli import __version__
from hftcli.launching.cluster import make_ssh_command
from hftcli.launching.command import MASK, count_gpus
from hftcli.launching.hosts import Host
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import Section
from hftcli.recipe.sections import LaunchSection

HOST_SECONDS = 30.0  # for a host to answer
ALIKE = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets")  # the same on every host
MIN_SHARED_MEMORY_BYTES = 512 * 2**20  # below this, NCCL between the GPUs of a machine may fail
MAX_FILLED_FRACTION = 0.8  # of a disk

WITHOUT_AMX = "this processor has no matrix units for bfloat16 (AMX), without which it was slower than float32 where measured"

Status = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        check: what was looked at.
        message: what was found.
        fix: what to do about it; empty where all is well.
    """

    check: str
    status: Status
    message: str
    fix: str = ""


@dataclass(frozen=True)
class Probe:
    """What torch and DeepSpeed see of this machine.

    Attributes:
        cuda: version of CUDA that torch is built for; None for a CPU build.
        num_devices: GPUs that torch can use.
        is_faster_in_bfloat16: whether they, or without one the processor, multiply faster in bfloat16.
        ops: DeepSpeed's compiled operations, and whether this machine has what it takes to build each one.
        has_mac_gpu: whether one process computes on a Mac's GPU.
    """

    cuda: str | None
    num_devices: int
    is_faster_in_bfloat16: bool
    ops: dict[str, bool]
    has_mac_gpu: bool = False


class HostReport(Section):
    """What a host says of itself, without torch."""

    versions: dict[str, str]
    """Installed versions of hft and what computes."""
    num_gpus: int
    """GPUs that a worker would see."""
    device_bytes: int
    """Memory of the smallest GPU, or of the machine where there is none."""
    sees_file: bool
    """Whether the file that the asking machine wrote is there."""


def check_packages() -> list[Finding]:
    """Installed versions against those that hft's own metadata asks for."""
    try:
        return judge_packages(importlib.metadata.requires("hftcli") or ())
    except importlib.metadata.PackageNotFoundError:
        return [Finding("packages", "warning", "hftcli runs from a folder and is not installed", "pip install it")]


def judge_packages(required: Iterable[str]) -> list[Finding]:
    """Args: required: requirements as pip takes them; those of extras are passed over."""
    findings, good = [], []
    for requirement in map(Requirement, required):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = find_version(requirement.name)
        if version is None:
            findings.append(Finding("packages", "fault", f"{requirement.name} is missing", f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            message = f"{requirement.name} is {version}, and hft needs {requirement.specifier}"
            findings.append(Finding("packages", "fault", message, f"pip install '{requirement}'"))
        elif requirement.name in ALIKE:
            good.append(f"{requirement.name} {version}")
    python = ".".join(map(str, sys.version_info[:3]))
    return [*findings, Finding("packages", "ok", f"hft {__version__}, Python {python}, {', '.join(good)}")]


def find_version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices(probe: Probe, recipe: Recipe | None) -> list[Finding]:
    """GPUs that the driver lists, against those that torch can use."""
    listed = count_gpus()
    asked = None if recipe is None else recipe.train.bf16
    precision = "bfloat16" if asked or (asked is None and probe.is_faster_in_bfloat16) else "float32"
    if probe.has_mac_gpu or listed == 0:
        message = f"no GPU: CPU ranks, {precision}, {os.cpu_count()} cores"
        if probe.has_mac_gpu:
            message = f"a Mac's GPU (MPS): one process computes there, in {precision}; several on {os.cpu_count()} cores"
        findings = [Finding("devices", "ok", message)]
        if asked and not probe.is_faster_in_bfloat16 and recipe is not None and not recipe.launch.is_elsewhere:
            what = "a Mac's GPU has never been tried in bfloat16" if probe.has_mac_gpu else WITHOUT_AMX
            findings.append(Finding("devices", "warning", what, "drop train.bf16: true, and it computes in float32"))
        return findings
    if probe.cuda is None:
        message = f"{listed} GPUs, but this torch is a CPU build"
        return [Finding("devices", "fault", message, "install the CUDA build of torch (https://pytorch.org)")]
    if probe.num_devices < listed:
        message = f"{listed} GPUs, of which torch (CUDA {probe.cuda}) can use {probe.num_devices}"
        return [Finding("devices", "fault", message, "install a driver as new as that CUDA, or a torch for an older one")]
    names = ", ".join(sorted({name for name, _ in list_gpus()})) or "unnamed"
    findings = [Finding("devices", "ok", f"{listed} GPUs ({names}), CUDA {probe.cuda}")]
    if not probe.is_faster_in_bfloat16 and asked:
        message = "these GPUs do not compute in bfloat16, and imitate it slowly"
        findings.append(Finding("devices", "warning", message, "drop train.bf16: true, and they compute in float32"))
    elif not probe.is_faster_in_bfloat16 and asked is None:
        message = "these GPUs do not compute in bfloat16: rounds run in float32, with twice the memory"
        findings.append(Finding("devices", "warning", message, "set train.bf16: false, to say so"))
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if listed > 1 and shared < MIN_SHARED_MEMORY_BYTES:
        message = f"/dev/shm has {shared / 2**20:.0f} MiB, and NCCL may need more between GPUs"
        findings.append(Finding("devices", "warning", message, "in a container: --shm-size=1g, or --ipc=host"))
    return findings


def list_gpus(environment: Mapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Names and bytes of this machine's GPUs that a worker may see: as the driver lists them, those of the mask.

    The mask names them by UUID, or the beginning of one, or by number. A number is the driver's own with
    `CUDA_DEVICE_ORDER=PCI_BUS_ID` alone: without it CUDA counts the fastest first, and any of the GPUs may be meant.
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    split = [line.split(", ", 2) for line in lines if line.count(", ") >= 3]
    rows = [(number, uuid, *rest.rpartition(", ")) for number, uuid, rest in split]
    gpus = [(number, uuid, (name, int(mebibytes) * 2**20)) for number, uuid, name, _, mebibytes in rows if mebibytes.isdigit()]
    visible = [device.strip() for device in environment.get(MASK, "").split(",")]
    is_by_number = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    seen = [
        gpu for number, uuid, gpu in gpus
        if (is_by_number and number in visible) or any(uuid.startswith(device) for device in visible if "-" in device)
    ]  # fmt: skip
    return seen or [gpu for *_, gpu in gpus]


def measure_device_bytes() -> int:
    """Memory of the smallest GPU that a worker may see, or of the machine where there is none."""
    gpus = [num_bytes for _, num_bytes in list_gpus()] if count_gpus() else []
    return min(gpus, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_ops(probe: Probe) -> Finding:
    """DeepSpeed's compiled operations. hft's own settings use none; a recipe that adds DeepSpeed's optimizers would."""
    if not probe.ops:
        return Finding("ops", "ok", "no DeepSpeed: one process, which needs none of its operations")
    able = sorted(name for name, is_able in probe.ops.items() if is_able)
    return Finding("ops", "ok", f"DeepSpeed can build {len(able)} of its {len(probe.ops)} operations here: {', '.join(able)}")


def check_launcher(launch: LaunchSection) -> list[Finding]:
    """The programs that start the ranks."""
    if launch.hostfile:
        needed, fix = ["ssh"], "install OpenSSH's client"
    elif launch.slurm:
        needed, fix = ["sbatch", "srun", "scontrol"], "run this where Slurm's commands are, mostly on a login node"
    else:
        return [Finding("launcher", "ok", "DeepSpeed's, on this machine")]
    found = {name: path for name in needed if (path := shutil.which(name)) is not None}
    if missing := [name for name in needed if name not in found]:
        return [Finding("launcher", "fault", f"not found: {', '.join(missing)}", fix)]
    return [Finding("launcher", "ok", ", ".join(found.values()))]


def check_hosts(hosts: Sequence[Host], num_processes: int, folder: Path) -> tuple[list[Finding], list[HostReport]]:
    """Ask every host at once: reachable, of the same versions, with devices enough, and on the same file system.

    Args:
        num_processes: ranks on each.
        folder: of the run, or the nearest one above it that exists.

    Returns:
        Findings, and what the hosts that answered said.
    """
    mark = folder / f".hft-doctor-{secrets.token_hex(4)}"
    try:
        mark.touch()
    except OSError as error:
        return [Finding("hosts", "fault", f"{folder} cannot be written: {error}", "give another --output")], []
    try:
        with ThreadPoolExecutor(max_workers=32) as pool:
            answers = list(pool.map(lambda host: ask_host(host, mark), hosts))
    finally:
        mark.unlink()
    here = find_versions()
    findings = []
    for host, answer in zip(hosts, answers, strict=True):
        findings += judge_host(host, answer, here, num_processes, folder)
    return findings, [answer for answer in answers if isinstance(answer, HostReport)]


def ask_host(host: Host, mark: Path) -> HostReport | str:
    """What a host says of itself, or why it does not."""
    command = make_ssh_command(host, ["-m", "hftcli.doctor.doctor", str(mark.resolve())])
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=HOST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {HOST_SECONDS:.0f} s"
    lines = done.stdout.strip().splitlines()
    try:
        return HostReport.model_validate_json(lines[-1] if lines else "")
    except ValidationError:
        said = (done.stderr.strip() or done.stdout.strip() or f"ssh ended with code {done.returncode}").splitlines()
        return said[-1]


def judge_host(host: Host, answer: HostReport | str, here: dict[str, str], num_processes: int, folder: Path) -> list[Finding]:
    """Findings about one host.

    Args:
        here: the versions of this machine.
    """
    name = f"host {host.name}"
    if isinstance(answer, str):
        fix = f"`ssh {host.name} true` must work with no password, and {sys.executable} and {os.getcwd()} must be there"
        return [Finding(name, "fault", f"{host.place}: {answer}", fix)]
    findings = []
    other = [
        f"{key} {answer.versions.get(key)} (here {value})" for key, value in here.items() if answer.versions.get(key) != value
    ]
    if other:
        findings.append(Finding(name, "fault", f"other versions: {', '.join(other)}", "install the same on all hosts"))
    if not answer.sees_file:
        message = f"does not see what this machine writes to {folder}"
        findings.append(Finding(name, "fault", message, "give an --output on a file system that all hosts share"))
    if 0 < answer.num_gpus < num_processes:
        message = f"{host.place}: {num_processes} ranks, but {answer.num_gpus} GPUs"
        findings.append(Finding(name, "fault", message, "lower its slots, or --num-processes"))
    devices = f"{answer.num_gpus} GPUs of {answer.device_bytes / 1e9:.0f} GB" if answer.num_gpus else "no GPU"
    return findings or [Finding(name, "ok", f"reachable, same versions, shared folder, {devices}")]


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def find_versions() -> dict[str, str]:
    """What must be the same on every host, by name: hft and what computes."""
    return {"hft": __version__, **{name: find_version(name) or "missing" for name in ALIKE}}


def main() -> None:
    """Say as one line of JSON what this host is, for the doctor that asks over ssh whether it sees a file."""
    found = HostReport(
        versions=find_versions(),
        num_gpus=count_gpus(),
        device_bytes=measure_device_bytes(),
        sees_file=Path(sys.argv[1]).exists(),
    )
    print(json.dumps(found.model_dump()))


if __name__ == "__main__":
    main()
