"""What a checkpoint is, without its weights: its config, its parameters by name and shape, its tokenizer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hftcli.errors import ModelError
from hftcli.freezing.positions import find_max_positions
from hftcli.freezing.roles import Parameter
from hftcli.models.deltas import hash_checkpoint, open_stack
from hftcli.models.masters import open_masters
from hftcli.runs.files import write_model
from hftcli.runs.run import Round, find_checkpoint_damage
from hftcli.runs.spec import HubStart, RoundSpec

# What is fetched of a model on the hub beside its weights; the text files are vocabularies of tokenizers in their slow form.
FETCHED = ("*.json", "*.model", "*.jinja", "README.md", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class ModelDescription:
    """What a config alone says about a model; no weights are read."""

    model_type: str
    parameters: tuple[Parameter, ...]
    max_positions: int | None
    num_embeddings: int
    num_layers: int
    num_heads: int


def identify_start(folder: Path) -> dict[str, str]:
    """Hashes of what a round begins from, by file: weights and config, and the masters beside them, as they were written."""
    masters = open_masters(folder)
    carried = {masters.path.name: masters.seal.sha256} if masters.state == "here" and masters.seal else {}
    return hash_checkpoint(folder) | carried


def make_start_key(folder: Path) -> str:
    """A hash of a checkpoint's weights, masters and config; those of a round must be what the round wrote.

    Raises:
        ModelError: a file of it is damaged.
    """
    if damage := find_checkpoint_damage(folder) + open_masters(folder).find_damage():
        raise ModelError(f"{folder} is damaged: {'; '.join(damage)}", "restore it, or run its round again in a new folder")
    return hashlib.sha256(json.dumps(identify_start(folder), sort_keys=True).encode()).hexdigest()


def describe_model(path: str) -> ModelDescription:
    """Build the model of a folder, a config file or a hub id without memory, and list its parameters; tied ones count once.

    Raises:
        ModelError: there is no such model, or its config does not load.
    """
    model = build_empty_model(path)
    text_config = model.config.get_text_config()
    return ModelDescription(
        model_type=model.config.model_type,
        parameters=tuple(Parameter(name, tuple(value.shape)) for name, value in model.named_parameters()),
        max_positions=find_max_positions(text_config.to_dict()),
        num_embeddings=model.get_input_embeddings().weight.shape[0],
        num_layers=text_config.num_hidden_layers,
        num_heads=text_config.to_dict().get("num_attention_heads") or 1,  # a model without attention has no heads
    )


def build_empty_model(path: str) -> PreTrainedModel:
    """The model of a folder, a config file or a hub id, without memory for its weights.

    Raises:
        ModelError: there is no such model, or its config does not load.
    """
    name, revision = split_revision(path)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        # The class itself: `from_config` would have DeepSpeed share the weights out where it holds the model.
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            return kind(config)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{path}: the model's config does not load: {get_first_line(error)}") from None


def split_revision(path: str) -> tuple[str, str | None]:
    """A folder or a hub id, and the revision of the latter where it is written behind it: `owner/name@revision`."""
    if Path(path).exists():
        return path, None
    name, _, revision = path.partition("@")
    return name, revision or None


def fetch_checkpoint(path: str, needs_weights: bool = True) -> Path:
    """The local folder of a checkpoint, full or delta: the path itself, or the snapshot of a hub id.

    Args:
        needs_weights: False leaves those of a hub id where they are.

    Raises:
        ModelError: no such model, no weights as safetensors, or a delta whose base is not the one that it was made on.
    """
    if Path(path).is_dir():
        folder = Path(path)
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            patterns = [*FETCHED, *(["*.safetensors"] if needs_weights else [])]
            name, revision = split_revision(path)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"model.path {path}: no such folder, and the hub does not give it: {get_first_line(error)}",
                "give a folder with a config.json, a finished run, or a hub id you have access to",
            ) from None
        if not needs_weights:
            return folder
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no weights as safetensors", "convert them with transformers' save_pretrained")
    open_stack(folder)
    return folder


def pin_start(round_: Round) -> RoundSpec:
    """What the worker was asked for, a hub id with the commit that the first process that comes finds.

    Raises:
        ModelError: see `fetch_checkpoint`.
    """
    spec = round_.read_spec()
    if Path(spec.model.path).is_dir():
        return spec
    with FileLock(round_.start_path.with_suffix(".lock")):
        if not round_.start_path.exists():
            write_model(round_.start_path, HubStart(commit=fetch_checkpoint(spec.model.path).name))
    return spec.model_copy(update={"model": spec.model.model_copy(update={"path": round_.find_start()})})


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: ModelError: the folder has no tokenizer that transformers can load."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the tokenizer does not load: {get_first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def get_first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
