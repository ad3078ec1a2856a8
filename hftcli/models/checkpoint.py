"""A model from a checkpoint to a checkpoint: load, freeze, gather, save."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hftcli.errors import ModelError
from hftcli.freezing.selection import FreezePlan
from hftcli.models.deltas import Stack, open_stack, write_delta
from hftcli.models.description import SAFETENSORS_DTYPES, describe_model, get_first_line, read_header, read_start_dtype
from hftcli.models.proof import CheckpointReader, find_changed_rows
from hftcli.recipe.sections import ModelSection

MOST_ROWS = 0.9  # of a tensor's rows; where more of them changed, a delta stores it whole


def load_model(section: ModelSection, folder: Path, plan: FreezePlan, mixed: bool, sharded: bool) -> PreTrainedModel:
    """Load the start and freeze what the plan freezes, before any optimizer can exist.

    Args:
        mixed: compute in bfloat16: what is frozen is held in bfloat16 where it comes in it, what trains in float32.
        sharded: DeepSpeed holds the model and makes the float32 masters itself.

    Raises:
        ModelError: the frozen half would be rounded.
    """
    start_dtype = read_start_dtype(section, folder)
    keeps_bits = start_dtype == torch.bfloat16 or not plan.frozen
    if mixed and sharded and not keeps_bits:
        raise ModelError(
            f"{folder} has {str(start_dtype).removeprefix('torch.')} weights, and DeepSpeed in bfloat16 holds the frozen half "
            "in bfloat16, which would round it",
            "set model.dtype: bfloat16, which rounds the start once, before the round, or train.bf16: false",
        )
    held_dtype = torch.bfloat16 if mixed and sharded else torch.float32
    model = load_weights(folder, held_dtype, section.attn_implementation)
    model.config.dtype = start_dtype
    freeze_model(model, plan)
    for parameter in model.parameters():
        values = parameter.ds_tensor if is_partitioned(parameter) else parameter
        if start_dtype != held_dtype:
            values.data = values.data.to(start_dtype).to(held_dtype)
    if mixed and not sharded and keeps_bits:
        halve_frozen(model)
    head = model.get_output_embeddings().weight
    if is_partitioned(head):
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter

        # TRL's loss reads the head's weight outside of the head's own forward pass, where ZeRO 3 would not gather it.
        register_external_parameter(model, head)
    return model


def load_finished(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model to be asked, not trained.

    Raises:
        ModelError: its files are damaged, are of another form than its config says, or lack parameters.
    """
    names = tuple(parameter.name for parameter in describe_model(str(folder)).parameters)
    try:
        CheckpointReader(folder, names)  # transformers fills what is missing with random numbers
        model = load_weights(folder, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model does not load: {get_first_line(error)}") from None
    return model.to(device).eval().requires_grad_(False)


def load_weights(folder: Path, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model of a checkpoint, full or delta, as transformers loads the full one.

    What a delta changes is laid into the base's model tensor by tensor: no second model exists in memory.
    """
    stack = open_stack(folder)
    if not stack.deltas:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation)
    model = AutoModelForCausalLM.from_pretrained(
        stack.root, config=AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation=attn_implementation
    )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    names = _list_changed(stack, tuple(name for name, _ in model.named_parameters()))
    reader = CheckpointReader(folder, names)
    for name in names:
        _lay_in(model.get_parameter(name), reader.read(name))
    return model


def _list_changed(stack: Stack, names: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters that are not as at the root: those stored in a delta, or all where a delta rounds what is below it."""
    stored = {name for delta in stack.deltas for name in delta.record.tensors}
    dtypes = {entry["dtype"] for file in stack.root.glob("*.safetensors") for entry in read_header(file).values()}
    is_rounded = {SAFETENSORS_DTYPES.get(dtype) for dtype in dtypes} != {delta.record.dtype for delta in stack.deltas}
    return names if is_rounded else tuple(name for name in names if name in stored)


def _lay_in(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    if not is_partitioned(parameter):
        parameter.data.copy_(values)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(values)


def freeze_model(model: PreTrainedModel, plan: FreezePlan) -> None:
    """Set `requires_grad` on every parameter as the plan says.

    Raises:
        ModelError: the plan was made for a model with other parameters.
    """
    trained = set(plan.trained)
    names = {name for name, _ in model.named_parameters()}
    if names != trained | set(plan.frozen):
        odd = sorted(names ^ (trained | set(plan.frozen)))
        raise ModelError(f"the freeze plan is of another model: {len(odd)} parameters differ, the first is {odd[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def halve_frozen(model: PreTrainedModel) -> None:
    """Hold in bfloat16 what is frozen: it needs no float32 master."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO 3 holds the parameter in pieces, one on each rank."""
    return hasattr(parameter, "ds_tensor")


def gather_weights(
    model: PreTrainedModel, sharded: bool, masters: Mapping[torch.nn.Parameter, torch.nn.Parameter]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, whole, on the CPU: float32 masters where there are any. All ranks must walk through it together.

    Args:
        masters: those in host memory.
    """
    for name, parameter in model.named_parameters():
        yield name, read_master(masters.get(parameter, parameter), sharded).detach().to("cpu", copy=True)


def read_master(parameter: torch.nn.Parameter, sharded: bool) -> torch.Tensor:
    """A parameter, whole: its float32 master where there is one. All ranks must call this together."""
    if not sharded:
        return parameter
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and (master := safe_get_full_fp32_param(parameter)) is not None:
        return master.view(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)
    with GatheredParameters([parameter], enabled=is_partitioned(parameter)):
        return parameter.detach().clone()


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write a plain Hugging Face folder, whole or not at all."""
    with _replace_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)


def save_delta(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor],
    folder: Path,
    start: Path,
    plan: FreezePlan,
) -> None:
    """Write what `save_checkpoint` would, less the parameters, and rows of matrices, whose bits are found to be the start's.

    A frozen parameter that did move is stored like a trained one, so that `verify_checkpoint` finds it as in a full folder.

    Args:
        weights: every parameter, all of one data type.
        start: the checkpoint that the round started from.
    """
    reader = CheckpointReader(start, tuple(weights))
    dtype = next(iter(weights.values())).dtype
    stored, rows = {}, {}
    for name, values in weights.items():
        changed_R = find_changed_rows(values, reader.read(name))
        if len(changed_R) > MOST_ROWS * len(values):
            stored[name] = values
        elif len(changed_R):
            stored[name], rows[name] = values[changed_R], changed_R.int()
    with _replace_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict={})  # the configs as they are beside a full model, and no weights
        tokenizer.save_pretrained(temporary)
        write_delta(stored, rows, temporary, start, plan, dtype)


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of the one of that name."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
