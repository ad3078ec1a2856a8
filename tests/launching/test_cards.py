"""Which cards carry which models: bytes by hand, and the smallest number of cards by trying them all."""

from dataclasses import replace
from pathlib import Path

import pytest

from hftcli.freezing.activations import Adapters, Workload
from hftcli.freezing.budget import Budget
from hftcli.freezing.narrowing import narrow_plan
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.cards import AS_GIVEN, CHECKPOINTED, OFFLOADED, judge_cards, list_ways, make_full

ROOT = Path(__file__).parents[2]
WORK = Workload(1, 2048, attention="flash", arithmetic="autocast")
# The number of weights that each model's page gives.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-2-7B": 6_738_415_616,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-2-13B": 13_015_864_320,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-72B": 72_706_203_648,
}


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from gpu import plans

    return plans


def count_trained(budget: Budget, shape: tuple[int, ...]) -> int:
    """The weights that a plan's names stand for, by the config's sizes alone."""
    hidden, inner, _, num_heads, num_kv_heads, vocabulary, _ = shape
    keys = hidden * num_kv_heads // num_heads
    sizes = {"q_proj": hidden**2, "o_proj": hidden**2, "k_proj": hidden * keys, "v_proj": hidden * keys}
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden * inner)
    sizes |= dict.fromkeys(("embed_tokens", "lm_head"), hidden * vocabulary)
    sizes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), hidden)
    return sum(sizes[name.split(".")[-2]] for name in budget.plan.trained)


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_well_known_models_by_hand(plans, name):
    """Weights, gradients and states of full and half fine-tuning within 1 %, on one card, on eight, and on the host."""
    budget = plans.make_setting(name, "half", WORK).budget
    num_all, num_half = PUBLISHED[name], count_trained(budget, plans.MODELS[name])
    assert 0.4 < num_half / num_all < 0.8
    full, half = budget.full, budget.half
    assert [full.weights_bytes, full.gradients_bytes, full.optimizer_bytes] == pytest.approx(
        [4 * num_all, 4 * num_all, 8 * num_all], rel=0.01
    )
    assert [half.weights_bytes, half.gradients_bytes, half.optimizer_bytes] == pytest.approx(
        [2 * num_all + 2 * num_half, 4 * num_half, 8 * num_half], rel=0.01
    )
    eight = replace(budget, num_processes=8, zero_stage=3).half
    assert [eight.weights_bytes, eight.gradients_bytes, eight.optimizer_bytes] == pytest.approx(
        [2 * num_all / 8, 4 * num_half / 8, 12 * num_half / 8], rel=0.01
    )
    offloaded = dict(list_ways(budget))[OFFLOADED]
    assert offloaded.half.weights_bytes == pytest.approx(2 * num_all, rel=0.01)
    assert offloaded.half.gradients_bytes == offloaded.half.optimizer_bytes == 0
    assert offloaded.host.host_bytes == pytest.approx(18 * num_half, rel=0.01)


def test_the_verdict_on_a_7b_model(plans):
    """Half by itself on 80 GB, with its optimizer on the host on 16; full on no card of 80 GB without that."""
    budget = plans.make_setting("Llama-2-7B", "half", WORK).budget
    cards = {verdict.card_gb: verdict for verdict in judge_cards(budget)}
    assert [cards[size].setting for size in (16, 24, 48, 80, 141)] == [OFFLOADED] * 3 + [CHECKPOINTED, AS_GIVEN]
    assert [cards[size].full_setting for size in (48, 80, 141)] == [OFFLOADED, OFFLOADED, AS_GIVEN]
    assert cards[80].words == (
        "fits on one 80 GB card, checkpointed, one row at a time: 70.6 of 80 GB; full fine-tuning takes 2 cards at ZeRO 3, or "
        "one with offloading and 121 GB of the host's"
    )
    large = {verdict.card_gb: verdict for verdict in judge_cards(plans.make_setting("Llama-3.1-70B", "half", WORK).budget)}
    assert (large[80].setting, large[80].num_full_cards) == (None, 19)
    assert large[80].words.startswith("does not fit on one 80 GB card: 149.0 GB at the least")


def test_full_fine_tuning_is_the_same_beside_every_grain(plans):
    whole = make_full(plans.make_setting("Llama-2-7B", "half", WORK).budget)
    for grain in ("entries", "columns", "directions"):
        plan = make_plan(whole.network.units, FreezeRule(grain=grain), 0)
        assert make_full(replace(whole, plan=plan)).half.total_bytes == whole.half.total_bytes


def test_the_smallest_number_of_cards_is_the_first_that_fits(plans):
    budget = plans.make_setting("Llama-3.1-8B", "half", WORK).budget
    full = replace(make_full(budget), work=replace(WORK, checkpoint_every=1))
    for verdict in judge_cards(budget)[1:]:
        sizes = [
            replace(full, num_processes=count, zero_stage=3, work=replace(full.work, arithmetic="bfloat16")).half.total_bytes
            for count in range(2, 16)
        ]
        first = next(count for count, size in enumerate(sizes, 2) if size <= 1e9 * verdict.card_gb)
        alone = full.half.total_bytes <= 1e9 * verdict.card_gb
        assert verdict.num_full_cards == (1 if alone else first)


def test_adapters_are_counted_and_the_weights_that_they_stand_for_are_not(plans):
    """Rank 8 on all matrices of Llama-2-7B's layers: 19,988,480 weights, 16 bytes each, beside a model in bfloat16."""
    full = plans.make_setting("Llama-2-7B", "full", WORK).budget
    plan = narrow_plan(full.plan, full.network.units, None)
    budget = replace(full, plan=plan, adapters=Adapters(8))
    assert budget.num_adapter_weights == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 19_988_480
    assert budget.half.weights_bytes == 2 * 6_738_415_616 + 4 * 19_988_480
    assert (budget.half.gradients_bytes, budget.half.optimizer_bytes) == (4 * 19_988_480, 8 * 19_988_480)
    dropped = replace(budget, adapters=Adapters(8, has_dropout=True))
    # A byte for each of a layer's inputs, of which the first layer's first three have no gradient, and so no mask to keep.
    inputs = 32 * (6 * 4096 + 11008) - 3 * 4096
    assert dropped.half.activations_bytes - budget.half.activations_bytes == 2048 * inputs
