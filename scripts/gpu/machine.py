"""Step a: `hft doctor`, and by use: bfloat16, attention and loss kernels, fused AdamW, the rates that set the floors."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu.record import Recorder
from gpu.shapes import DEVICE, Timer, make_model, make_rows, write_config
from hftcli.doctor.machine import probe_ops
from hftcli.training.probe import compute_loss

PACKAGES = (
    "torch", "triton", "transformers", "trl", "accelerate", "datasets", "deepspeed", "peft", "liger-kernel", "flash-attn",
    "bitsandbytes", "kernels", "numpy", "pyarrow", "pydantic", "huggingface-hub",
)  # fmt: skip


def run(recorder: Recorder) -> None:
    with recorder.measuring("versions"):
        recorder.add("versions", True, python=platform.python_version(), **{name: find_version(name) for name in PACKAGES})
    with recorder.measuring("device"):
        recorder.add("device", True, **describe_device())
    with recorder.measuring("hft doctor"):
        ask_doctor(recorder)
    with recorder.measuring("DeepSpeed's ops"):
        ops = probe_ops()
        recorder.add("DeepSpeed's ops", None, nvcc=shutil.which("nvcc") or "none", cuda_home=os.environ.get("CUDA_HOME", ""),
                     can_build=" ".join(name for name, is_able in ops.items() if is_able))  # fmt: skip
    with recorder.measuring("fused AdamW"):
        for device in dict.fromkeys((DEVICE, torch.device("cpu"))):
            check_fused_adamw(recorder, device)
    with recorder.measuring("rates"):
        measure_rates(recorder)
    for name, check in ATTENTION.items():
        with recorder.measuring(f"attention: {name}"):
            error = check(recorder.rehearse)
            recorder.add(f"attention: {name}", error < 0.02, error=error)
    with recorder.measuring("loss: chunked and plain"):
        check_losses(recorder)


def find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def describe_device() -> dict[str, object]:
    found: dict[str, object] = {
        "cores": len(os.sched_getaffinity(0)),
        "host_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
    }
    if DEVICE.type != "cuda":
        return {"device": "CPU", **found}
    seen = torch.cuda.get_device_properties(DEVICE)
    asked = "--query-gpu=driver_version,memory.total,memory.used,power.limit,clocks.max.sm"
    driver = subprocess.run(
        ["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": seen.name,
        "capability": f"{seen.major}.{seen.minor}",
        "gib": round(seen.total_memory / 2**30, 2),
        "multiprocessors": seen.multi_processor_count,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": torch.backends.cudnn.version(),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "nvidia_smi": driver,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "packages_there": " ".join(name for name in ("flash_attn", "liger_kernel", "triton") if importlib.util.find_spec(name)),
        **found,
    }


def ask_doctor(recorder: Recorder) -> None:
    """With its planted fault, for a launch that cannot be."""
    command = [sys.executable, "-m", "hftcli", "doctor", "--json"]
    if recorder.fault:
        command += ["--set", "launch.hostfile=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    findings = json.loads(done.stdout) if done.stdout.strip().startswith(("[", "{")) else done.stdout[-500:]
    words = findings if isinstance(findings, str) else "; ".join(f"{item['status']} {item['message']}" for item in findings)
    recorder.add("hft doctor", done.returncode == 0, code=done.returncode, found=words[:1500], stderr=done.stderr[-300:])


def check_fused_adamw(recorder: Recorder, device: torch.device) -> None:
    """One step of the fused AdamW against the plain one, and how many weights it updates in a second."""
    num_weights = 2**20 if recorder.rehearse else 2**27
    steps = {}
    for is_fused in (True, False):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(2**16, device=device))
        weight.grad = torch.randn(2**16, device=device)
        torch.optim.AdamW([weight], lr=1e-3, fused=is_fused, foreach=False).step()
        steps[is_fused] = weight.detach()
    error = (steps[True] - steps[False]).abs().max().item()
    weight = torch.nn.Parameter(torch.zeros(num_weights, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    seconds = []
    for _ in range(4):
        wait(device)
        started = time.perf_counter()
        optimizer.step()
        wait(device)
        seconds.append(time.perf_counter() - started)
    recorder.add(f"fused AdamW on {device.type}", error < 2e-6, error=error, weights_per_s=num_weights / min(seconds[1:]))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_rates(recorder: Recorder) -> None:
    """A large product, a copy on the device, and copies between host and device: the ceilings."""
    size = 256 if recorder.rehearse else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds = time_repeats(lambda: left @ right)
    recorder.add("bf16 matrix product", None, tflops=2 * size**3 / seconds / 1e12)
    source = torch.empty(2**20 if recorder.rehearse else 2**32, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    recorder.add("copy on the device", None, gb_per_s=2 * source.nbytes / time_repeats(lambda: target.copy_(source)) / 1e9)
    if DEVICE.type == "cuda":
        part = source[: 2**30]
        host = torch.empty(part.nbytes, dtype=torch.uint8, pin_memory=True)
        down = time_repeats(lambda: host.copy_(part, non_blocking=True))
        up = time_repeats(lambda: part.copy_(host, non_blocking=True))
        recorder.add("host and device", None, down_gb_per_s=part.nbytes / down / 1e9, up_gb_per_s=part.nbytes / up / 1e9)


def time_repeats(body: object, num_repeats: int = 7) -> float:
    """Median seconds, after two that warm up."""
    seconds = []
    for _ in range(num_repeats + 2):
        timer = Timer()
        body()
        timer.mark()
        seconds.append(timer.read_seconds()[0])
    return sorted(seconds[2:])[num_repeats // 2]


def make_heads(rehearse: bool) -> tuple[torch.Tensor, ...]:
    """Query, key and value (B, H, T, D), in bfloat16, each with a gradient."""
    torch.manual_seed(0)
    length = 64 if rehearse else 512
    return tuple(torch.randn(1, 8, length, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))


def compare_attention(found: torch.Tensor, heads: tuple[torch.Tensor, ...]) -> float:
    """The largest difference of output and gradients from causal attention computed in float32, relative."""
    grads = torch.autograd.grad(found.float().square().sum(), heads)
    exact = [head.detach().float().requires_grad_() for head in heads]
    scores = exact[0] @ exact[1].transpose(-1, -2) * exact[0].shape[-1] ** -0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=DEVICE).tril()
    expected = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ exact[2]
    expected_grads = torch.autograd.grad(expected.square().sum(), exact)
    pairs = [(found, expected), *zip(grads, expected_grads, strict=True)]
    return max(((got.float() - want).norm() / want.norm()).item() for got, want in pairs)


def try_sdpa(rehearse: bool) -> float:
    heads = make_heads(rehearse)
    return compare_attention(torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True), heads)


def try_sdpa_flash(rehearse: bool) -> float:
    heads = make_heads(rehearse)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return compare_attention(torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True), heads)


def try_sdpa_masked(rehearse: bool) -> float:
    heads = make_heads(rehearse)
    length = heads[0].shape[-2]
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
    return compare_attention(torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask), heads)


def try_varlen(rehearse: bool) -> float:
    """Torch's own attention over rows of several lengths; a CPU has none."""
    if DEVICE.type != "cuda":
        return 0.0
    from torch.nn.attention.varlen import varlen_attn

    heads = make_heads(rehearse)
    length = heads[0].shape[-2]
    starts = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    laid = [head[0].transpose(0, 1).contiguous() for head in heads]
    found = varlen_attn(*laid, starts, starts, length, length, window_size=(-1, 0))
    return compare_attention(found.transpose(0, 1)[None], heads)


ATTENTION = {
    "sdpa, causal": try_sdpa,
    "sdpa, flash alone": try_sdpa_flash,
    "sdpa, with a mask": try_sdpa_masked,
    "torch's varlen": try_varlen,
}


def check_losses(recorder: Recorder) -> None:
    """TRL's chunked kernel against the plain logits: loss and gradient of the head, in bfloat16."""
    folder = write_config("tiny", recorder.room)
    found = {}
    for kernel in ("plain", "chunked"):
        torch.manual_seed(0)
        model = make_model(folder, torch.float32, loss=kernel)
        torch.manual_seed(1)
        inputs = make_rows(model.config.vocab_size, 2, 64)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = compute_loss(model, inputs)
        loss.backward()
        found[kernel] = (loss.item(), model.get_input_embeddings().weight.grad.norm().item())
    gap = abs(found["plain"][0] - found["chunked"][0])
    recorder.add("loss: chunked and plain", gap < 1e-2, plain=found["plain"][0], chunked=found["chunked"][0],
                 gradient_ratio=found["chunked"][1] / found["plain"][1])  # fmt: skip
