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
LINEAR = {  # linear attention in three of four layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
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
    "qwen3_next": GROUPED | LINEAR | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    },
    "qwen3_5_text": GROUPED | LINEAR,
    "llama4_text": GROUPED | {"num_local_experts": 4, "intermediate_size_mlp": 32, "moe_layers": [1, 3]},
    "gemma3n_text": GROUPED | {
        "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"], "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0],
    },
    "smollm3": SMALL | {"num_key_value_heads": 2},
    "olmo3": SMALL | {"num_key_value_heads": 2},
    "granite": SMALL | {"num_key_value_heads": 2},
    "glm4": GROUPED,
    "gpt_oss": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": GROUPED | {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    "mamba2": {
        "hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "num_heads": 4, "head_dim": 8, "vocab_size": 40, "state_size": 8,
        "n_groups": 2, "chunk_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
# Units of each role in one layer, counted by hand in transformers' modeling files; a list where the layers differ.
LLAMA_COUNTS = {"attention": 4, "mlp": 3, "norm": 2}
MIXTURE = {"mlp": 3, "router": 2, "experts": 2}
LINEAR_NEXT = MIXTURE | {"mixer": 3, "small": 4, "norm": 2}
LINEAR_3_5 = {"mlp": 3, "mixer": 5, "small": 4, "norm": 2}
LLAMA4_DENSE, LLAMA4_MIXED = LLAMA_COUNTS, LLAMA_COUNTS | {"router": 1, "experts": 2}
GEMMA3N = LLAMA_COUNTS | {"norm": 6, "small": 11}
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
    "qwen3_next": [*[LINEAR_NEXT] * 3, MIXTURE | {"attention": 4, "norm": 4}, LINEAR_NEXT],
    "qwen3_5_text": [*[LINEAR_3_5] * 3, LLAMA_COUNTS | {"norm": 4}, LINEAR_3_5],
    "llama4_text": [LLAMA4_DENSE, LLAMA4_MIXED, LLAMA4_DENSE, LLAMA4_MIXED, LLAMA4_DENSE],
    # The last two layers take keys and values from earlier ones.
    "gemma3n_text": [*[GEMMA3N] * 3, *[GEMMA3N | {"attention": 2, "norm": 5}] * 2],
    "smollm3": LLAMA_COUNTS,
    "olmo3": LLAMA_COUNTS | {"norm": 4},
    "granite": LLAMA_COUNTS,
    "glm4": {"attention": 4, "mlp": 2, "norm": 4},
    "gpt_oss": {"attention": 4, "small": 1, "router": 1, "experts": 2, "norm": 2},
    "falcon_h1": LLAMA_COUNTS | {"mixer": 2, "small": 4},
    "mamba2": {"mixer": 2, "small": 5, "norm": 1},
}
OUTSIDE = {
    "gpt2": {"embedding": 2, "final_norm": 1},
    "gemma3n_text": {"embedding": 2, "bridge": 4, "final_norm": 1},
}
QK_NORMS = {  # of the norms in each layer, those of queries and keys
    "qwen3": [2] * 5,
    "gemma3_text": [2] * 5,
    "olmo2": [2] * 5,
    "olmo3": [2] * 5,
    "qwen3_moe": [2] * 5,
    "qwen3_next": [0, 0, 0, 2, 0],
    "qwen3_5_text": [0, 0, 0, 2, 0],
    "gemma3n_text": [2, 2, 2, 1, 1],
}


def count_in_layer(model_type: str, layer: int) -> dict[str, int]:
    """Units of each role in a layer."""
    counts = UNITS_IN_A_LAYER[model_type]
    return counts[layer] if isinstance(counts, list) else counts


def list_parameters(model_type: str, **settings: object) -> tuple[Parameter, ...]:
    """The parameters of a model as transformers builds it, without memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return tuple(Parameter(name, tuple(value.shape)) for name, value in model.named_parameters())


def build_units(model_type: str, **settings: object) -> tuple[Unit, ...]:
    return assign_roles(model_type, list_parameters(model_type, **settings))
