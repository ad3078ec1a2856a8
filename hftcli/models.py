"""Checkpoints: describe, load, freeze, read back, save, and compare byte for byte."""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hftcli.deltas import ROWS_SUFFIX, Stack, hash_checkpoint, open_stack, write_delta
from hftcli.errors import ModelError
from hftcli.freezing.roles import Parameter
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe import ModelSection
from hftcli.run import Round, Verification, find_checkpoint_damage

MOST_ROWS = 0.9  # of a tensor's rows; where more of them changed, a delta stores it whole
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class ModelDescription:
    """What a config alone says about a model; no weights are read."""

    model_type: str
    parameters: tuple[Parameter, ...]
    max_positions: int | None
    num_layers: int
    num_heads: int


def make_start_key(folder: Path) -> str:
    """A hash of a checkpoint's weights and config; those of a round must be what the round wrote.

    Raises:
        ModelError: a file of it is damaged.
    """
    if damage := find_checkpoint_damage(folder):
        raise ModelError(f"{folder} is damaged: {'; '.join(damage)}", "restore it, or run its round again in a new folder")
    return hashlib.sha256(json.dumps(hash_checkpoint(folder), sort_keys=True).encode()).hexdigest()


def describe_model(path: str) -> ModelDescription:
    """Build the model of a folder, a config file or a hub id without memory, and list its parameters; tied ones count once.

    Raises:
        ModelError: there is no such model, or its config does not load.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: the model's config does not load: {_first_line(error)}") from None
    text_config = config.get_text_config()
    return ModelDescription(
        model_type=model.config.model_type,
        parameters=tuple(Parameter(name, tuple(value.shape)) for name, value in model.named_parameters()),
        max_positions=text_config.to_dict().get("max_position_embeddings"),
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
    )


def fetch_checkpoint(path: str) -> Path:
    """The local folder of a checkpoint, full or delta: the path itself, or the snapshot of a hub id.

    Raises:
        ModelError: no such model, no weights as safetensors, or a delta whose base is not the one that it was made on.
    """
    if Path(path).is_dir():
        folder = Path(path)
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"model.path {path}: no such folder, and the hub does not give it: {_first_line(error)}",
                "give a folder with a config.json, a finished run, or a hub id you have access to",
            ) from None
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no weights as safetensors", "convert them with transformers' save_pretrained")
    open_stack(folder)
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: ModelError: the folder has no tokenizer that transformers can load."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the tokenizer does not load: {_first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_start_dtype(section: ModelSection, folder: Path) -> torch.dtype:
    """The data type of the start: the recipe's, or that of the checkpoint's largest tensor."""
    if section.dtype is not None:
        return getattr(torch, section.dtype)
    header = read_header(min(folder.glob("*.safetensors")))
    largest = max(header.values(), key=lambda entry: entry["data_offsets"][1] - entry["data_offsets"][0])
    if largest["dtype"] not in SAFETENSORS_DTYPES:
        raise ModelError(f"{folder} stores {largest['dtype']} weights", "set model.dtype: bfloat16 or float32")
    return getattr(torch, SAFETENSORS_DTYPES[largest["dtype"]])


def read_header(file: Path) -> dict[str, dict]:
    """Names, dtypes, shapes and byte offsets of the tensors in a safetensors file, without reading them.

    Raises:
        ModelError: the file is not one, or is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (struct.error, ValueError, MemoryError):
        raise ModelError(f"{file} is damaged: its header does not read") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != expected:
        raise ModelError(f"{file} is damaged: it has {file.stat().st_size:,} bytes, and its header says {expected:,}")
    return header


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
        raise ModelError(f"{folder}: the model does not load: {_first_line(error)}") from None
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


def gather_weights(model: PreTrainedModel, sharded: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, whole, on the CPU: float32 masters where there are any. All ranks must walk through it together."""
    for name, parameter in model.named_parameters():
        yield name, read_master(parameter, sharded).detach().to("cpu", copy=True)


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
        changed_R = _find_changed_rows(values, reader.read(name))
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


class CheckpointReader:
    """Tensors of a checkpoint, full or delta, by parameter name, one at a time.

    Args:
        base: for a delta: see `open_stack`.

    Raises:
        ModelError: a file is damaged, a parameter is in none, or a delta's base is not the one that it was made on.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], base: Path | None = None):
        self.stack = open_stack(folder, base)
        self.layers = [_map_tensors(self.stack.root), *(_map_tensors(delta.folder) for delta in self.stack.deltas)]
        for delta, layer in zip(self.stack.deltas, self.layers[1:], strict=True):
            expected = {*delta.record.tensors, *(name + ROWS_SUFFIX for name in delta.record.rows)}
            if odd := sorted(set(layer) ^ expected):
                raise ModelError(f"{delta.folder} is damaged: its delta.json and its weights differ in {odd[0]}")
        self.model = None
        if any(all(name not in layer for layer in self.layers) for name in names):
            # A family whose files have another layout than its modules, such as experts fused on loading.
            root = self.stack.root
            self.model, loading = AutoModelForCausalLM.from_pretrained(root, dtype="auto", output_loading_info=True)
            if missing := sorted(set(names) & set(loading["missing_keys"])):
                raise ModelError(f"{root} lacks {len(missing)} parameters, the first is {missing[0]}")

    def read(self, name: str) -> torch.Tensor:
        return self._read_at(name, len(self.stack.deltas))

    def _read_at(self, name: str, place: int) -> torch.Tensor:
        """A parameter as it is with that many deltas on the root."""
        if place == 0:
            return self.model.get_parameter(name).detach() if self.model is not None else self._read_stored(name, 0)
        delta = self.stack.deltas[place - 1]
        if name in delta.record.rows:
            values = self._read_at(name, place - 1).to(delta.dtype, copy=True)
            values[self._read_stored(name + ROWS_SUFFIX, place)] = self._read_stored(name, place)
            return values
        if name in delta.record.tensors:
            return self._read_stored(name, place)
        return self._read_at(name, place - 1).to(delta.dtype)

    def _read_stored(self, name: str, place: int) -> torch.Tensor:
        with safe_open(self.layers[place][name], framework="pt") as file:
            return file.get_tensor(name)


def _map_tensors(folder: Path) -> dict[str, Path]:
    return {name: file for file in sorted(folder.glob("*.safetensors")) for name in read_header(file)}


def measure_updates(weights: dict[str, torch.Tensor], start: Path, dtype: torch.dtype, plan: FreezePlan) -> dict[str, float]:
    """Largest absolute change of each trained parameter since the start, in float32."""
    reader = CheckpointReader(start, plan.trained)
    return {name: (weights[name].float() - reader.read(name).to(dtype).float()).abs().max().item() for name in plan.trained}


def verify_checkpoint(start: Path, checkpoint: Path, plan: FreezePlan, updates: dict[str, float]) -> Verification:
    """Compare a round's checkpoint with its start, bit for bit: frozen parameters are the same, trained ones are not.

    The start counts as loaded, in the checkpoint's data type.

    Args:
        updates: largest change of each trained parameter in float32; tells a tensor that moved by less than a 16-bit
            checkpoint can hold from one that did not move.
    """
    names = (*plan.trained, *plan.frozen)
    before, after = CheckpointReader(start, names), CheckpointReader(checkpoint, names)

    violations = tuple(name for name in plan.frozen if not _is_same(after.read(name), before.read(name)))
    still = [name for name in plan.trained if _is_same(after.read(name), before.read(name))]
    return Verification(
        num_frozen=len(plan.frozen),
        num_trained=len(plan.trained),
        violations=violations,
        unmoved=tuple(name for name in still if updates.get(name, 0.0) == 0.0),
        below_resolution=tuple(name for name in still if updates.get(name, 0.0) > 0.0),
    )


def verify_round(round_: Round) -> Verification:
    """`verify_checkpoint` for a finished round, from its files.

    Raises:
        InputError: one of the files is missing or damaged.
    """
    start = fetch_checkpoint(round_.read_spec().model.path)
    verification = verify_checkpoint(start, round_.checkpoint, round_.read_plan(), round_.read_result().updates)
    return verification.model_copy(update={"damaged": tuple(find_checkpoint_damage(round_.checkpoint))})


def _find_changed_rows(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Numbers [R] of the rows whose bits differ in the data type of the new tensor; a vector changes as a whole."""
    if old.shape == new.shape and new.ndim > 1:
        return (_read_bits(new) != _read_bits(old.to(new.dtype))).flatten(1).any(1).nonzero().squeeze(1)
    return torch.arange(0 if _is_same(new, old) else len(new))


def _is_same(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether two tensors have the same bits in the data type of the new one."""
    return old.shape == new.shape and torch.equal(_read_bits(old.to(new.dtype)), _read_bits(new))


def _read_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: equal floats can differ in bits (0.0 and -0.0), and equal bits compare unequal (NaN)."""
    return tensor.detach().contiguous().view(torch.uint8)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
