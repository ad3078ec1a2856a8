"""Models of known shapes as their configs name them, and what `hft plan` says of them. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hftcli.freezing.activations import Adapters, Network, Workload
from hftcli.freezing.budget import Budget, Memory, ReferenceMode
from hftcli.freezing.narrowing import narrow_plan
from hftcli.freezing.roles import Parameter, assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan

# hidden, intermediate, layers, heads, key-value heads, vocabulary, whether the head is the embeddings
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama-2-7B
    "7B, 8 layers": (4096, 11008, 8, 32, 32, 32000, False),
    "tiny": (64, 160, 4, 4, 2, 2048, True),
    "tiny, apart": (64, 160, 4, 4, 4, 2048, False),
}
RULES = {
    "full": FreezeRule(trainable_fraction=1),
    "half": FreezeRule(),
    "half, prefix 0.25": FreezeRule(frozen_prefix=0.25),
    "LoRA": FreezeRule(trainable_fraction=1, embeddings="freeze", head="freeze"),
}
LORA = Adapters(rank=8)
REFERENCES: tuple[ReferenceMode, ...] = ("precompute", "shared", "full")
CASE_WORKS = {
    "135M": Workload(4, 1024, arithmetic="autocast"),
    "1B": Workload(2, 1024, arithmetic="autocast"),
    "tiny": Workload(2, 64, arithmetic="autocast"),
}


@dataclass(frozen=True)
class Setting:
    """How a model is trained, and its budget."""

    rule: str
    budget: Budget

    @property
    def work(self) -> Workload:
        return self.budget.work

    @property
    def is_lora(self) -> bool:
        return self.budget.adapters is not None

    @property
    def planned(self) -> Memory:
        return self.budget.half


def list_parameters(shape: str) -> list[Parameter]:
    """The parameters of a Llama of a shape, as transformers names them."""
    hidden, intermediate, num_layers, num_heads, num_kv_heads, vocabulary, is_tied = SHAPES[shape]
    keys = hidden // num_heads * num_kv_heads
    widths = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    inner = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    found = {"model.embed_tokens": (vocabulary, hidden)}
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        found |= {f"{layer}.self_attn.{name}_proj": widths[name] for name in widths}
        found |= {f"{layer}.mlp.{name}_proj": inner[name] for name in inner}
        found |= {f"{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    found |= {"model.norm": (hidden,)}
    if not is_tied:
        found |= {"lm_head": (vocabulary, hidden)}
    return [Parameter(f"{name}.weight", size) for name, size in found.items()]


def make_setting(shape: str, rule: str, work: Workload, on_gpu: bool = True) -> Setting:
    units = assign_roles("llama", list_parameters(shape))
    asked = RULES[rule]
    if asked.frozen_prefix and all(unit.role != "head" for unit in units):
        asked = FreezeRule(**{**asked.model_dump(), "head": "freeze"})  # a tied head is the embeddings, which are in the prefix
    plan, adapters = make_plan(units, asked, 0), None
    if rule == "LoRA":
        plan, adapters = narrow_plan(plan, units, None), LORA
    precision = "float32" if work.arithmetic == "float32" else "mixed"
    network = Network("llama", units, SHAPES[shape][3])
    return Setting(rule, Budget(plan, precision, 1, 0, network=network, work=work, adapters=adapters, on_gpu=on_gpu))


@dataclass(frozen=True)
class Case:
    """What step d measures: a rule, or DPO by half with a reference, with or without checkpointing."""

    shape: str
    rule: str
    reference: ReferenceMode | None
    every: int | None

    @property
    def name(self) -> str:
        what = f"DPO half, {self.reference}" if self.reference else self.rule
        return f"{self.shape}, {what}, {'all checkpointed' if self.every else 'none checkpointed'}"

    def make_setting(self, on_gpu: bool = True) -> Setting:
        work = replace(CASE_WORKS[self.shape], checkpoint_every=self.every)
        setting = make_setting(self.shape, self.rule, work, on_gpu)
        return replace(setting, budget=replace(setting.budget, reference=self.reference))


def list_cases(shape: str) -> Iterator[Case]:
    for every in (None, 1):
        for rule in RULES:
            yield Case(shape, rule, None, every)
        for reference in REFERENCES:
            yield Case(shape, "half", reference, every)


# What the configs on the models' pages say; without the biases of Qwen 2.5 and the norms of Qwen 3's heads, a ten-thousandth.
MODELS = {
    "SmolLM2-135M": SHAPES["135M"],
    "Llama-3.2-1B": SHAPES["1B"],
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-2-7B": SHAPES["7B"],
    "Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 32768, False),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 152064, False),
}
SHAPES |= MODELS
