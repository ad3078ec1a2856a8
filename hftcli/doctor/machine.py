"""What torch and DeepSpeed see of this machine, for `hft doctor`."""

import os
from contextlib import redirect_stdout

import torch

from hftcli.doctor.doctor import Probe
from hftcli.launching.packages import is_installed
from hftcli.models.device import has_mac_gpu, is_faster_in_bfloat16


def probe_machine() -> Probe:
    """Ask torch for its devices, and DeepSpeed which of its operations it could build here; nothing is built."""
    has_gpu = torch.cuda.is_available()
    return Probe(
        cuda=torch.version.cuda,
        num_devices=torch.cuda.device_count() if has_gpu else 0,
        is_faster_in_bfloat16=is_faster_in_bfloat16(),
        ops=probe_ops(),
        has_mac_gpu=not has_gpu and has_mac_gpu(),
    )


def probe_ops() -> dict[str, bool]:
    """By name, whether DeepSpeed could build the operation here; nothing where there is no DeepSpeed."""
    if not is_installed("deepspeed"):
        return {}
    # DeepSpeed prints about the compiler while it looks.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        from deepspeed.ops.op_builder.all_ops import ALL_OPS
        from deepspeed.ops.op_builder.builder import probe_is_compatible

        return {name: bool(probe_is_compatible(builder, False)) for name, builder in ALL_OPS.items()}
