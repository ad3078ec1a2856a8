"""A model from a checkpoint to a checkpoint: load, freeze, gather, save."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from hftcli.errors import ModelError
from hftcli.freezing.selection import FreezePlan
from hftcli.models.configs import Configs
from hftcli.models.deltas import open_stack, write_delta
from hftcli.models.description import describe_model, get_first_line
from hftcli.models.layout import Layout
from hftcli.models.part import LaidLinear
from hftcli.models.proof import find_changed_rows, has_same_bits
from hftcli.models.reader import CheckpointReader, Start, convert, list_forms
from hftcli.models.tensors import StoredTensor, list_tensors, write_shards
from hftcli.recipe.sections import ModelSection

Tensors = dict[str, torch.Tensor]

# Mixtures whose config has a weight for the router's loss, and of which transformers computes none: TRL would ask for it.
WITHOUT_ROUTER_LOSS = ("llama4_text",)
MOST_ROWS = 0.9  # of a tensor's rows; where more of them changed, a delta stores it whole


def load_model(section: ModelSection, folder: Path, plan: FreezePlan, mixed: bool, sharded: bool) -> PreTrainedModel:
    """Load the start and freeze what the plan freezes, before any optimizer can exist.

    All that has float32 masters beside the start begins from them, be it that it trains in this round or that it did in one
    before. What is frozen is held so that its bits survive: in bfloat16 where it is stored so, else in float32; vectors with
    masters in float32, in which they are multiplied, while matrices are rounded for that anyway. DeepSpeed in bfloat16 alone
    holds all in bfloat16; what trains gets its exact masters by `restore_masters`, and what is frozen is saved from the start's
    files.

    Args:
        mixed: compute in bfloat16.
        sharded: DeepSpeed holds the model and makes the float32 masters itself.

    Raises:
        ModelError: the start's data types cannot be trained from, or its weights are not the rounding of its masters.
    """
    start = Start(section, folder, (*plan.trained, *plan.frozen))
    if mixed and sharded and start.dtype == torch.float16:
        raise ModelError(
            "model.dtype is float16, and DeepSpeed in bfloat16 would round the start a second time",
            "set model.dtype: bfloat16 or null, or train.bf16: false",
        )
    held_dtype = torch.bfloat16 if mixed and sharded else torch.float32
    model = load_weights(folder, held_dtype, section.attn_implementation)
    if model.config.model_type in WITHOUT_ROUTER_LOSS:
        model.config.router_aux_loss_coef = 0.0
    freeze_model(model, plan)
    if start.dtype not in (None, held_dtype):
        for parameter in model.parameters():
            values = parameter.ds_tensor if is_partitioned(parameter) else parameter
            values.data = values.data.to(start.dtype).to(held_dtype)
    for name in start.masters:
        if held_dtype == torch.float32 or start.get_dtype(name) != held_dtype:
            lay_in(model.get_parameter(name), check_master(start, name))
    if mixed and not sharded:
        halve_frozen(model, start.held.wide)
    head = model.get_output_embeddings().weight
    if is_partitioned(head):
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter

        # TRL's loss reads the head's weight outside of the head's own forward pass, where ZeRO 3 would not gather it.
        register_external_parameter(model, head)
    return model


def restore_masters(model: PreTrainedModel, section: ModelSection, folder: Path, plan: FreezePlan) -> None:
    """Give what trains the start's own values as its float32 masters: DeepSpeed in bfloat16 made them of rounded ones.

    All ranks must call this together, once DeepSpeed holds the model and before the first step.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    start = Start(section, folder, plan.trained)
    for name, layer in model.named_modules():
        if isinstance(layer, LaidLinear):
            weight_OI = start.read_master(f"{name}.weight").float().to(layer.part.device)
            safe_set_full_fp32_param(layer.part, layer.extract(weight_OI))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name not in start.layout.places:
            continue
        if name in start.masters:
            safe_set_full_fp32_param(parameter, check_master(start, name).to(parameter.device))
        elif start.get_dtype(name) != torch.bfloat16:
            safe_set_full_fp32_param(parameter, start.read(name).float().to(parameter.device))


def check_master(start: Start, name: str) -> torch.Tensor:
    """A float32 master that lies beside a start.

    Raises:
        ModelError: the start's files do not hold its rounding.
    """
    master = start.read_master(name)
    if not has_same_bits(start.round(name, master), start.read(name)):
        raise ModelError(
            f"{start.folder} holds other values of {name} than its float32 masters round to",
            "restore both, or move masters.safetensors away to begin from the checkpoint's own weights",
        )
    return master


@contextmanager
def holding_file(model: torch.nn.Module, folder: Path, masters: Mapping[str, StoredTensor]) -> Iterator[None]:
    """The model as a checkpoint's files hold it; afterwards its masters are back. All ranks together.

    Args:
        masters: those of the checkpoint. All else the model holds as the files do, or has rounded for its arithmetic.
    """
    reader = CheckpointReader(folder, tuple(masters)) if masters else None
    try:
        for name in masters:
            assert reader is not None
            lay_in(find_parameter(model, name), reader.read(name))
        yield
    finally:
        for name, master in masters.items():
            lay_in(find_parameter(model, name), master.read())


@contextmanager
def holding_rounding(model: torch.nn.Module, start: Start) -> Iterator[None]:
    """The model as its files would hold it if it were saved now; afterwards its weights are back. All ranks together.

    Args:
        start: what the round began from, in whose data types it is saved.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, parameter in model.named_parameters():
            name = name.replace(".base_layer.", ".")  # below PEFT's adapters
            if name not in start.layout.places or not (parameter.requires_grad or name in start.masters):
                continue
            for held in list_held(parameter):
                if start.is_rounded(name) and held.dtype != start.get_dtype(name):
                    kept.append((held, held.detach().to("cpu", copy=True)))
                    is_whole = held is parameter
                    held.data.copy_(start.round(name, held.detach()) if is_whole else held.detach().to(start.get_dtype(name)))
        yield
    finally:
        for held, values in kept:
            held.data.copy_(values)


def find_parameter(model: torch.nn.Module, name: str) -> torch.nn.Parameter:
    """A parameter by its name in the model, be it below one of PEFT's adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    place, _, leaf = name.rpartition(".")
    module = model.get_submodule(place)
    return (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).get_parameter(leaf)


def load_finished(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model to be asked, not trained.

    Raises:
        ModelError: its files are damaged, are of another form than its config says, or lack parameters.
    """
    names = tuple(parameter.name for parameter in describe_model(str(folder)).parameters)
    try:
        root = open_stack(folder).root
        Layout(root, list_tensors(root)).require(names)
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
    reader = CheckpointReader(folder, tuple(name for name, _ in model.named_parameters()))
    for name in filter(reader.is_changed, reader.layout.places):
        lay_in(model.get_parameter(name), reader.read(name))
    return model


def lay_in(parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Give a parameter other values, in the data type in which it is held. All ranks together."""
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


def halve_frozen(model: PreTrainedModel, wide: Collection[str] = ()) -> None:
    """Hold in bfloat16 what is frozen: it needs no float32 master.

    Args:
        wide: parameters that bfloat16 would round.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name not in wide:
            parameter.data = parameter.data.to(torch.bfloat16)


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO 3 holds the parameter in pieces, one on each rank."""
    return hasattr(parameter, "ds_tensor")


def list_held(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """What a process holds of a parameter: under ZeRO 3 its piece, beside which DeepSpeed leaves small ones gathered."""
    if not is_partitioned(parameter):
        return [parameter]
    return [parameter.ds_tensor, *([parameter] if parameter.numel() else [])]


@dataclass(frozen=True)
class Outcome:
    """What the weights are when a round ends; on rank 0 alone.

    Attributes:
        masters: what trained, whole, in float32, on the CPU.
        moved: frozen parameters that the model does not hold any more as the start has them.
    """

    masters: dict[str, torch.Tensor]
    moved: tuple[str, ...]


def gather_outcome(
    model: PreTrainedModel,
    start: Start,
    plan: FreezePlan,
    sharded: bool,
    is_first: bool,
    on_host: Mapping[torch.nn.Parameter, torch.nn.Parameter],
    merged: Mapping[str, torch.Tensor],
) -> Outcome:
    """Walk through a model when its round ends; all ranks together.

    What is frozen is compared with the start in the data type in which the model holds it.

    Args:
        on_host: masters in host memory.
        merged: float32 values of what methods merged, by name, where the model holds them rounded.
    """
    masters, moved, trained, frozen = {}, [], set(plan.trained), set(plan.frozen)
    for name, parameter in model.named_parameters():
        if name not in trained and name not in frozen:
            continue  # what a method added, merged by now
        values = read_master(on_host.get(parameter, parameter), sharded).detach()
        if not is_first:
            continue
        if name in trained:
            masters[name] = merged[name] if name in merged else values.to("cpu", torch.float32, copy=True)
        elif not has_same_bits(values.cpu(), convert(start.read_master(name), values.dtype)):
            moved.append(name)
    return Outcome(masters, tuple(moved))


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


def gather_masters(model: torch.nn.Module, sharded: bool, is_first: bool, on_host: Mapping[Any, Any]) -> Tensors:
    """What trains, whole, in float32, on the CPU; all ranks together, and only rank 0 gets it.

    Args:
        on_host: masters in host memory, by parameter.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = read_master(on_host.get(parameter, parameter), sharded).detach()
            if is_first:
                found[name] = values.to("cpu", torch.float32, copy=True)
    return found


@torch.no_grad()
def lay_in_masters(model: torch.nn.Module, masters: Tensors, sharded: bool, on_host: Mapping[Any, Any]) -> None:
    """Give what trains the values that `gather_masters` took; all ranks together.

    Args:
        masters: as rank 0 got them; of the other ranks nothing is asked.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not sharded:
            if parameter in on_host:
                on_host[parameter].copy_(masters[name])
            parameter.copy_(masters[name])
            continue
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        shape = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
        values = masters[name] if name in masters else torch.empty(shape)
        values = values.to(parameter.device)
        torch.distributed.broadcast(values, src=0)
        safe_set_full_fp32_param(parameter, values)
        with GatheredParameters([parameter], modifier_rank=0, enabled=is_partitioned(parameter)):
            parameter.data.copy_(values)


def save_checkpoint(configs: Configs, masters: dict[str, torch.Tensor], folder: Path, start: Start) -> None:
    """Write a plain Hugging Face folder, whole or not at all.

    The weights are the tensors of the start's files, under their names and in their data types: those of `masters` rounded
    once, all others byte by byte as they stand there.
    """
    layout = start.layout

    def list_groups() -> Iterator[dict[str, np.ndarray]]:
        for name in layout.places:
            yield start.cast_tensors(name, masters[name]) if name in masters else start.read_tensors(name)
        for place in layout.extras:
            yield {place: start.reader.read_extra(place)}

    with _replace_folder(folder) as temporary:
        configs.write(temporary)
        write_shards(temporary, list_forms(start.reader, start.dtypes), list_groups(), layout.num_parameters)


def save_delta(configs: Configs, masters: dict[str, torch.Tensor], folder: Path, start: Start, plan: FreezePlan) -> None:
    """Write what `save_checkpoint` would, less the parameters, and rows of matrices, whose bits are found to be the start's."""
    stored, rows = {}, {}
    for name, master in masters.items():
        values = start.round(name, master)
        changed_R = find_changed_rows(values, start.reader.read(name))
        if len(changed_R) > MOST_ROWS * len(values):
            stored[name] = values
        elif len(changed_R):
            stored[name], rows[name] = values[changed_R], changed_R.int()
    with _replace_folder(folder) as temporary:
        configs.write(temporary)
        write_delta(stored, rows, temporary, start.folder, plan, start.dtype)


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of the one of that name."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
