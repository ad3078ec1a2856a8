"""What this machine computes in, and how it keeps memory."""

import ctypes
import os
import platform

import torch

from hftcli.runs.records import Precision
from hftcli.runs.spec import RoundSpec

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def has_mac_gpu() -> bool:
    """Whether there is a Mac's GPU, which torch calls MPS, and CUDA_VISIBLE_DEVICES is not empty, which hides every GPU."""
    return torch.backends.mps.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")


def find_device(num_ranks: int | None = None, rank: int | None = None) -> torch.device:
    """Where this process computes: on a GPU of its own, or on the processor. A Mac's GPU serves one process alone.

    Args:
        num_ranks: processes that compute together; None reads what the launcher says, and so does `rank`.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1")) if num_ranks is None else num_ranks
    if torch.cuda.is_available():
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0') if rank is None else rank}")
    return torch.device("mps" if num_ranks == 1 and has_mac_gpu() else "cpu")


def name_device(device: torch.device) -> str:
    """What the device is called; of a processor, no more than its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} (MPS)"
    return platform.processor() or platform.machine()


def find_exact_device(device: torch.device) -> torch.device:
    """Where the float64 of a device's tensors is computed: there, or on the processor, since a Mac's GPU has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def make_exact(values: torch.Tensor) -> torch.Tensor:
    """Values in float64, on the device that computes in it."""
    return values.to(find_exact_device(values.device)).double()


def count_batch_tokens(device: torch.device) -> int:
    """Padded tokens in a forward pass that keeps nothing: many fill a GPU, few stay in a processor's cache."""
    return 512 if device.type == "cpu" else 8192


def is_faster_in_bfloat16() -> bool:
    """Whether this machine multiplies faster in bfloat16: its NVIDIA GPU, or else its processor's matrix units (AMX).

    AVX-512 alone multiplies no faster so, and converts besides: a round took 1.5 times as long as in float32. On a Mac's GPU it
    was never tried.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def keep_freed_memory() -> None:
    """Where a CPU computes, keep the memory of a step for the next one.

    glibc gives large tensors back to the kernel as soon as they are freed, and gets them again page by page, zeroed: a quarter
    of a step's time. It is told so through mallopt(3); a GPU's memory is held by torch, and other C libraries are left alone.
    """
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2**20)):
        libc.mallopt(option, value)


def is_mixed(spec: RoundSpec) -> bool:
    """Whether this process computes in bfloat16."""
    asked = spec.train.bf16
    return takes_bfloat16(None if asked and spec.version < 3 else asked)  # there, true is what null is now


def takes_bfloat16(asked: bool | None) -> bool:
    """Whether this machine computes in bfloat16 under `train.bf16`."""
    return is_faster_in_bfloat16() if asked is None else asked


def name_precision(spec: RoundSpec) -> Precision:
    """What this process computes in."""
    return "bfloat16" if is_mixed(spec) else "float32"


def is_offloaded(spec: RoundSpec) -> bool:
    """Whether hft itself keeps what trains in host memory; DeepSpeed does it by its own means."""
    return spec.launch.offload == "optimizer" and not is_sharded(spec)


def is_sharded(spec: RoundSpec) -> bool:
    """Whether DeepSpeed holds the model."""
    return spec.launch.num_ranks > 1
