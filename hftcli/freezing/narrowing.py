"""What of a freeze plan a method leaves to train: the matrices that take adapters, and which directions these read."""

import difflib
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

from hftcli.errors import ModelError
from hftcli.freezing.directions import list_inputs, open_directions
from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan, write_plan


def narrow_plan(
    plan: FreezePlan,
    units: Sequence[Unit],
    target_modules: Sequence[str] | None,
    open_fraction: float | None = None,
    num_heads: int = 1,
) -> FreezePlan:
    """What of a plan low-rank adapters can train: the matrices of the linear layers in attention and mlp, without biases.

    Args:
        units: those that the plan was made of.
        target_modules: last parts of the names of the layers that take adapters, such as `q_proj`; None takes all.
        open_fraction: share of the directions of their inputs that the adapters read; None reads all.
        num_heads: see `make_plan`.

    Raises:
        ModelError: there are none, a name is that of no such layer, or the model's matrices do not come apart into directions.
    """
    trained = set(plan.trained)
    adaptable = {
        parameter.name: unit.name.rpartition(".")[2]
        for unit in units
        if unit.role in ("attention", "mlp")
        for parameter in unit.parameters
        if len(parameter.shape) == 2
    }
    linear = {name: module for name, module in adaptable.items() if name in trained}
    narrowed = {name for name, module in linear.items() if target_modules is None or module in target_modules}
    if not narrowed:
        raise ModelError(
            f"no adapter would train: target_modules is {', '.join(target_modules or ()) or 'null'}, and the linear layers "
            f"that the freeze plan trains are {', '.join(dict.fromkeys(linear.values())) or 'none'}",
            "name some of these",
        )
    for name in target_modules or ():
        refuse_unknown(name, "target_modules", tuple(adaptable.values()))
    if open_fraction is None:
        return restrict_plan(plan, units, narrowed)
    blocks = plan.rule.blocks
    inside = [unit for unit in units if unit.layer is not None]
    list_inputs(inside, blocks, num_heads)  # of those that another round draws as well
    adapted = [unit for unit in inside if unit.parameters[0].name in narrowed]
    directions = open_directions(adapted, Fraction(str(open_fraction)), blocks, num_heads)
    return write_plan(units, narrowed, plan.rule.model_copy(update={"keep": None}), plan.round_index, directions)


def refuse_unknown(name: str, key: str, modules: Collection[str], is_called: Callable[[str], bool] | None = None) -> None:
    """Check that a name is that of layers which take adapters, whether or not this round trains them.

    Args:
        modules: last parts of the names of these layers, or whole names.
        is_called: whether one of these is meant; None takes the name for the last parts of one.

    Raises:
        ModelError: it is not.
    """
    if not any(is_called(module) if is_called else f".{module}".endswith(f".{name}") for module in modules):
        known = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
        guess = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
        raise ModelError(
            f"{key} names {name}, and no layer of the model that takes adapters is called so: these are {', '.join(known)}",
            f"did you mean {guess[0]}?" if guess else "drop it",
        )


def restrict_plan(plan: FreezePlan, units: Sequence[Unit], names: set[str]) -> FreezePlan:
    """A plan with these parameters alone training, of those that it trains already."""
    return write_plan(units, names, plan.rule, plan.round_index)
