"""Packages that a setting needs besides those that every run needs; they are looked for without being imported."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

from hftcli.errors import InputError
from hftcli.recipe.sections import LaunchSection, TrainSection
from hftcli.recipe.trainer_keys import OPTIMIZERS, TRACKERS


def check_packages(train: TrainSection, launch: LaunchSection) -> None:
    """Raises: InputError: an optimizer, a tracker or the launch needs a package that is not here."""
    optimizer = train.extra.get("optim")
    needed = {f"train.optim {optimizer}": OPTIMIZERS.get(optimizer or "")}
    needed |= {f"train.report_to {tracker}": TRACKERS[tracker] for tracker in list_trackers(train)}
    for setting, package in needed.items():
        if package and not is_installed(package):
            raise InputError(f"{setting} needs {package}, which is not installed", f"pip install {package}, or take another")
    if launch.num_ranks > 1 and not is_installed("deepspeed"):
        raise InputError(
            f"{launch.num_ranks} processes share their work through DeepSpeed, which is not installed",
            "pip install 'deepspeed>=0.19.3,<0.20' on Linux, or run one process, which needs none: launch.num_processes: 1",
        )


def list_trackers(train: TrainSection) -> list[str]:
    """The trackers that are told of a run."""
    named = train.extra.get("report_to", "none")
    return [tracker for tracker in ([named] if isinstance(named, str) else named) if tracker != "none"]


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return _is_package(importlib.util.find_spec(package))


def _is_package(spec: ModuleSpec | None) -> bool:
    """Not a plain folder of the user's that has the name of a package, as trackers make one to write into."""
    if spec is None or spec.origin is not None:
        return spec is not None
    return any(Path(place).parent != Path.cwd() for place in spec.submodule_search_locations or ())
