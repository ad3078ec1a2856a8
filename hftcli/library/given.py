"""What a script of one's own gives: a model's units, what its matrices read of earlier texts, hashes of its weights."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.errors import InputError, ModelError
from hftcli.freezing.roles import Parameter, Roles, Unit, assign_roles
from hftcli.measuring.drift import draw_texts
from hftcli.measuring.moments import Inputs, at_rest, measure_moments
from hftcli.models.checkpoint import is_partitioned
from hftcli.models.tensors import get_bytes

KEPT_TOKENS = 1024  # of a text that is to be kept, in a piece


def take_texts(keep: Iterable[str]) -> tuple[str, ...]:
    """Raises: InputError: one text alone, whose letters would be taken for texts."""
    if isinstance(keep, str):
        raise InputError("keep takes texts, and got one string", "give a list: keep=[text]")
    return tuple(keep)


def read_earlier(
    model: PreTrainedModel, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, keep: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Second moments of what the matrices read of the model's own texts, and of those to be kept; each counts the same.

    A kept text is read whole, in pieces where it is long.
    A model that is ready to train, as trainers hand it over, would write with dropout, and under checkpointing without a cache.
    """
    with torch.no_grad(), at_rest(model):
        texts = [[ids for ids, _ in draw_texts(model, tokenizer, model.device)]]
        if keep:
            whole = [tokenizer(text).input_ids for text in keep]
            texts.append([ids[first : first + KEPT_TOKENS] for ids in whole for first in range(0, len(ids), KEPT_TOKENS)])
        found = [measure_moments(model, model, inputs, rows, model.device) for rows in texts]
    return {name: torch.stack([moments[name] for moments in found]).mean(0) for name in inputs}


def list_model_units(
    parameters: Iterable[tuple[str, nn.Parameter]], model: PreTrainedModel, roles: Roles | None = None
) -> tuple[tuple[Unit, ...], int]:
    """The units of a model, and the heads of its attention.

    Args:
        roles: see `FreezeRule.roles`.

    Raises:
        ModelError: its family is not known, or ZeRO 3 holds it in pieces.
    """
    found = list(parameters)
    if any(is_partitioned(value) for _, value in found):
        raise ModelError("ZeRO 3 holds the model in pieces already", "freeze it before the trainer gets it, below ZeRO 3")
    described = tuple(Parameter(name, tuple(value.shape)) for name, value in found)
    num_heads = model.config.get_text_config().to_dict().get("num_attention_heads") or 1
    return assign_roles(model.config.model_type, described, roles), num_heads


def hash_tensor(values: torch.Tensor) -> str:
    """Of a tensor's bytes, shape and data type."""
    content = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode())
    content.update(get_bytes(values.cpu().contiguous()).data)
    return content.hexdigest()
