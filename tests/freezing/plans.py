"""What a plan trains, in units."""

from collections import Counter

from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan


def find_trained(units: tuple[Unit, ...], plan: FreezePlan) -> list[Unit]:
    """The units that train; none may train in part."""
    names = set(plan.trained)
    for unit in units:
        assert len({parameter.name in names for parameter in unit.parameters}) == 1
    return [unit for unit in units if unit.parameters[0].name in names]


def count_groups(units: list[Unit]) -> Counter[tuple[str, int | None]]:
    return Counter((unit.role, unit.layer) for unit in units)
