"""The plan's file and its rule: read back the same, known by a fingerprint, refused where they are edited or bad."""

import hashlib
import json
from typing import get_args

import pytest
from freezing.families import CONFIGS, build_units
from pydantic import ValidationError

from hftcli.errors import ModelError
from hftcli.freezing.roles import Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import GROUPS, RANKINGS, FreezePlan, RoleCount, make_plan

SCORED = ("magnitude", "wanda", "fisher", "gradient", "spectrum")


def test_a_plan_survives_its_file(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(trainable_fraction=0.1), 4)
    assert FreezePlan.model_validate_json(plan.model_dump_json(indent=2)) == plan


def test_the_fingerprint_is_the_hash_of_the_rest(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(), 0)
    content = plan.model_dump(mode="json", exclude={"fingerprint"})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert plan.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert plan.short_fingerprint == plan.fingerprint[:12]


def test_the_fingerprint_changes_with_whatever_made_the_plan(llama: tuple[Unit, ...]):
    rules = [
        FreezeRule(),
        FreezeRule(seed=43),
        FreezeRule(group="layer"),
        FreezeRule(group="model"),
        FreezeRule(trainable_fraction=0.25),
        FreezeRule(embeddings="freeze"),
        FreezeRule(head="freeze"),
        FreezeRule(balance="weights"),
        FreezeRule(frozen_prefix=0.5),
    ]
    wider = build_units("llama", **CONFIGS["llama"] | {"intermediate_size": 48})
    plans = [make_plan(llama, rule, 0) for rule in rules]
    plans += [make_plan(llama, FreezeRule(), 1), make_plan(wider, FreezeRule(), 0)]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert make_plan(llama, FreezeRule(), 0).fingerprint == plans[0].fingerprint


def test_a_prefix_that_is_off_leaves_no_trace(llama: tuple[Unit, ...]):
    """Plans keep the fingerprints that they had before there was such a rule."""
    assert "frozen_prefix" not in make_plan(llama, FreezeRule(), 0).model_dump_json()
    assert make_plan(llama, FreezeRule(frozen_prefix=0.0), 0) == make_plan(llama, FreezeRule(), 0)
    plan = make_plan(llama, FreezeRule(frozen_prefix=0.5), 0)
    assert plan.fingerprint != make_plan(llama, FreezeRule(), 0).fingerprint
    assert FreezePlan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan["trained"].append(plan["frozen"].pop()),
        lambda plan: plan["trained"].reverse(),
        lambda plan: plan["rule"].update(seed=1),
        lambda plan: plan.update(num_trainable=1),
        lambda plan: plan.update(round_index=1),
        lambda plan: plan["roles"]["norm"].update(num_units=1),
        lambda plan: plan.update(fingerprint="0" * 64),
    ],
    ids=["names", "order", "rule", "count", "round", "role", "fingerprint"],
)
def test_an_edited_plan_is_refused(llama: tuple[Unit, ...], edit):
    content = json.loads(make_plan(llama, FreezeRule(), 0).model_dump_json())
    edit(content)
    with pytest.raises(ModelError, match="is not as it was written") as caught:
        FreezePlan.model_validate_json(json.dumps(content))
    assert "freeze_plan.json" in caught.value.fix


@pytest.mark.parametrize(
    "bad",
    [
        {"trainable_fraction": 0.0},
        {"trainable_fraction": 1.01},
        {"trainable_fraction": float("nan")},
        {"frozen_prefix": 1.0},
        {"group": "matrix"},
        {"rank": "size"},
        {"importance": {}},
        {"rank": "magnitude", "grain": "columns"},
        {"rank": "spectrum", "group": "model"},
        {"rank": "gradient", "importance": {"path": "rows.jsonl"}},
        {"rank": "spectrum", "importance": {"samples": 8}},
        {"embeddings": True},
        {"shares": 0.5},
    ],
    ids=str,
)
def test_a_bad_rule_is_refused(bad: dict):
    with pytest.raises(ValidationError):
        FreezeRule(**bad)


def test_every_choice_of_the_rule_has_its_row():
    assert set(get_args(FreezeRule.model_fields["rank"].annotation)) == {*RANKINGS, *SCORED}
    assert set(get_args(FreezeRule.model_fields["group"].annotation)) == set(GROUPS)


def test_every_field_is_documented():
    for kind in (FreezeRule, RoleCount, FreezePlan):
        assert all(field.description for field in kind.model_fields.values())
