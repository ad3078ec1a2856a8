"""The section `method.peft` as PEFT's own config: which of its class's keys are taken, and what may stand there."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ConfigDict, TypeAdapter, ValidationError

from hftcli.errors import InputError

FEEDFORWARD = ("down_proj", "dense_4h_to_h", "c_proj")  # of which IA3 scales the inputs
# Keys with which layers are chosen, as PEFT reads them.
CHOOSING = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
# Keys of PEFT's classes that are not taken, and why.
REFUSED = {
    **dict.fromkeys(
        ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        "hft writes it",
    ),
    **dict.fromkeys(
        ("modules_to_save", "trainable_token_indices"),
        "an adapter is all that trains; type: TRAINABLE_TOKENS trains rows of the embeddings",
    ),
    "target_parameters": "name layers, in target_modules",
    "layer_replication": "the merged model would have other layers than its start",
    "total_step": "it is the number of the round's steps",
    "runtime_config": "it says how a model is served",
}
BASE_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga", "mica")  # they change the weights that they stand on
OF_LORA = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_config", "megatron_core")
REFUSED |= {
    **dict.fromkeys((*OF_LORA, "kasa_config"), "it changes the weights below, or serves them"),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it is for weights that are held in 4 bits"),
    "lora_bias": "it trains biases besides, and these are not the adapter's",
    "monteclora_config": "its own term of the loss is not added",
    "alora_invocation_tokens": "such an adapter does not merge",
    "arrow_config": "it chooses among adapters that were trained before",
}
# Keys that a type's class has and its adapters do not read, and what to give.
UNREAD = {
    "ADALORA": {
        "r": "give init_r, at which its ranks begin, and target_r",
        **dict.fromkeys(("rank_pattern", "alpha_pattern", "use_rslora", "use_bdlora"), "drop it"),
    }
}
SEARCHED, AFTER_A_DOT = ("OSF",), ("C3A", "FOURIERFT")  # which read the names in their patterns in ways of their own


def build_config(kind: str, given: dict[str, Any], targets: Sequence[str], is_transposed: bool = False) -> PeftConfig:
    """PEFT's config for these layers.

    Raises:
        InputError: PEFT's class does not take a key or a value.
    """
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in given.items():
        place = f"method.peft.{key}"
        if key in REFUSED:
            raise InputError(f"{place} is not taken: {REFUSED[key]}", "drop it")
        if key in (unread := UNREAD.get(kind, {})):
            raise InputError(f"{place} would have no effect with type {kind}", unread[key])
        if key not in known:
            taken = [name for name in known if name not in REFUSED and name not in unread]
            guess = difflib.get_close_matches(key, taken, n=1)
            raise InputError(
                f"{place}: PEFT's {cls.__name__} has no such key" + (f" (did you mean '{guess[0]}'?)" if guess else ""),
                f"give some of {', '.join(taken)}",
            )
        if str(value).startswith(BASE_INITS) and key.startswith("init_"):
            raise InputError(f"{place} {value} changes the weights below, which stay the start's", "drop it")
        if key == "bias" and value != "none":
            raise InputError(f"{place} {value} trains biases besides, and these are not the adapter's", "drop it")
        values[key] = check_value(place, value, hints[key])
    if kind == "ADALORA":
        values["total_step"] = 2**31  # until the round's are known
    make_config(cls, values)  # before the layers that are chosen stand in place of the user's own keys
    for key in CHOOSING[1:]:  # the layers are chosen
        values.pop(key, None)
    values["target_modules"] = list(targets)
    if "fan_in_fan_out" in known:
        values.setdefault("fan_in_fan_out", is_transposed)
    if kind == "IA3":
        values["feedforward_modules"] = find_inner(given, targets)
    return make_config(cls, values)


def make_config(cls: type[PeftConfig], values: dict[str, Any]) -> PeftConfig:
    """Raises: InputError: PEFT's class refuses them together."""
    try:
        return cls(task_type="CAUSAL_LM", **values)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"method.peft: PEFT's {cls.__name__} refuses these settings: {get_line(error)}") from None


def check_value(place: str, value: Any, kind: Any) -> Any:
    """Raises: InputError: the value is not of the type that PEFT's class names."""
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        reasons = " or ".join(dict.fromkeys(fault["msg"][0].lower() + fault["msg"][1:] for fault in error.errors()))
        raise InputError(f"{place}: {reasons}, got {value!r}") from None


def find_inner(given: dict[str, Any], targets: Sequence[str]) -> list[str]:
    """The layers of which IA3 scales the inputs: those that are given, or of the mlp the last."""
    inner = list_names(given.get("feedforward_modules") or FEEDFORWARD)
    return [name for name in targets if any(ends_with(name, part) for part in inner)]


def is_matched(kind: str, pattern: str, name: str) -> bool:
    """Whether a name in `rank_pattern`, or in another such key, is that of a layer, as PEFT's type reads it.

    Raises:
        InputError: it is no pattern.
    """
    try:
        if kind in SEARCHED:
            return re.search(pattern, name) is not None
        return re.match(rf".*\.{pattern}$" if kind in AFTER_A_DOT else rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise InputError(f"method.peft: {pattern!r} is no pattern of layers: {error}", "give names of layers") from None


def list_names(given: str | Iterable[str]) -> list[str]:
    """Names of layers, of which one may stand alone."""
    return [given] if isinstance(given, str) else list(given)


def ends_with(name: str, part: str) -> bool:
    """Whether a layer is called so: by the last parts of its name."""
    return f".{name}".endswith(f".{part}")


def get_line(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0]
