"""Step h: which attention over packed rows, which loss and which AdamW is fastest, at an equal loss.

Attention: rows of several documents, kept apart by a dense mask (what there is), by FlexAttention's block mask, by torch's
attention over rows of several lengths, and by flash-attn where it is installed. Loss: TRL's chunked, the plain logits, Liger's.
"""

import statistics
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flash_attention_mask, flex_attention_mask
from transformers.utils import is_flash_attn_2_available

from gpu.plans import make_setting
from gpu.record import Recorder
from gpu.shapes import DEVICE, Timer, autocast, clear_memory, make_model, make_rows, prepared, write_config
from hftcli.freezing.activations import Workload
from hftcli.training.probe import compute_loss, make_inputs

LOSS_TOLERANCE = 2e-2  # nats, between kernels in bfloat16 on random weights


def run(recorder: Recorder) -> None:
    shape = "tiny" if recorder.rehearse else "1B"
    folder = write_config(shape, recorder.room)
    work = Workload(4, 32, packed=True, arithmetic="autocast") if recorder.rehearse else Workload(
        8, 1024, packed=True, arithmetic="autocast"
    )  # fmt: skip
    torch.manual_seed(0)
    model = make_model(folder, torch.bfloat16)
    inputs = make_inputs(model.config.vocab_size, work, DEVICE)
    setting = make_setting(shape, "half", work)
    expected: dict[str, float] = {}  # of the first of a kind

    def time_way(name: str, body: Callable[[], torch.Tensor]) -> None:
        with recorder.measuring(name), prepared(model, setting):
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            loss, first, forward, backward = time_passes(model, body, recorder.rehearse)
            kind, _, _ = name.partition(":")
            gap = abs(loss - expected.setdefault(kind, loss)) + (1.0 if recorder.fault and kind == "loss" else 0.0)
            peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
            recorder.add(name, gap <= LOSS_TOLERANCE, forward_s=forward, backward_s=backward, both_s=forward + backward,
                         first_s=first, peak_gb=peak, loss=loss, gap=gap)  # fmt: skip

    def pass_packed() -> torch.Tensor:
        with autocast(work):
            return compute_loss(model, inputs)

    compare_losses(recorder, time_way, model, work)
    compare_optimizers(recorder)
    AttentionInterface.register("torch_varlen", attend_varlen)
    AttentionMaskInterface.register("torch_varlen", flash_attention_mask)
    AttentionInterface.register("torch_flex", attend_flex)
    AttentionMaskInterface.register("torch_flex", flex_attention_mask)
    for attention in list_attention():  # the last one compiles first
        model.set_attn_implementation(attention)
        time_way(f"attention: {attention}, {work.num_sequences} packed rows of {work.length}", pass_packed)


def list_attention() -> list[str]:
    if DEVICE.type != "cuda":
        return ["sdpa"]
    return ["sdpa", "torch_varlen", *(["flash_attention_2"] if is_flash_attn_2_available() else []), "torch_flex"]


def attend_varlen(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    scaling: float | None = None, position_ids: torch.Tensor | None = None, **kwargs: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention within each document of a packed row, whose positions begin anew at 0; heads (1, H, T, D)."""
    from torch.nn.attention.varlen import varlen_attn

    starts = (position_ids.flatten() == 0).nonzero().flatten().int()
    ends = torch.cat([starts, starts.new_tensor([query.shape[2]])])
    longest = int((ends[1:] - ends[:-1]).max())
    laid = [heads[0].transpose(0, 1) for heads in (query, key, value)]
    if laid[0].dtype == torch.float32 and DEVICE.type == "cuda":
        laid = [heads.to(torch.bfloat16) for heads in laid]
    if laid[1].shape[1] != laid[0].shape[1]:
        laid[1:] = [heads.repeat_interleave(laid[0].shape[1] // heads.shape[1], dim=1) for heads in laid[1:]]
    found = varlen_attn(
        *(heads.contiguous() for heads in laid), ends, ends, longest, longest, scale=scaling, window_size=(-1, 0)
    )
    return found[None], None


def attend_flex(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlexAttention as transformers calls it, on heads of one data type: under autocast, rotated ones come in float32."""
    heads = [part.to(torch.bfloat16) for part in (query, key, value)]
    return flex_attention_forward(module, *heads, mask, **kwargs)


def time_passes(model: PreTrainedModel, body: Callable[[], torch.Tensor], rehearse: bool) -> tuple[float, float, float, float]:
    """The loss, the seconds of the first pass, which may compile, and medians of forward and backward."""
    forward, backward, first, loss = [], [], 0.0, None
    for index in range(2 if rehearse else 7):
        timer = Timer()
        loss = body()
        timer.mark()
        loss.backward()
        timer.mark()
        model.zero_grad(set_to_none=True)
        seconds = timer.read_seconds()
        if index == 0:
            first = sum(seconds)
        elif index > 1 or rehearse:
            forward.append(seconds[0])
            backward.append(seconds[1])
    return loss.item(), first, statistics.median(forward), statistics.median(backward)


def compare_losses(
    recorder: Recorder, time_way: Callable[[str, Callable[[], torch.Tensor]], None], model: PreTrainedModel, work: Workload
) -> None:
    """The whole model with each loss, on rows without a mask."""
    from hftcli.training.loss import SFT_OUTPUTS, keep_logits

    rows = make_rows(model.config.vocab_size, work.num_sequences // 2, work.length)

    def pass_rows() -> torch.Tensor:
        with autocast(work):
            return compute_loss(model, rows)

    def pass_liger() -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        with autocast(work):
            hidden = model.model(input_ids=rows["input_ids"], use_cache=False).last_hidden_state[:, :-1]
            weight = model.lm_head.weight
            flat = hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16)
            return LigerFusedLinearCrossEntropyLoss()(weight.to(torch.bfloat16), flat, rows["labels"][:, 1:].reshape(-1))

    chunked = model.forward
    time_way("loss: chunked (TRL)", pass_rows)
    keep_logits(model, SFT_OUTPUTS)
    time_way("loss: plain", pass_rows)
    model.forward = chunked
    if DEVICE.type == "cuda":
        time_way("loss: Liger's fused linear cross-entropy", pass_liger)


def compare_optimizers(recorder: Recorder) -> None:
    """AdamW over a model's worth of float32 weights: fused, and for each."""
    num_weights, num_tensors = (2**12, 4) if recorder.rehearse else (2**24, 32)
    for name, options in {"fused": {"fused": True}, "foreach": {"foreach": True}}.items():
        with recorder.measuring(f"AdamW: {name}"):
            weights = [torch.nn.Parameter(torch.randn(num_weights, device=DEVICE)) for _ in range(num_tensors)]
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer = torch.optim.AdamW(weights, lr=1e-6, **options)
            seconds = []
            for _ in range(5):
                timer = Timer()
                optimizer.step()
                timer.mark()
                seconds.append(timer.read_seconds()[0])
            total = num_weights * num_tensors
            recorder.add(f"AdamW: {name}", None, step_s=statistics.median(seconds[1:]), weights=total,
                         weights_per_s=total / statistics.median(seconds[1:]))  # fmt: skip
        clear_memory()
