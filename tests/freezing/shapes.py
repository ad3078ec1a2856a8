"""The parameters of models, without their values."""

from hftcli.freezing.roles import Parameter


def make_llama(num_layers: int, hidden: int, inner: int, keys: int, vocabulary: int) -> list[Parameter]:
    """Of a Llama, untied."""
    shapes = {"model.embed_tokens": (vocabulary, hidden)}
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (keys, hidden) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, inner)}
        shapes |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    return [Parameter(f"{name}.weight", shape) for name, shape in shapes.items()]
