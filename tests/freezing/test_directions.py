"""Directions and columns in plans: what is counted of them, what they cost beside what autograd keeps, and what is refused."""

from pathlib import Path

import pytest
from freezing.families import CONFIGS, build_units
from pydantic import ValidationError

from hftcli import PACKAGE
from hftcli.doctor.disk import count_earlier_bytes
from hftcli.errors import ModelError
from hftcli.freezing.activations import Network, Workload
from hftcli.freezing.budget import Budget
from hftcli.freezing.counts import measure_layer_share
from hftcli.freezing.roles import Unit, assign_roles
from hftcli.freezing.rule import QUIET, FreezeRule
from hftcli.freezing.selection import FreezePlan, complete_plan, make_plan
from hftcli.models.description import describe_model
from hftcli.reporting.plans import describe_imbalance
from hftcli.training.probe import make_random_model, measure_steps

EMBEDDED = PACKAGE / "tinyworld" / "model"
EVERYWHERE, COLUMNS = FreezeRule(grain="directions"), FreezeRule(grain="columns")
# Turned matrices, experts, and layers that are no attention or mlp.
UNREAD = (
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "llama4_text",
    "gemma3n_text",
    "gpt_oss",
    "falcon_h1",
    "mamba2",
)
LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def make_budget(network: Network, rule: FreezeRule, work: Workload, precision: str = "float32") -> Budget:
    plan = make_plan(network.units, rule, 0, network.num_heads)
    return Budget(plan, precision, 1, 0, network, work, on_gpu=False)


def read_network(folder: Path) -> Network:
    described = describe_model(str(folder))
    return Network(described.model_type, assign_roles(described.model_type, described.parameters), described.num_heads)


RULES = {
    "everywhere": EVERYWHERE,
    "quiet": FreezeRule.model_validate("quiet"),
    "columns": COLUMNS,
    "quiet columns": COLUMNS.model_copy(update={"part": "quiet"}),
    "entries": FreezeRule(grain="entries"),
    "moving entries": FreezeRule(grain="entries", part="spiel", trainable_fraction=0.4),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("arithmetic", ["float32", "autocast"])
def test_what_parts_hold_is_what_was_planned(rule: FreezeRule, arithmetic: str):
    work = Workload(2, 96, arithmetic=arithmetic)
    budget = make_budget(read_network(EMBEDDED), rule, work, "mixed" if arithmetic == "autocast" else "float32")
    measured = measure_steps(make_random_model(str(EMBEDDED), None), budget.plan, work)
    half, full = budget.half, budget.full
    assert measured.weights_bytes == half.weights_bytes
    assert measured.gradients_bytes == half.gradients_bytes
    assert measured.optimizer_bytes == half.optimizer_bytes
    activations, _ = budget.half_step
    assert activations.saved_bytes + activations.cast_bytes == pytest.approx(measured.activations_bytes, rel=0.02)
    if rule.grain != "entries":  # which keep whole inputs
        assert activations.saved_bytes < 0.95 * budget.full_step[0].saved_bytes
    assert half.gradients_bytes < 0.6 * full.gradients_bytes
    frozen = rule.model_copy(update={"embeddings": "freeze", "head": "freeze"})
    whole = FreezeRule(trainable_fraction=1.0, embeddings="freeze", head="freeze")
    inside, all_inside = (make_budget(budget.network, own, work, budget.precision).half for own in (frozen, whole))
    assert inside.gradients_bytes <= 0.53 * all_inside.gradients_bytes
    assert inside.optimizer_bytes <= 0.53 * all_inside.optimizer_bytes


def test_flops_of_a_layer_beside_full_fine_tuning():
    """By hand: 3 units a matrix for full; 2, the gradient's share, and x V once for each input."""
    units = build_units("llama", **LLAMA_7B)
    network, work = Network("llama", units, 32), Workload(1, 1, attention="flash")
    hidden, inner = 4096, 11008
    square, wide = hidden * hidden, hidden * inner
    whole = 3 * (4 * square + 3 * wide)
    half_basis = 0.5 * (hidden * hidden) * 3 + 0.5 * inner * inner
    in_blocks = 0.5 * hidden * hidden * 2 + 0.5 * hidden * 128 + 0.5 * inner * 32
    found = {
        "everywhere": (EVERYWHERE, 2.5 * (4 * square + 3 * wide) + half_basis),
        "blocks": (FreezeRule(grain="directions", blocks=32), 2.5 * (4 * square + 3 * wide) + in_blocks),
        "columns": (COLUMNS, 2.5 * (4 * square + 3 * wide)),
        "entries": (FreezeRule(grain="entries", trainable_fraction=0.05), whole),
    }
    frozen = FreezeRule(embeddings="freeze", head="freeze")
    base = make_budget(network, FreezeRule(trainable_fraction=1.0, embeddings="freeze", head="freeze"), work).half_step[1]
    for name, (rule, expected) in found.items():
        rule = rule.model_copy(update={"embeddings": "freeze", "head": "freeze"})
        flops = make_budget(network, rule, work).half_step[1]
        saved = (base.weight_gradient + base.forward - flops.weight_gradient - flops.forward) / (2 * 32)
        assert saved == pytest.approx(whole - expected, rel=1e-6), name
    shares = [expected / whole for _, expected in found.values()]
    assert shares == pytest.approx([0.975, 0.86, 0.833, 1], abs=0.005)
    half, quiet = (make_budget(network, rule, work).half_step[1] for rule in (frozen, frozen.model_copy(update=dict(QUIET))))
    assert quiet.weight_gradient + quiet.forward < half.weight_gradient + half.forward


def test_the_plan_says_what_was_asked_for_and_the_disk_what_is_left():
    network = read_network(EMBEDDED)
    budget = make_budget(network, FreezeRule.model_validate("quiet"), Workload(1, 8))
    assert describe_imbalance(budget) is None  # a quarter was asked for
    # 6 layers, all of whose attention and mlp inputs have a reader that trains: whole, 128 wide; blocks of 32 in the others.
    spaces = {parts.input.rpartition(".")[2]: 0 for parts in budget.plan.directions.values()}
    for name in {parts.input for parts in budget.plan.directions.values()}:
        spaces[name.rpartition(".")[2]] += 1
    width = {"attention": 128 * (128 + 64), "mlp": 128 * (128 + 64), "heads": 4 * 32 * (32 + 16), "inner": 7 * 32 * (32 + 16)}
    assert count_earlier_bytes(budget.plan) == 4 * sum(number * width[kind] for kind, number in spaces.items())
    assert count_earlier_bytes(make_plan(network.units, FreezeRule(), 0)) == 0
    # For each of the 6 layers: the moments of four inputs, and the half of seven matrices' columns.
    columns = 4 * (128 + 128 + 128 + 224) + 8 * (6 * 128 + 224) // 2
    assert count_earlier_bytes(make_plan(network.units, COLUMNS, 0)) == 6 * columns
    # A place in 32 bits for half of the entries of four square matrices and three wide ones.
    entries = make_plan(network.units, FreezeRule(grain="entries"), 0)
    assert count_earlier_bytes(entries) == 6 * 4 * (4 * 128 * 128 + 3 * 128 * 224) // 2


def test_shares_of_the_input_space(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(grain="directions", trainable_fraction=0.25), 0, 2)
    half = make_plan(llama, FreezeRule(trainable_fraction=0.25), 0)
    for name, parts in plan.directions.items():
        assert parts.num_blocks == 1
        assert parts.num_open == round(0.25 * parts.width), name
    matrices = {unit.parameters[0].name for unit in llama if unit.role in ("attention", "mlp")}
    assert plan.directions.keys() == matrices
    assert set(plan.trained) == matrices | set(half.trained)  # norms as the paper's draw has them
    inside = make_plan(llama, FreezeRule(grain=("matrices", "directions")), 0, 2)
    paper = make_plan(llama, FreezeRule(), 0)
    assert inside.trained == paper.trained
    assert inside.directions.keys() == matrices & set(paper.trained)


def test_columns_of_a_matrix_are_its_own_unless_its_input_chooses(llama: tuple[Unit, ...]):
    own, shared = (
        make_plan(llama, FreezeRule(grain="columns", part=part, trainable_fraction=0.25), 0, 2) for part in ("ssu", "quiet")
    )
    matrices = {unit.parameters[0].name: unit.parameters[0].shape for unit in llama if unit.role in ("attention", "mlp")}
    assert own.columns.keys() == shared.columns.keys() == matrices.keys()
    for name, part in own.columns.items():
        assert (part.num_outputs, part.num_inputs) == matrices[name]
        assert part.num_columns == round(0.25 * part.num_inputs)
        assert part.choice == name
        assert part.is_kept_whole == (name.split(".")[-2] not in ("o_proj", "down_proj"))
        assert shared.columns[name].choice == part.input
        assert shared.columns[name].num_kept == part.num_columns
    assert own.directions is None
    assert own.fingerprint != shared.fingerprint
    assert FreezePlan.model_validate_json(own.model_dump_json()) == own


def test_blocks_are_heads_and_neighbours(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule(grain="directions", blocks=4), 0, 2)
    width = {name.split(".")[-2]: (parts.num_blocks, parts.width) for name, parts in plan.directions.items()}
    shapes = {unit.name.rpartition(".")[2]: unit.parameters[0].shape for unit in llama if unit.layer == 0}
    assert width["q_proj"] == (1, shapes["q_proj"][1])
    assert width["o_proj"] == (2, shapes["o_proj"][1] // 2)
    assert width["down_proj"] == (shapes["down_proj"][1] // 4, 4)


def test_a_grain_of_matrices_leaves_no_trace(llama: tuple[Unit, ...]):
    """Plans keep the fingerprints that they had before there was another grain."""
    text = make_plan(llama, FreezeRule(), 0).model_dump_json()
    assert not any(name in text for name in ("grain", "directions", "columns", "part", "blocks", "keep", "moments", "bases"))
    assert make_plan(llama, FreezeRule(grain="matrices"), 0) == make_plan(llama, FreezeRule(), 0)


def test_the_fingerprint_covers_moments_and_directions(llama: tuple[Unit, ...]):
    plan = make_plan(llama, FreezeRule.model_validate({"grain": "directions", "keep": {"path": "rows.jsonl"}}), 0, 2)
    assert "rows.jsonl" not in plan.model_dump_json()  # what it holds is in the moments, wherever it lies
    plans = [plan, *(complete_plan(plan, moments=one, bases=two) for one, two in ("ab", "cb", "ac"))]
    assert len({found.fingerprint for found in plans}) == 4
    for found in plans:
        assert FreezePlan.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ModelError, match="not as it was written"):
        FreezePlan(**dict(plans[1]) | {"moments": "d"})


@pytest.mark.parametrize("family", UNREAD)
def test_what_cannot_be_read_is_refused(family: str):
    units = build_units(family, **CONFIGS[family])
    with pytest.raises(ModelError, match="does not know what .* reads") as caught:
        make_plan(units, FreezeRule.model_validate("quiet"), 0, 2)
    assert caught.value.fix == "set freeze.grain: matrices, and no method.lora.quiet"


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in UNREAD])
def test_every_other_family_has_directions(family: str):
    units = build_units(family, **CONFIGS[family])
    plan = make_plan(units, EVERYWHERE, 0, 2)
    assert plan.directions.keys() == {unit.parameters[0].name for unit in units if unit.role in ("attention", "mlp")}


def test_blocks_that_do_not_divide_name_those_that_do(llama: tuple[Unit, ...]):
    with pytest.raises(ModelError, match=r"freeze\.blocks 7 does not divide"):
        make_plan(llama, FreezeRule(grain="directions", blocks=7), 0, 2)


@pytest.mark.parametrize(
    "rule",
    [
        {"grain": ["directions", "matrices"]},
        {"grain": []},
        {"grain": "rows"},
        {"grain": "columns", "blocks": 8},
        {"grain": "columns", "part": "magnitude"},
        {"grain": "entries", "blocks": 8},
        {"grain": "entries", "part": "quiet"},
        {"grain": "entries", "keep": {"path": "rows.jsonl"}},
        {"grain": "entries", "rank": "magnitude"},
        {"grain": "directions", "part": "ssu"},
        {"grain": ["matrices", "columns"]},
    ],
)
def test_bad_grains(rule: dict):
    with pytest.raises(ValidationError):
        FreezeRule.model_validate(rule)


def test_quiet_is_short_for_a_rule():
    assert FreezeRule.model_validate("quiet") == FreezeRule(grain=("matrices", "directions"), blocks=32)


@pytest.mark.parametrize("grain", ["directions", "columns", "entries", ("matrices", "directions")])
def test_a_frozen_prefix_keeps_the_share_of_parts(grain: str | tuple[str, ...]):
    """A quarter of 8 layers is frozen whole, and of each matrix above two thirds train; or of two layers all that there is."""
    units = build_units("llama", **CONFIGS["llama"] | {"num_hidden_layers": 8})
    asked = 0.25 if grain == ("matrices", "directions") else 0.5
    for prefix, trained, lowest in ((0.25, asked, 2), (0.75, asked / 2, 6)):
        rule = FreezeRule(grain=grain, frozen_prefix=prefix, balance="weights")
        budget = make_budget(Network("llama", units, 4), rule, Workload(1, 8))
        assert measure_layer_share(budget.plan.roles) == pytest.approx(trained, abs=0.02)
        assert min(int(name.split(".")[2]) for name in budget.plan.trained if ".layers." in name) == lowest
        assert bool(budget.plan.parts) == (prefix == 0.25 or asked == 0.25)
        said = describe_imbalance(budget)
        assert (said is None) == (prefix == 0.25)
        if said is not None:
            assert said.endswith(f"asks for {asked:.1%}: freeze.frozen_prefix 0.75 leaves 25.0% of them")
