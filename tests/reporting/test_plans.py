"""What is said of a plan that trains more or less than was asked for, or whose units are not ranked yet."""

import json
from dataclasses import replace

import pytest

from hftcli.freezing.activations import Network, Workload
from hftcli.freezing.budget import Budget
from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.reporting.plans import describe_imbalance, print_plan


def make_budget(sizes: tuple[int, int], rule: FreezeRule, num_layers: int = 4) -> Budget:
    """A model of layers with two attention matrices of these sizes, and nothing else in them."""
    units = [
        Unit(f"{layer}.{name}", "attention", layer, (Parameter(f"{layer}.{name}.weight", (size,)),))
        for layer in range(num_layers)
        for name, size in zip(("qkv", "o"), sizes, strict=True)
    ]
    network = Network("not counted", tuple(units), 1)
    return Budget(make_plan(units, rule, 0), "float32", 1, 0, network=network, work=Workload(1, 8))


def test_units_of_one_size_have_nothing_said():
    assert describe_imbalance(make_budget((100, 100), FreezeRule())) is None


def test_a_share_that_is_off_by_more_than_two_points_is_warned_of():
    budget = make_budget((300, 100), FreezeRule(), num_layers=16)
    share = sum(300 if "qkv" in name else 100 for name in budget.plan.trained) / 6400
    assert abs(share - 0.5) > 0.02  # or another seed is needed
    said, _, offered = describe_imbalance(budget).partition("; freeze.balance: weights would train ")
    assert said.startswith(f"warning: {share:.1%} of the weights in the layers train, and freeze.trainable_fraction asks for")
    assert abs(float(offered.removesuffix("%")) - 50) < 2
    assert describe_imbalance(make_budget((300, 100), FreezeRule(balance="weights"), num_layers=16)) is None


def test_where_no_choice_comes_closer_none_is_offered():
    """One layer of one matrix that is nine tenths of it."""
    said = describe_imbalance(make_budget((900, 100), FreezeRule(balance="weights"), num_layers=1))
    assert said.endswith("the units of a group are not of one size")


def test_what_methods_hold_is_a_row_and_what_is_not_counted_is_named(capsys: pytest.CaptureFixture[str]):
    plain = make_budget((100, 100), FreezeRule())
    print_plan(plain, None, is_left_to_device=False, as_json=False)
    assert "methods" not in capsys.readouterr().out
    budget = replace(plain, held_bytes=8, uncounted=("this", "that"))
    print_plan(budget, None, is_left_to_device=False, as_json=False)
    shown = capsys.readouterr().out
    assert "Not counted, and on top for a while: this; that." in shown
    assert ["0.500" in line for line in shown.splitlines() if "methods" in line] == [True]
    print_plan(budget, None, is_left_to_device=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["uncounted"] == ["this", "that"]
    assert [found["memory"][name]["methods_bytes"] for name in ("half", "full")] == [8 * 400, 8 * 800]


def test_a_draw_that_stands_in_for_scores_is_said(capsys: pytest.CaptureFixture[str]):
    budget = make_budget((100, 100), FreezeRule(rank="fisher"))
    print_plan(budget, None, is_left_to_device=True, as_json=False)
    shown = capsys.readouterr().out
    assert "train.bf16 is null: in bfloat16, as on GPUs; a processor without matrix units for it (AMX) computes in" in shown
    assert "freeze.rank: fisher: a round scores its start first; until then, a draw stands in" in shown
    print_plan(budget, None, is_left_to_device=True, as_json=True)
    assert json.loads(capsys.readouterr().out)["is_ranked"] is False
