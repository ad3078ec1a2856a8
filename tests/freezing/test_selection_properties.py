"""What is true of every plan, on models of any shape: shares kept, each parameter once, nothing left to chance or to order."""

from dataclasses import replace
from fractions import Fraction
from math import floor, prod

from freezing.plans import count_groups, find_trained
from hypothesis import given
from hypothesis import strategies as st

from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import GROUPS, make_plan

POOLS = {
    "category": lambda unit: (unit.role, (unit.role, unit.layer), unit.name),
    "layer": lambda unit: ("layers", "layers", unit.layer),
    "model": lambda unit: ("model", "model", unit.name),
}  # the pool that keeps a share, the group that is divided, and what trains or is frozen as a whole


def make_unit(name: str, role: str, layer: int | None, size: int) -> Unit:
    """A matrix, and every other time a bias beside it."""
    shapes = ((size, 2), (size,))[: 1 + size % 2]
    return Unit(name, role, layer, tuple(Parameter(f"{name}.{place}", shape) for place, shape in enumerate(shapes)))


# In a layer, the sizes of the units of each role.
LAYERS = st.fixed_dictionaries(
    {
        role: st.lists(st.integers(1, 40), min_size=least, max_size=most)
        for role, least, most in (("attention", 0, 5), ("mlp", 1, 4), ("norm", 0, 3))
    }
)


@st.composite
def models(draw: st.DrawFn) -> tuple[Unit, ...]:
    """Up to five layers, no two of which need be alike, between embeddings, a norm and a head."""
    units = [make_unit("embedding", "embedding", None, 50)]
    for layer, roles in enumerate(draw(st.lists(LAYERS, min_size=1, max_size=5))):
        for role, sizes in roles.items():
            units += [make_unit(f"{layer}.{role}.{place}", role, layer, size) for place, size in enumerate(sizes)]
    return (*units, make_unit("norm", "final_norm", None, 9), make_unit("head", "head", None, 50))


RULES = st.builds(
    FreezeRule,
    group=st.sampled_from(sorted(GROUPS)),
    trainable_fraction=st.sampled_from([8, 1000]).flatmap(lambda parts: st.integers(1, parts).map(lambda part: part / parts)),
    seed=st.integers(0, 2**32),
    embeddings=st.sampled_from(["train", "freeze"]),
    head=st.sampled_from(["train", "freeze"]),
    balance=st.sampled_from(["units", "weights"]),
)
ROUNDS = st.integers(0, 20)


def weigh(units: list[Unit], rule: FreezeRule) -> int:
    """Items by number, or by the numbers of their weights."""
    if rule.balance == "units":
        return len({POOLS[rule.group](unit)[2] for unit in units})
    return sum(prod(parameter.shape) for unit in units for parameter in unit.parameters)


def collect(units: list[Unit], rule: FreezeRule, level: int) -> dict[object, list[Unit]]:
    """The units in the layers by pool, by group or by item."""
    found: dict[object, list[Unit]] = {}
    for unit in units:
        if unit.layer is not None:
            found.setdefault(POOLS[rule.group](unit)[level], []).append(unit)
    return found


@given(models(), RULES, ROUNDS)
def test_every_pool_trains_its_share(units: tuple[Unit, ...], rule: FreezeRule, index: int):
    """To half an item: by units that is the nearest number, the larger of two that are equally near."""
    trained = find_trained(units, make_plan(units, rule, index))
    share = Fraction(str(rule.trainable_fraction))
    for pool, members in collect(units, rule, 0).items():
        found, whole = weigh(collect(trained, rule, 0).get(pool, []), rule), weigh(members, rule)
        largest = max(weigh(item, rule) for item in collect(members, rule, 2).values())
        assert abs(found - share * whole) <= Fraction(largest, 2)
        if rule.balance == "units":
            assert found == floor(share * whole + Fraction(1, 2))


@given(models(), RULES, ROUNDS)
def test_every_group_trains_its_share_to_less_than_an_item(units: tuple[Unit, ...], rule: FreezeRule, index: int):
    trained = find_trained(units, make_plan(units, rule, index))
    share = Fraction(str(rule.trainable_fraction))
    for group, members in collect(units, rule, 1).items():
        found, whole = weigh(collect(trained, rule, 1).get(group, []), rule), weigh(members, rule)
        largest = max(weigh(item, rule) for item in collect(units, rule, 2).values())
        assert abs(found - share * whole) <= largest
        if rule.balance == "units":
            assert abs(found - share * whole) < 1


@given(models(), RULES, ROUNDS)
def test_every_parameter_is_in_the_plan_once_and_every_unit_whole(units: tuple[Unit, ...], rule: FreezeRule, index: int):
    plan = make_plan(units, rule, index)
    assert sorted(plan.trained + plan.frozen) == sorted(parameter.name for unit in units for parameter in unit.parameters)
    trained = find_trained(units, plan)
    assert plan.num_trainable == sum(unit.num_parameters for unit in trained)
    assert plan.num_trainable_units == sum(unit.layer is not None for unit in trained)
    if rule.group == "layer":
        inside = count_groups([unit for unit in units if unit.layer in {unit.layer for unit in trained} - {None}])
        assert count_groups([unit for unit in trained if unit.layer is not None]) == inside
    outside = {unit.role for unit in trained if unit.layer is None}
    assert outside == {"final_norm"} | {
        role for role, decision in (("embedding", rule.embeddings), ("head", rule.head)) if decision == "train"
    }


@given(models(), RULES, ROUNDS)
def test_the_same_seed_and_round_give_the_same_plan(units: tuple[Unit, ...], rule: FreezeRule, index: int):
    again = tuple(replace(unit, parameters=tuple(replace(value) for value in unit.parameters)) for unit in units)
    assert make_plan(units, rule, index) == make_plan(again, rule.model_copy(), index)


@given(st.data(), RULES, ROUNDS)
def test_the_order_of_the_parameters_decides_nothing(data: st.DataObject, rule: FreezeRule, index: int):
    units = data.draw(models())
    shuffled = tuple(data.draw(st.permutations(units)))
    assert set(make_plan(units, rule, index).trained) == set(make_plan(shuffled, rule, index).trained)


@given(models(), RULES, ROUNDS)
def test_the_whole_share_freezes_nothing(units: tuple[Unit, ...], rule: FreezeRule, index: int):
    rule = rule.model_copy(update={"trainable_fraction": 1.0, "embeddings": "train", "head": "train"})
    assert make_plan(units, rule, index).frozen == ()
