"""IA3 (arXiv 2205.05638, vectors by PEFT): keys, values and the mlp's inner activations are scaled, each by a learned vector.

The keys and values are what their layers give out, bias and all; the inner activations are what the mlp's last layer takes in,
experts left out.
Where one layer gives out the queries as well (Phi-3, GPT-NeoX, GPT-2), these are scaled too, as PEFT does it. PEFT's own table
has the queries in place of the keys for Qwen and Gemma; the keys are the paper's.

The vectors begin at one, where the model is the start. All else is as with every adapter of PEFT's (peft.py).
"""

from collections.abc import Sequence
from typing import Any

from hftcli.errors import ModelError
from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan
from hftcli.methods.peft import Peft, get_last
from hftcli.methods.peft_config import FEEDFORWARD

# By role, the last parts of the names of the layers that are scaled.
SCALED = {
    "attention": ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"),
    "mlp": FEEDFORWARD,
}


class Ia3(Peft):
    """(IA)^3: vectors that scale keys, values and the mlp's inner activations train in place of the weights."""

    def read_section(self) -> tuple[str, dict[str, Any]]:
        """There is nothing to choose."""
        return "IA3", {}

    def choose_targets(self, plan: FreezePlan, units: tuple[Unit, ...]) -> list[str]:
        """The layers that are scaled."""
        return choose_scaled(plan, units)


def choose_scaled(plan: FreezePlan, units: Sequence[Unit]) -> list[str]:
    """Of the layers that a plan trains, those whose keys, values or inner activations are scaled.

    Raises:
        ModelError: there are none.
    """
    trained = set(plan.trained)
    scaled = [unit for unit in units if get_last(unit.name) in SCALED.get(unit.role, ())]
    chosen = [unit.name for unit in scaled if unit.parameters[0].name in trained]
    if not chosen:
        raise ModelError(
            f"no vector would train: ia3 scales {', '.join(dict.fromkeys(get_last(unit.name) for unit in scaled))}, and "
            "the freeze plan trains none of them",
            "raise freeze.trainable_fraction",
        )
    return chosen
