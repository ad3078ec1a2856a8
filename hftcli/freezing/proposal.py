"""Roles proposed for a family that nobody has named yet: guessed from names, and so for a person to check.

What is guessed is printed as `freeze.roles` and used only once it stands in a recipe.
"""

import re
from collections.abc import Sequence

from hftcli.freezing.roles import Parameter, Role, list_units

MIXER = r"mamba|ssm|mixer|linear_attn|delta|recurrent|rglru|rwkv|time_mix|(^|[._])conv"
ATTENTION = r"attn|attention"
MLP = r"mlp|ffn|feed_?forward|(^|[._])ff([._]|$)|moe|shared_expert|(^|[._])(fc_?\d|w[123]|c_fc|dense_\w+)$"
NORM = r"norm|(^|[._])ln(_\w+|\d+)?$|scale$"
ROUTER = r"router|(^|[._])(gate|wg|\w*expert_gate)$"


def propose_roles(parameters: Sequence[Parameter]) -> tuple[dict[Role, list[str]], list[str]]:
    """For each role the patterns of what may have it, as `freeze.roles` takes them; and the names that tell nothing."""
    units = list_units(parameters)
    holders = [name[: match.start()] for name in units if (match := re.search(r"\.\d+(?=\.|$)", name))]
    layers = max(set(holders), key=holders.count, default="")  # what most units with a number stand below
    guessed: dict[tuple[Role, str], list[str]] = {}
    unknown: list[str] = []
    for name, members in units.items():
        is_inside = layers != "" and re.match(rf"{re.escape(layers)}\.\d+\.", name) is not None
        rank = max(len(member.shape) for member in members)
        role = _guess_inside(name.removeprefix(layers), rank) if is_inside else _guess_outside(name)
        place, _, last = re.sub(r"\.\d+(?=\.|$)", ".*", name).rpartition(".")
        if role is None:
            unknown.append(f"{place}.{last}")
        else:
            guessed.setdefault((role, place), []).append(last)
    found: dict[Role, list[str]] = {}
    for (role, place), parts in guessed.items():
        lasts = list(dict.fromkeys(parts))
        tail = lasts[0] if len(lasts) == 1 else f"({'|'.join(lasts)})"
        found.setdefault(role, []).append(f"{place}.{tail}" if place else tail)
    return found, list(dict.fromkeys(unknown))


def write_proposal(model_type: str, parameters: Sequence[Parameter]) -> str:
    """The proposal as YAML, to be checked and pasted into a recipe."""
    found, unknown = propose_roles(parameters)
    lines = [
        f"# Guessed from the names of {model_type}: check each line, then paste it into the recipe.",
        "freeze:",
        "  roles:",
    ]
    for role, patterns in found.items():
        single = len(patterns) == 1
        lines += [f"    {role}: {patterns[0]}"] if single else [f"    {role}:", *(f"    - {name}" for name in patterns)]
    return "\n".join([*lines, *(f"    # to be named: {name}" for name in unknown)])


def _guess_outside(name: str) -> Role | None:
    """Of what is in no layer."""
    if re.search(r"lm_head|embed_out|(^|\.)(head|output)$", name):
        return "head"
    if re.search(r"embed|wte|wpe|embd", name) and not re.search(rf"proj|{NORM}", name):
        return "embedding"
    if re.search(rf"{NORM}|ln_f|norm_f", name):
        return "bridge" if re.search(r"proj|embed|embd", name) and "embedding_norm" not in name else "final_norm"
    return "bridge"


def _guess_inside(name: str, rank: int) -> Role | None:
    """Of what is in a layer.

    Args:
        name: from the index of the layer on.
        rank: dimensions of its largest tensor.
    """
    is_mixer = re.search(MIXER, name) is not None
    if re.search(NORM, name):
        return "small" if is_mixer and name.count(".") > 2 else "norm"
    if re.search(r"(^|\.)experts?(\.|$)", name):
        return "experts"
    if re.search(ROUTER, name):
        return "router"
    if rank == 1 or "conv1d" in name:
        return "small"
    if is_mixer:
        return "mixer"
    if re.search(ATTENTION, name):
        return "attention"
    return "mlp" if re.search(MLP, name) else None
