"""What of a model trains under a plan, counted by role."""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from hftcli.freezing.directions import Part
from hftcli.freezing.roles import OUTSIDE_ROLES, Unit


class RoleCount(BaseModel):
    """What one role has in a model, and what of it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_units: int
    """Units of the role."""

    num_trainable_units: int
    """Those of them that train."""

    num_parameters: int
    """Weights of the role."""

    num_trainable: int
    """Those of them that train."""


def measure_layer_share(roles: Mapping[str, RoleCount]) -> float:
    """The share of the weights in the layers that trains, of counts by role."""
    inside = [count for role, count in roles.items() if role not in OUTSIDE_ROLES]
    return sum(count.num_trainable for count in inside) / sum(count.num_parameters for count in inside)


def count_trained(units: Iterable[Unit], trained: set[str], parts: dict[str, Part]) -> int:
    """Weights of these units that train."""
    parameters = [parameter for unit in units for parameter in unit.parameters if parameter.name in trained]
    return sum(parts[item.name].num_trainable if item.name in parts else item.num_elements for item in parameters)


def count_trained_units(units: Iterable[Unit], trained: set[str]) -> int:
    """Units of which something trains."""
    return sum(any(parameter.name in trained for parameter in unit.parameters) for unit in units)


def count_roles(units: Iterable[Unit], trained: set[str], parts: dict[str, Part]) -> dict[str, RoleCount]:
    """Counts by role, in the order in which the model first has them."""
    members: dict[str, list[Unit]] = {}
    for unit in units:
        members.setdefault(unit.role, []).append(unit)
    return {
        role: RoleCount(
            num_units=len(group),
            num_trainable_units=count_trained_units(group, trained),
            num_parameters=sum(unit.num_parameters for unit in group),
            num_trainable=count_trained(group, trained, parts),
        )
        for role, group in members.items()
    }
