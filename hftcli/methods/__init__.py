"""Methods: how old knowledge is defended besides freezing. One short file each; method.py says what a method may do."""

from collections.abc import Callable

from hftcli.methods.adalora import AdaLora
from hftcli.methods.agem import Agem
from hftcli.methods.anchor import Anchor
from hftcli.methods.average import Average
from hftcli.methods.distill import Distill
from hftcli.methods.ewc import Ewc
from hftcli.methods.gem import Gem
from hftcli.methods.ia3 import Ia3
from hftcli.methods.ift import Ift
from hftcli.methods.interpolation import Interpolation
from hftcli.methods.l2sp import L2sp
from hftcli.methods.lora import Lora
from hftcli.methods.method import Method
from hftcli.methods.olora import Olora
from hftcli.methods.peft import Peft
from hftcli.methods.pull import Pull
from hftcli.methods.quiet import Quiet
from hftcli.methods.redraw import Redraw
from hftcli.methods.replay import Replay
from hftcli.methods.self_replay import SelfReplay
from hftcli.methods.spiel import Spiel
from hftcli.methods.token_weights import TokenWeights
from hftcli.recipe.methods import PeftSection
from hftcli.runs.spec import RoundSpec


def make_methods(spec: RoundSpec) -> list[Method]:
    """The methods of a round, in the order in which the recipe's section lists them, and what the section `freeze` takes."""
    methods = [METHODS[name](spec, getattr(spec.method, name)) for name in spec.method.names]
    rule = spec.freeze
    return [
        *([(Spiel if rule.choice == "spiel" else Quiet)(spec)] if rule.divides else []),  # before what copies parameters
        *methods,
        *([Redraw(spec, rule.redraw)] if rule.redraw is not None else []),
        *([Pull(spec, rule.pull)] if rule.pull is not None else []),
        *([Average(spec, rule.average)] if rule.average is not None else []),
        *([Interpolation(spec, rule.interpolate)] if rule.interpolate < 1 else []),
    ]


def make_peft(spec: RoundSpec, section: PeftSection) -> Peft:
    """An adapter of PEFT's: one type takes a hand in every step."""
    return (AdaLora if section.type == "ADALORA" else Peft)(spec, section)


# By the name of the section under `method`.
METHODS: dict[str, Callable[..., Method]] = {
    "replay": Replay,
    "ewc": Ewc,
    "l2sp": L2sp,
    "gem": Gem,
    "agem": Agem,
    "lora": Lora,
    "olora": Olora,
    "ia3": Ia3,
    "self_replay": SelfReplay,
    "anchor": Anchor,
    "token_weights": TokenWeights,
    "ift": Ift,
    "distill": Distill,
    "peft": make_peft,
}
