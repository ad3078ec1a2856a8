"""Small models of every family, as transformers builds them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hftcli.freezing.roles import Parameter, Unit, assign_roles

NUM_LAYERS = 5  # odd, so that what is odd in a layer cannot cancel out over the layers
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 4}  # grouped-query attention
CONFIGS = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "mistral": GROUPED,
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "phi3": SMALL | {"num_key_value_heads": 2},
    "olmo2": SMALL | {"num_key_value_heads": 2},
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 4, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen3_moe": GROUPED | {"num_experts": 4, "moe_intermediate_size": 8},
}
# Units of each role in one layer, counted by hand in transformers' modeling files.
LLAMA_COUNTS = {"attention": 4, "mlp": 3, "norm": 2}
UNITS_IN_A_LAYER = {
    "llama": LLAMA_COUNTS,
    "mistral": LLAMA_COUNTS,
    "qwen2": LLAMA_COUNTS,
    "qwen3": LLAMA_COUNTS | {"norm": 4},
    "gemma2": LLAMA_COUNTS | {"norm": 4},
    "gemma3_text": LLAMA_COUNTS | {"norm": 6},
    "phi3": {"attention": 2, "mlp": 2, "norm": 2},
    "olmo2": LLAMA_COUNTS | {"norm": 4},
    "gpt_neox": {"attention": 2, "mlp": 2, "norm": 2},
    "gpt2": {"attention": 2, "mlp": 2, "norm": 2},
    "mixtral": {"attention": 4, "norm": 2, "router": 1, "experts": 2},
    "qwen3_moe": {"attention": 4, "norm": 4, "router": 1, "experts": 2},
}


def list_parameters(model_type: str, **settings: object) -> tuple[Parameter, ...]:
    """The parameters of a model as transformers builds it, without memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return tuple(Parameter(name, tuple(value.shape)) for name, value in model.named_parameters())


def build_units(model_type: str, **settings: object) -> tuple[Unit, ...]:
    return assign_roles(model_type, list_parameters(model_type, **settings))
