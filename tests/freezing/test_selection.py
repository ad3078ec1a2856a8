"""What trains: halves are exact, new in every round, and the same in every process."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise
from math import ceil, floor

import pytest
from freezing.families import CONFIGS, NUM_LAYERS, QK_NORMS, UNITS_IN_A_LAYER, build_units, count_in_layer
from freezing.plans import count_groups, find_trained

from hftcli.errors import ModelError
from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import GROUPS, RoleCount, complete_plan, find_closest, make_plan

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
LLAMA_2_13B = LLAMA_2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
LLAMA_3_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}


@pytest.fixture(scope="module")
def llama_3_8b() -> tuple[Unit, ...]:
    return build_units("llama", **LLAMA_3_8B)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "olmo2", "olmo3", "qwen3_moe"])
def test_norms_of_queries_and_keys_do_not_take_the_place_of_the_blocks_own(model_type: str):
    """Of a block's two norms one trains in every layer, as in the paper, and one of the other two."""
    units = build_units(model_type, **CONFIGS[model_type])
    for round_index in range(8):
        trained = find_trained(units, make_plan(units, FreezeRule(), round_index))
        for layer in range(NUM_LAYERS):
            names = [unit.name for unit in trained if unit.role == "norm" and unit.layer == layer]
            assert sum("self_attn" in name for name in names) == 1
            assert sum("layernorm" in name for name in names) == (UNITS_IN_A_LAYER[model_type]["norm"] - 2) / 2


def round_half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


# The method


@pytest.mark.parametrize("fraction", ["0.5", "0.25", "0.75", "0.3", "1.0"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_group_of_every_family_has_its_share(model_type: str, is_tied: bool, fraction: str):
    units = build_units(model_type, **CONFIGS[model_type], tie_word_embeddings=is_tied)
    share = Fraction(fraction)
    plan = make_plan(units, FreezeRule(trainable_fraction=float(fraction)), 0)

    trained = Counter((unit.category, unit.layer) for unit in find_trained(units, plan))
    sizes = {}
    for layer in range(NUM_LAYERS):
        sizes |= {(role, layer): number for role, number in count_in_layer(model_type, layer).items()}
        if num_norms := QK_NORMS.get(model_type, [0] * NUM_LAYERS)[layer]:
            sizes["norm", layer] -= num_norms
            sizes["qk_norm", layer] = num_norms
    for group, num_units in sizes.items():
        assert floor(share * num_units) <= trained[group] <= ceil(share * num_units)
    for category in {category for category, _ in sizes}:
        num_units, num_trained = (sum(found[place] for place in sizes if place[0] == category) for found in (sizes, trained))
        assert num_trained == round_half_up(share * num_units)
    for role in {unit.role for unit in units if unit.layer is None}:
        assert plan.roles[role].num_trainable == plan.roles[role].num_parameters


@pytest.mark.parametrize(
    ("config", "num_parameters", "num_units", "num_trainable", "percent"),
    [
        (LLAMA_2_7B, 6_738_415_616, 288, 3_500_281_856, 51.9),
        (LLAMA_2_13B, 13_015_864_320, 360, 6_671_774_720, 51.3),
    ],
    ids=["7B", "13B"],
)
def test_the_numbers_of_the_paper(
    config: dict[str, int], num_parameters: int, num_units: int, num_trainable: int, percent: float
):
    units = build_units("llama", **config)
    plan = make_plan(units, FreezeRule(), 0)

    assert plan.num_parameters == num_parameters
    assert plan.num_units == num_units
    assert plan.num_trainable_units == num_units // 2
    assert plan.num_trainable == num_trainable
    assert round(100 * plan.trainable_fraction, 1) == percent
    trained = count_groups(find_trained(units, plan))
    num_layers = config["num_hidden_layers"]
    assert {trained["attention", layer] for layer in range(num_layers)} == {2}
    assert {trained["norm", layer] for layer in range(num_layers)} == {1}
    mlp = Counter(trained["mlp", layer] for layer in range(num_layers))
    assert mlp == {2: num_layers // 2, 1: num_layers // 2}


def test_full_fine_tuning_is_the_share_1(llama: tuple[Unit, ...]):
    for group in GROUPS:
        plan = make_plan(llama, FreezeRule(group=group, trainable_fraction=1.0), 0)
        assert plan.frozen == ()
        assert plan.trainable_fraction == 1.0


def test_trained_and_frozen_are_the_model_in_order(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(), 0)
    names = [parameter.name for unit in llama for parameter in unit.parameters]
    assert sorted([*plan.trained, *plan.frozen]) == sorted(names)
    assert list(plan.trained) == [name for name in names if name in plan.trained]
    assert list(plan.frozen) == [name for name in names if name in plan.frozen]
    assert list(plan.roles) == ["embedding", "attention", "mlp", "norm", "final_norm", "head"]
    assert sum(count.num_parameters for count in plan.roles.values()) == plan.num_parameters
    assert sum(count.num_trainable for count in plan.roles.values()) == plan.num_trainable


# The other groups


@pytest.mark.parametrize(("fraction", "num_trained"), [(0.5, 3), (0.25, 1), (0.75, 4), (0.1, 1)])
def test_whole_layers(llama: tuple[Unit, ...], fraction: float, num_trained: int):
    plan = make_plan(llama, FreezeRule(group="layer", trainable_fraction=fraction), 0)
    trained = count_groups([unit for unit in find_trained(llama, plan) if unit.layer is not None])
    layers = {layer for _, layer in trained}
    assert len(layers) == num_trained
    assert all(trained[role, layer] == UNITS_IN_A_LAYER["llama"][role] for role, layer in trained)


def test_the_whole_model(llama: tuple[Unit, ...]):
    plans = [make_plan(llama, FreezeRule(group="model"), index) for index in range(20)]
    assert {plan.num_trainable_units for plan in plans} == {23}  # of 45
    assert len({plan.roles["attention"].num_trainable_units for plan in plans}) > 1


def test_whole_layers_by_weight():
    """Layers of 1, 2, 3 and 4 weights: whatever the order, the half is missed by no more than half of the largest."""
    units = [
        Unit(f"model.layers.{layer}.mlp.up_proj", "mlp", layer, (Parameter(f"up.{layer}", (layer + 1,)),)) for layer in range(4)
    ]
    for index in range(30):
        plan = make_plan(units, FreezeRule(group="layer", balance="weights"), index)
        assert abs(plan.num_trainable - 5) <= 2


# Balance


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_balance_by_weights_meets_the_share(llama_3_8b: tuple[Unit, ...], seed: int, fraction: float):
    rule = FreezeRule(balance="weights", seed=seed, trainable_fraction=fraction)
    plan = make_plan(llama_3_8b, rule, 0)
    for role in ("attention", "mlp", "norm"):
        largest = max(unit.num_parameters for unit in llama_3_8b if unit.role == role)
        count = plan.roles[role]
        assert abs(count.num_trainable - fraction * count.num_parameters) <= largest / 2


def test_balance_by_units_may_miss_the_share_in_weights(llama_3_8b: tuple[Unit, ...]):
    misses = []
    for seed in range(5):
        count = make_plan(llama_3_8b, FreezeRule(seed=seed), 0).roles["attention"]
        assert count.num_trainable_units == 64
        misses.append(abs(count.num_trainable / count.num_parameters - 0.5))
    assert max(misses) > 4096 * 4096 / count.num_parameters


def test_of_two_equally_close_totals_the_larger_is_taken():
    assert find_closest([0, 1, 2, 3], Fraction(3, 2)) == 2
    assert find_closest([0, 1, 2, 3], Fraction(149, 100)) == 1
    assert find_closest([4, 5], Fraction(0)) == 0
    assert find_closest([0, 4, 5], Fraction(100)) == 2


# The draw


def test_the_draw_is_the_hash_of_seed_round_and_name(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(seed=7), 3)
    for layer in range(NUM_LAYERS):
        names = [unit.name for unit in llama if (unit.role, unit.layer) == ("attention", layer)]
        first, second, *_ = sorted(names, key=lambda name: hashlib.sha256(f"7/3/{name}".encode()).hexdigest())
        assert {f"{first}.weight", f"{second}.weight"} == {
            name for name in plan.trained if name.startswith(f"model.layers.{layer}.self_attn.")
        }


def test_every_round_and_every_seed_draws_another_half(llama: tuple[Unit, ...]):
    halves = [make_plan(llama, FreezeRule(seed=seed), index).trained for seed in (1, 2, 11) for index in (0, 1, 11)]
    assert len(set(halves)) == len(halves)


def test_the_same_half_whatever_the_order_of_the_units(llama: tuple[Unit, ...]):
    for group in GROUPS:
        plan = make_plan(llama, FreezeRule(group=group), 5)
        other = make_plan(llama[::-1], FreezeRule(group=group), 5)
        assert set(plan.trained) == set(other.trained)
        # An optimizer restores its state by position, so another order is another plan.
        assert plan.fingerprint != other.fingerprint


def test_the_same_plan_in_every_process(llama: tuple[Unit, ...]):
    code = (
        "import sys\n"
        "from hftcli.freezing.roles import Parameter, assign_roles\n"
        "from hftcli.freezing.rule import FreezeRule\n"
        "from hftcli.freezing.selection import make_plan\n"
        f"units = assign_roles('llama', {[parameter for unit in llama for parameter in unit.parameters]})\n"
        "print(make_plan(units, FreezeRule(), 2).model_dump_json())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    expected = make_plan(llama, FreezeRule(), 2).model_dump_json() + "\n"
    assert outputs == [expected, expected]


def test_every_unit_trains_in_about_half_of_the_rounds():
    num_rounds = 400
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 4})
    inside = [unit for unit in units if unit.layer is not None]
    draws = [{unit.name for unit in find_trained(units, make_plan(units, FreezeRule(), i))} for i in range(num_rounds)]

    counts = Counter(name for draw in draws for name in draw)
    deviations = [(counts[unit.name] - num_rounds / 2) / (num_rounds / 4) ** 0.5 for unit in inside]
    assert max(abs(deviation) for deviation in deviations) < 4
    assert sum(deviation**2 for deviation in deviations) < 2 * len(inside)

    # All six pairs of attention matrices are equally likely, and one round says nothing about the next.
    attention = [unit.name for unit in inside if (unit.role, unit.layer) == ("attention", 2)]
    pairs = Counter(tuple(name for name in attention if name in draw) for draw in draws)
    assert set(pairs) == set(combinations(attention, 2))
    assert sum((count - num_rounds / 6) ** 2 / (num_rounds / 6) for count in pairs.values()) < 20.5  # p = 0.001, 5 d.o.f.
    names = {unit.name for unit in inside}
    repeats = [len(before & after & names) / 18 for before, after in pairwise(draws)]
    assert abs(sum(repeats) / len(repeats) - 0.5) < 0.02


def test_the_layers_that_train_two_of_three_change_with_the_round():
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 4})
    twos = Counter()
    for index in range(200):
        trained = count_groups(find_trained(units, make_plan(units, FreezeRule(), index)))
        twos.update(layer for layer in range(4) if trained["mlp", layer] == 2)
    assert sum(twos.values()) == 400
    assert all(70 < twos[layer] < 130 for layer in range(4))  # 100 expected, standard deviation 7


# Outside the layers


def test_embeddings_and_head_follow_the_rule(llama: tuple[Unit, ...]):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    for embeddings, head_rule, frozen in [
        ("train", "train", set()),
        ("freeze", "train", {embedding}),
        ("train", "freeze", {head}),
        ("freeze", "freeze", {embedding, head}),
    ]:
        plan = make_plan(llama, FreezeRule(embeddings=embeddings, head=head_rule), 0)
        assert {embedding, head} & set(plan.frozen) == frozen
        assert "model.norm.weight" in plan.trained


def test_tied_embeddings_and_head_are_set_alike():
    units = build_units("gpt2", **CONFIGS["gpt2"], tie_word_embeddings=True)
    for embeddings, head in [("freeze", "train"), ("train", "freeze")]:
        with pytest.raises(ModelError, match="embeddings and head are one tensor in this model") as caught:
            make_plan(units, FreezeRule(embeddings=embeddings, head=head), 0)
        assert "alike" in caught.value.fix
    plan = make_plan(units, FreezeRule(embeddings="freeze", head="freeze"), 0)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= set(plan.frozen)
    assert plan.roles["embedding"] == RoleCount(
        num_units=2, num_trainable_units=0, num_parameters=plan.roles["embedding"].num_parameters, num_trainable=0
    )


def test_a_role_may_have_nothing_that_trains_but_a_plan_may_not(llama: tuple[Unit, ...]):
    rule = FreezeRule(trainable_fraction=0.001, embeddings="freeze", head="freeze")
    assert make_plan(llama, rule, 0).trained == ("model.norm.weight",)
    inside = [unit for unit in llama if unit.layer is not None]
    with pytest.raises(ModelError, match=r"nothing would train with freeze.trainable_fraction 0.001"):
        make_plan(inside, rule, 0)


# A frozen prefix


@pytest.mark.parametrize("group", ["category", "layer", "model"])
@pytest.mark.parametrize("balance", ["units", "weights"])
def test_a_frozen_prefix_keeps_the_share(group: str, balance: str):
    """A quarter of 8 layers and the embeddings are frozen whole; above them, two thirds train: half of all."""
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 8})
    plan = make_plan(units, FreezeRule(group=group, balance=balance, frozen_prefix=0.25), 0)
    trained = find_trained(units, plan)
    assert min(unit.layer for unit in trained if unit.layer is not None) == 2
    assert {unit.role for unit in trained if unit.layer is None} == {"final_norm", "head"}
    inside = [unit for unit in units if unit.layer is not None]
    if balance == "units":
        assert plan.num_trainable_units == plan.num_units // 2
    share = sum(unit.num_parameters for unit in trained if unit.layer is not None) / sum(u.num_parameters for u in inside)
    assert share == pytest.approx(0.5, abs=0.05)


def test_a_frozen_prefix_above_half_trains_all_that_is_left():
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 8})
    trained = find_trained(units, make_plan(units, FreezeRule(frozen_prefix=0.75), 0))
    assert [unit for unit in trained if unit.layer is not None] == [unit for unit in units if (unit.layer or 0) >= 6]


def test_a_prefix_that_does_not_go_is_refused(llama: tuple[Unit, ...]):
    for share in (0.01, 0.99):
        with pytest.raises(ModelError, match="it must freeze one or more and leave one or more"):
            make_plan(llama, FreezeRule(frozen_prefix=share), 0)
    tied = build_units("llama", **CONFIGS["llama"] | {"tie_word_embeddings": True})
    with pytest.raises(ModelError, match="embeddings and head are one tensor") as caught:
        make_plan(tied, FreezeRule(frozen_prefix=0.5), 0)
    assert caught.value.fix == "set freeze.head: freeze"
    assert make_plan(tied, FreezeRule(frozen_prefix=0.5, head="freeze"), 0).frozen[0] == "model.embed_tokens.weight"


@pytest.mark.parametrize("freezes", ["most", "least"])
def test_what_matters_most_or_least_is_frozen(llama: tuple[Unit, ...], freezes: str):
    inside = [unit for unit in llama if unit.layer is not None and unit.role != "norm"]
    scores = {unit.name: float(place * 7 % 11) for place, unit in enumerate(inside)}
    rule = FreezeRule.model_validate({"rank": "wanda", "importance": {"freezes": freezes, "path": "rows.jsonl"}})
    plan = make_plan(llama, rule, 3, scores=scores)
    trained = find_trained(llama, plan)
    for group in {(unit.category, unit.layer) for unit in inside}:
        units = [unit for unit in inside if (unit.category, unit.layer) == group]
        train = [scores[unit.name] for unit in units if unit in trained]
        frozen = [scores[unit.name] for unit in units if unit not in trained]
        assert max(train) <= min(frozen) if freezes == "most" else min(train) >= max(frozen)
    # Norms have no score here, and are drawn as they are without one.
    norms = [unit for unit in llama if unit.role == "norm"]
    drawn = find_trained(llama, make_plan(llama, FreezeRule(), 3))
    assert [unit in trained for unit in norms] == [unit in drawn for unit in norms]
    assert "rows.jsonl" not in plan.model_dump_json()  # what it holds is in the scores, wherever it lies


def test_a_draw_stands_in_until_there_are_scores(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(rank="magnitude"), 0)
    assert plan.trained == make_plan(llama, FreezeRule(), 0).trained
    assert not plan.is_ranked
    scored = complete_plan(make_plan(llama, FreezeRule(rank="magnitude"), 0, scores={}), importance="a")
    assert scored.is_ranked
    assert scored.fingerprint not in (plan.fingerprint, complete_plan(plan, importance="b").fingerprint)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_wanda_has_to_know_what_is_read(family: str):
    units = build_units(family, **CONFIGS[family])
    with pytest.raises(ModelError, match="freeze.rank: wanda does not know what"):
        make_plan(units, FreezeRule(rank="wanda"), 0)
    make_plan(units, FreezeRule(rank="fisher"), 0)
