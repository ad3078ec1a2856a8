"""Models of known shapes with random weights, made where they compute, and one model frozen now so, now otherwise.

Shapes: B, sequences; T, tokens of a sequence.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gpu.plans import LORA, SHAPES, Setting
from hftcli.freezing.activations import Workload
from hftcli.models.checkpoint import freeze_model
from hftcli.training.loss import set_loss_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_config(shape: str, folder: Path) -> Path:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, is_tied = SHAPES[shape]
    LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=is_tied, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_model(folder: Path, dtype: torch.dtype, attention: str | None = None, loss: str = "chunked") -> PreTrainedModel:
    """A model of a config, its random weights drawn on the device, with hft's loss kernel."""
    config = LlamaConfig.from_pretrained(folder)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    set_loss_kernel(model, loss)
    return model.train()


@contextmanager
def prepared(model: PreTrainedModel, setting: Setting) -> Iterator[list[torch.nn.Parameter]]:
    """The model frozen and held as hft holds it for a setting; gives what trains, and leaves nothing behind."""
    work = setting.work
    tuner = None
    if setting.is_lora:
        tuner = LoraModel(model, LoraConfig(r=LORA.rank, target_modules="all-linear"), "default")
    else:
        freeze_model(model, setting.budget.plan)
    for parameter in model.parameters():
        is_exact = work.arithmetic == "float32" or (work.arithmetic == "autocast" and parameter.requires_grad)
        parameter.data = parameter.data.to(torch.float32 if is_exact else torch.bfloat16)
        parameter.grad = None
    model.activation_checkpointing_disable()
    if work.checkpoint_every is not None:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=work.checkpoint_every)
        model.disable_input_require_grads()
    clear_memory()
    try:
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        model.zero_grad(set_to_none=True)
        model.activation_checkpointing_disable()
        if tuner is not None:
            tuner.unload()
        clear_memory()


def autocast(work: Workload) -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=work.arithmetic == "autocast")


def clear_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def read_total_bytes() -> int:
    """Of the GPU; of a rehearsal, a card's that there could be."""
    return torch.cuda.get_device_properties(DEVICE).total_memory if DEVICE.type == "cuda" else 80 * 2**30


def make_rows(vocabulary: int, num_sequences: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens in sequences of full length: no padding, so no mask."""
    rows_BT = torch.randint(3, vocabulary, (num_sequences, length), device=DEVICE)
    return {"input_ids": rows_BT, "labels": rows_BT}


class Timer:
    """Seconds between marks: of the GPU by its own events, of a CPU by the clock."""

    def __init__(self) -> None:
        self.marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        if DEVICE.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read_seconds(self) -> list[float]:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            return [first.elapsed_time(second) / 1000 for first, second in zip(self.marks, self.marks[1:], strict=False)]
        return [second - first for first, second in zip(self.marks, self.marks[1:], strict=False)]
