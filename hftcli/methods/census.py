"""What adapters of PEFT's add to a plan, for who looks before a round exists."""

from dataclasses import replace

from hftcli.freezing.budget import Budget
from hftcli.methods.ia3 import choose_scaled
from hftcli.methods.peft import choose_targets, narrow_to
from hftcli.methods.peft import count_adapters as count_peft
from hftcli.recipe.methods import MethodSection


def count_adapters(budget: Budget, method: MethodSection, path: str) -> Budget:
    """A budget with the adapters of `method.peft` or `method.ia3`, where a recipe has one of the two.

    Args:
        path: the start, of which the config is read.

    Raises:
        InputError: PEFT takes them not, or not over this model.
    """
    units, plan = budget.network.units, budget.plan
    if method.peft is not None:
        kind, given = method.peft.type, method.peft.extra
        targets = choose_targets(kind, given, plan, units)
    elif method.ia3 is not None:
        kind, given, targets = "IA3", {}, choose_scaled(plan, units)
    else:
        return budget
    adapters = count_peft(kind, given, targets, path)
    return replace(budget, plan=narrow_to(kind, given, targets, plan, units), adapters=adapters)
