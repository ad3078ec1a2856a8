"""Where every parameter stands in its model: the layer, the role, and the unit that is frozen or trained as a whole.

Names alone decide, as `named_parameters()` of the family's AutoModelForCausalLM class lists them. There is no
guessing: a family without an entry in `FAMILIES`, or a parameter that its entry does not know, is an error, because a
weight in the wrong group would be frozen or trained without anybody noticing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from hftcli.errors import ModelError


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
        role: a key of the family's entry in `FAMILIES`.
        layer: index from 0, or None outside the layers.
    """

    name: str
    role: str
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


def assign_roles(model_type: str, parameters: Sequence[Parameter]) -> tuple[Unit, ...]:
    """Gather parameters into units, in the order of the parameters.

    Tied embeddings are listed once, under the embedding's name, and so are one unit with the role `embedding`.

    Args:
        model_type: the family, as transformers' config names it.
        parameters: every parameter of the model.

    Raises:
        ModelError: the family is not in the table, or one of its parameters is not.
    """
    check_family(model_type, example=parameters[0].name if parameters else "")
    members: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        members.setdefault(re.sub(r"\.(weight|bias)$", "", parameter.name), []).append(parameter)
    return tuple(_make_unit(model_type, name, tuple(group)) for name, group in members.items())


def check_family(model_type: str, example: str = "") -> None:
    """Refuse a family that has no entry, before anything is loaded.

    Args:
        example: a parameter of the model, which shows in the message what an entry would have to match.

    Raises:
        ModelError: there is no entry.
    """
    if model_type not in FAMILIES:
        shown = f" (its first parameter is {example})" if example else ""
        raise ModelError(
            f"no roles are known for model_type {model_type!r}{shown}; known families: {', '.join(FAMILIES)}",
            "add an entry to FAMILIES in hftcli/freezing/roles.py",
        )


def _make_unit(model_type: str, name: str, parameters: tuple[Parameter, ...]) -> Unit:
    for role, pattern in FAMILIES[model_type].items():
        if match := re.fullmatch(_compile_names(pattern), name):
            layer = match.groupdict().get("layer")
            return Unit(name, role, None if layer is None else int(layer), parameters)
    raise ModelError(
        f"no role is known for parameter {parameters[0].name} of model_type {model_type!r}",
        f"complete the entry {model_type!r} of FAMILIES in hftcli/freezing/roles.py",
    )


def _compile_names(pattern: str) -> str:
    """The regular expression that an entry of `FAMILIES` stands for."""
    return pattern.replace(".", r"\.").replace("*", r"(?P<layer>\d+)")


# Which units play which role. In a name `(a|b)` means a or b, `*` is the index of the layer, and all else is literal.
# Roles in the layers are attention, mlp, norm, router and experts; outside of them embedding, final_norm and head.

LLAMA = {
    "embedding": "model.embed_tokens",
    "attention": "model.layers.*.self_attn.(q|k|v|o)_proj",
    "mlp": "model.layers.*.mlp.(gate|up|down)_proj",
    "norm": "model.layers.*.(input|post_attention)_layernorm",
    "final_norm": "model.norm",
    "head": "lm_head",
}
QWEN3 = LLAMA | {
    "norm": "model.layers.*.((input|post_attention)_layernorm|self_attn.(q|k)_norm)",
}
GEMMA2 = LLAMA | {
    "norm": "model.layers.*.(input|post_attention|pre_feedforward|post_feedforward)_layernorm",
}
GEMMA3 = LLAMA | {
    "norm": "model.layers.*.((input|post_attention|pre_feedforward|post_feedforward)_layernorm|self_attn.(q|k)_norm)",
}
OLMO2 = LLAMA | {
    "norm": "model.layers.*.((post_attention|post_feedforward)_layernorm|self_attn.(q|k)_norm)",
}
PHI3 = LLAMA | {
    "attention": "model.layers.*.self_attn.(qkv|o)_proj",
    "mlp": "model.layers.*.mlp.(gate_up|down)_proj",
}
EXPERTS = {
    "router": "model.layers.*.mlp.gate",
    "experts": "model.layers.*.mlp.experts.(gate_up|down)_proj",
}
GPT_NEOX = {
    "embedding": "gpt_neox.embed_in",
    "attention": "gpt_neox.layers.*.attention.(query_key_value|dense)",
    "mlp": "gpt_neox.layers.*.mlp.(dense_h_to_4h|dense_4h_to_h)",
    "norm": "gpt_neox.layers.*.(input|post_attention)_layernorm",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",
}
GPT2 = {
    "embedding": "transformer.(wte|wpe)",
    "attention": "transformer.h.*.attn.(c_attn|c_proj)",
    "mlp": "transformer.h.*.mlp.(c_fc|c_proj)",
    "norm": "transformer.h.*.(ln_1|ln_2)",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}

# By transformers' `model_type`.
FAMILIES = {
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
}
