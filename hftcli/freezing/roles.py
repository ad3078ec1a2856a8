"""Where every parameter stands in its model: the layer, the role, and the unit that is frozen or trained as a whole.

Names alone decide, as `named_parameters()` of the family's AutoModelForCausalLM class lists them. There is no
guessing: a family without an entry in `FAMILIES` and without `freeze.roles`, or a parameter that these do not know, is an
error, because a weight in the wrong group would be frozen or trained without anybody noticing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

from hftcli.errors import ModelError

Role = Literal[
    "attention", "mixer", "mlp", "router", "experts", "norm", "small", "embedding", "bridge", "final_norm", "head"
]  # fmt: skip
OUTSIDE_ROLES = ("embedding", "bridge", "final_norm", "head")  # of what is no layer's
Roles = dict[Role, str | tuple[str, ...]]  # the pattern, or patterns, of each role


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model, without its values."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Weights in it."""
        return prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """What is frozen or trained together: one module's weight and, where it has one, its bias.

    Attributes:
        name: the module's name, such as `model.layers.0.self_attn.q_proj`; the parameter's own name where one module
            holds several matrices, as fused experts do.
        role: one of `Role`.
        layer: index from 0, or None outside the layers.
    """

    name: str
    role: Role
    layer: int | None
    parameters: tuple[Parameter, ...]

    @property
    def num_parameters(self) -> int:
        """Weights in it, biases counted."""
        return sum(parameter.num_elements for parameter in self.parameters)

    @property
    def category(self) -> str:
        """What it is drawn among in its layer: its role; but norms of queries and keys are not drawn among the block's own.

        The paper's layers have two norms, of which one trains; with four of unlike size, both might be frozen.
        """
        return "qk_norm" if self.role == "norm" and self.name.endswith(("q_norm", "k_norm")) else self.role


class UnknownRoles(ModelError):
    """A family without an entry, or with one that is not complete, and no `freeze.roles` that say what its parameters are."""


def assign_roles(model_type: str, parameters: Sequence[Parameter], roles: Roles | None = None) -> tuple[Unit, ...]:
    """Gather parameters into units, in the order of the parameters.

    Tied embeddings are listed once, under the embedding's name, and so are one unit with the role `embedding`.

    Args:
        model_type: the family, as transformers' config names it.
        parameters: every parameter of the model.
        roles: `freeze.roles`, in place of the family's entry.

    Raises:
        ModelError: the family is not in the table, one of its parameters has no role, or two, or a pattern is nothing's.
    """
    check_family(model_type, roles, example=parameters[0].name if parameters else "")
    members = list_units(parameters)
    found = FAMILIES[model_type] if roles is None else roles
    places = {name: _find_roles(found, name) for name in members}
    _check_roles(model_type, places, members, roles)
    return tuple(Unit(name, *next(iter(places[name].items())), tuple(group)) for name, group in members.items())


def check_family(model_type: str, roles: Roles | None = None, example: str = "") -> None:
    """Refuse a family that has no entry, before anything is loaded.

    Args:
        roles: `freeze.roles`, which needs none.
        example: a parameter of the model, which shows in the message what an entry would have to match.

    Raises:
        UnknownRoles: there is no entry.
    """
    if roles is None and model_type not in FAMILIES:
        shown = f" (its first parameter is {example})" if example else ""
        raise UnknownRoles(
            f"no roles are known for model_type {model_type!r}{shown}; known families: {', '.join(FAMILIES)}",
            "name them in the recipe, under freeze.roles: `hft plan` on this model prints a proposal to check and paste",
        )


def list_units(parameters: Sequence[Parameter]) -> dict[str, list[Parameter]]:
    """The parameters of each unit, by its name, in the model's order."""
    members: dict[str, list[Parameter]] = {}
    names = {parameter.name for parameter in parameters}
    for parameter in parameters:
        members.setdefault(_name_unit(parameter.name, names), []).append(parameter)
    return members


def _name_unit(name: str, names: set[str]) -> str:
    """The unit of a parameter: its module, or of fused experts' matrices the one that a bias is added to."""
    beside = name.removesuffix("_bias")
    return beside if beside != name and beside in names else re.sub(r"\.(weight|bias)$", "", name)


def _find_roles(roles: Roles, name: str) -> dict[Role, int | None]:
    """The roles that a unit has by its name, one if all is well, with its layer."""
    found: dict[Role, int | None] = {}
    for role in roles:
        for pattern in list_patterns(roles, role):
            if match := re.fullmatch(compile_pattern(pattern), name):
                layer = None if role in OUTSIDE_ROLES else match.groupdict().get("layer")
                found[role] = None if layer is None else int(layer)
    return found


def _check_roles(
    model_type: str, places: Mapping[str, Mapping[Role, int | None]], members: Mapping[str, Sequence[Parameter]],
    roles: Roles | None,
) -> None:  # fmt: skip
    """Raises: ModelError: a unit has no role, or two; or a pattern of the recipe's matches no unit."""
    source = f"the entry {model_type!r} of FAMILIES in hftcli/freezing/roles.py" if roles is None else "freeze.roles"
    if nameless := [members[name][0].name for name, found in places.items() if not found]:
        others = f" and {len(nameless) - 1} others" if len(nameless) > 1 else ""
        message = f"no role is known for parameter {nameless[0]}{others} of model_type {model_type!r}"
        if roles is None:
            raise UnknownRoles(message, "name all of them under freeze.roles: `hft plan` on this model prints a proposal")
        raise ModelError(message, f"add to {source}")
    for name, found in places.items():
        if len(found) > 1:
            raise ModelError(f"{name} has {len(found)} roles by {source}: {', '.join(found)}", "leave it one")
        (role,) = found
        if found[role] is None and role not in OUTSIDE_ROLES:
            raise ModelError(f"{name} is {role} by {source}, and in no layer", "give it one of " + ", ".join(OUTSIDE_ROLES))
    for role in roles or ():
        for pattern in list_patterns(roles or {}, role):
            if not any(re.fullmatch(compile_pattern(pattern), name) for name in places):
                raise ModelError(
                    f"freeze.roles.{role}: {pattern} is the name of nothing in this model of model_type {model_type!r}",
                    "correct it, or drop it; names are those of modules, without .weight and .bias",
                )


def list_patterns(roles: Roles, role: Role) -> tuple[str, ...]:
    """The patterns of a role."""
    patterns = roles[role]
    return (patterns,) if isinstance(patterns, str) else patterns


@cache
def compile_pattern(pattern: str) -> str:
    """The regular expression that a pattern stands for."""
    escaped = pattern.replace(".", r"\.")
    return escaped.replace("*", r"(?P<layer>\d+)", 1).replace("*", r"\d+")


# Which units play which role. In a name `(a|b)` means a or b, `(a)?` a or nothing, the first `*` is the index of the layer and
# others any number, and all else is literal. A mixer is what stands in attention's place: linear attention, or a state-space
# layer. What is small are the tensors of a layer that are no matrix of its own width: convolutions, decays, sinks, gates, norms
# within a mixer. A bridge leads from the embeddings to the layers, or from the layers to the head.

LLAMA: Roles = {
    "embedding": "model.embed_tokens",
    "attention": "model.layers.*.self_attn.(q|k|v|o)_proj",
    "mlp": "model.layers.*.mlp.(gate|up|down)_proj",
    "norm": "model.layers.*.(input|post_attention)_layernorm",
    "final_norm": "model.norm",
    "head": "lm_head",
}
QWEN3: Roles = LLAMA | {
    "norm": "model.layers.*.((input|post_attention)_layernorm|self_attn.(q|k)_norm)",
}
GEMMA2: Roles = LLAMA | {
    "norm": "model.layers.*.(input|post_attention|pre_feedforward|post_feedforward)_layernorm",
}
GEMMA3: Roles = LLAMA | {
    "norm": "model.layers.*.((input|post_attention|pre_feedforward|post_feedforward)_layernorm|self_attn.(q|k)_norm)",
}
OLMO2: Roles = LLAMA | {
    "norm": "model.layers.*.((post_attention|post_feedforward)_layernorm|self_attn.(q|k)_norm)",
}
PHI3: Roles = LLAMA | {
    "attention": "model.layers.*.self_attn.(qkv|o)_proj",
    "mlp": "model.layers.*.mlp.(gate_up|down)_proj",
}
EXPERTS: Roles = {
    "router": "model.layers.*.mlp.gate",
    "experts": "model.layers.*.mlp.experts.(gate_up|down)_proj",
}
GLM4: Roles = PHI3 | {
    "attention": "model.layers.*.self_attn.(q|k|v|o)_proj",
    "norm": "model.layers.*.(input|post_(attention|self_attn|mlp))_layernorm",
}
QWEN3_5: Roles = QWEN3 | {  # three layers of linear attention, then one of attention
    "mixer": "model.layers.*.linear_attn.(in_proj_(qkvz|qkv|z|ba|b|a)|out_proj)",
    "small": "model.layers.*.linear_attn.(dt_bias|A_log|conv1d|norm)",
}
QWEN3_NEXT = (
    QWEN3_5
    | EXPERTS
    | {
        "mlp": "model.layers.*.mlp.(shared_expert.)?(gate|up|down)_proj",
        "router": "model.layers.*.mlp.(gate|shared_expert_gate)",
    }
)
LLAMA4: Roles = LLAMA | {
    "mlp": "model.layers.*.feed_forward.(shared_expert.)?(gate|up|down)_proj",
    "router": "model.layers.*.feed_forward.router",
    "experts": "model.layers.*.feed_forward.experts.(gate_up|down)_proj",
}
GEMMA3N: Roles = GEMMA3 | {
    "embedding": "model.embed_tokens(_per_layer)?",
    "bridge": "model.(per_layer_(model_projection|projection_norm)|altup_(unembed_)?projections.*)",
    "small": (
        "model.layers.*.laurel.(linear_left|linear_right|post_laurel_norm)",
        "model.layers.*.altup.(correct_output_scale|(correction|prediction)_coefs|modality_router|router_norm)",
        "model.layers.*.(per_layer_(input_gate|projection)|post_per_layer_input_norm)",
    ),
}
GPT_OSS: Roles = LLAMA | {
    "router": "model.layers.*.mlp.router",
    "experts": "model.layers.*.mlp.experts.(gate_up|down)_proj",
    "small": "model.layers.*.self_attn.sinks",
}
FALCON_H1: Roles = LLAMA | {  # attention and a state-space layer side by side
    "mixer": "model.layers.*.mamba.(in|out)_proj",
    "mlp": "model.layers.*.feed_forward.(gate|up|down)_proj",
    "norm": "model.layers.*.(input|pre_ff)_layernorm",
    "small": "model.layers.*.mamba.(dt_bias|A_log|D|conv1d|norm)",
    "final_norm": "model.final_layernorm",
}
MAMBA2: Roles = {
    "embedding": "backbone.embeddings",
    "mixer": "backbone.layers.*.mixer.(in|out)_proj",
    "norm": "backbone.layers.*.norm",
    "small": "backbone.layers.*.mixer.(dt_bias|A_log|D|conv1d|norm)",
    "final_norm": "backbone.norm_f",
    "head": "lm_head",
}
GPT_NEOX: Roles = {
    "embedding": "gpt_neox.embed_in",
    "attention": "gpt_neox.layers.*.attention.(query_key_value|dense)",
    "mlp": "gpt_neox.layers.*.mlp.(dense_h_to_4h|dense_4h_to_h)",
    "norm": "gpt_neox.layers.*.(input|post_attention)_layernorm",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",
}
GPT2: Roles = {
    "embedding": "transformer.(wte|wpe)",
    "attention": "transformer.h.*.attn.(c_attn|c_proj)",
    "mlp": "transformer.h.*.mlp.(c_fc|c_proj)",
    "norm": "transformer.h.*.(ln_1|ln_2)",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}

# By transformers' `model_type`.
FAMILIES: dict[str, Roles] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "mixtral": LLAMA | EXPERTS,
    "qwen3_moe": QWEN3 | EXPERTS,  # layers in `mlp_only_layers` have a plain mlp
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_text": QWEN3_5,
    "llama4_text": LLAMA4,
    "gemma3n_text": GEMMA3N,
    "smollm3": LLAMA,
    "olmo3": OLMO2,
    "granite": LLAMA,
    "glm4": GLM4,
    "gpt_oss": GPT_OSS,
    "falcon_h1": FALCON_H1,
    "mamba2": MAMBA2,
}
