"""What this machine computes in, and how it keeps memory."""

import ctypes
import platform

import torch

from hftcli.runs.spec import RoundSpec

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def has_bfloat16() -> bool:
    """Whether this machine multiplies in bfloat16: its GPU, or without one its processor. Elsewhere it would be slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return found.get("avx512_bf16", False) or found.get("amx_bf16", False)


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
    return spec.train.bf16 and has_bfloat16()


def is_offloaded(spec: RoundSpec) -> bool:
    """Whether hft itself keeps what trains in host memory; DeepSpeed does it by its own means."""
    return spec.launch.offload == "optimizer" and not is_sharded(spec)


def is_sharded(spec: RoundSpec) -> bool:
    """Whether DeepSpeed holds the model."""
    return spec.launch.num_ranks > 1
