"""Bytes per device, against counts by hand."""

import pytest

from hftcli.freezing.activations import Network, Workload
from hftcli.freezing.budget import Budget, Memory, estimate_memory
from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan

NUM_PARAMETERS, NUM_TRAINABLE = 1000, 400


@pytest.mark.parametrize(
    ("precision", "num_processes", "zero_stage", "expected"),
    [
        # One process: what trains is its own float32 master, and the stage says nothing.
        ("float32", 1, 2, Memory(4000, 1600, 3200)),
        ("mixed", 1, 2, Memory(2 * 600 + 4 * 400, 1600, 3200)),
        ("mixed", 1, 3, Memory(2 * 600 + 4 * 400, 1600, 3200)),
        # DeepSpeed: bfloat16 weights, gradients summed in float32 from stage 1 on, and 12 bytes of float32 master and moments.
        ("mixed", 8, 0, Memory(2000, 800, 4800)),
        ("mixed", 8, 1, Memory(2000, 1600, 600)),
        ("mixed", 8, 2, Memory(2000, 200, 600)),
        ("mixed", 8, 3, Memory(250, 200, 600)),
        ("float32", 2, 0, Memory(4000, 1600, 3200)),
        ("float32", 2, 2, Memory(4000, 800, 2400)),
        ("float32", 2, 3, Memory(2000, 800, 2400)),
        # Parts are rounded up: 2000 / 3, 1600 / 3 and 4800 / 3.
        ("mixed", 3, 3, Memory(667, 534, 1600)),
    ],
)
def test_bytes_by_hand(precision: str, num_processes: int, zero_stage: int, expected: Memory):
    memory = estimate_memory(
        NUM_PARAMETERS, NUM_TRAINABLE, precision=precision, num_processes=num_processes, zero_stage=zero_stage
    )
    assert memory == expected
    assert memory.total_bytes == memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes


@pytest.mark.parametrize(("zero_stage", "expected_gb"), [(0, 120), (1, 31.4 + 15), (2, 16.6 + 15 / 64), (3, 1.88 + 15 / 64)])
def test_figure_1_of_the_zero_paper(zero_stage: int, expected_gb: float):
    """7.5 billion weights on 64 devices (arXiv 1910.02054, figure 1), but from stage 1 on with gradients of 4 bytes."""
    memory = estimate_memory(7_500_000_000, 7_500_000_000, precision="mixed", num_processes=64, zero_stage=zero_stage)
    assert memory.total_bytes / 1e9 == pytest.approx(expected_gb, rel=0.005)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_full_fine_tuning_costs_16_bytes_a_weight(precision: str, num_processes: int):
    memory = estimate_memory(10, 10, precision=precision, num_processes=num_processes, zero_stage=0)
    assert memory.total_bytes == 160


def test_large_counts_stay_exact():
    count = 10**15 + 1
    memory = estimate_memory(count, count, precision="mixed", num_processes=2, zero_stage=1)
    assert memory.optimizer_bytes == 6 * count


def test_a_budget_is_the_plan_beside_full_fine_tuning():
    units = [
        Unit("model.norm", "final_norm", None, (Parameter("model.norm.weight", (400,)),)),
        Unit("lm_head", "head", None, (Parameter("lm_head.weight", (20, 30)),)),
    ]
    plan = make_plan(units, FreezeRule(embeddings="freeze", head="freeze"), 0)
    budget = Budget(
        plan, precision="mixed", num_processes=8, zero_stage=2, network=Network("not counted", units, 1), work=Workload(1, 8)
    )
    assert budget.half == Memory(2000, 200, 600)
    assert budget.full == Memory(2000, 500, 1500)


@pytest.mark.parametrize(
    ("precision", "num_processes", "zero_stage", "shared", "full"),
    [
        ("float32", 1, 2, 4 * 400, 4000),
        ("mixed", 1, 2, 4 * 400, 2 * 600 + 4 * 400),
        ("mixed", 8, 2, 2 * 400, 2000),
        ("mixed", 8, 3, None, 250),
    ],
)
def test_a_reference_costs_a_copy_of_what_trains_or_a_second_model(precision, num_processes, zero_stage, shared, full):
    def estimate(reference: str | None) -> Memory:
        return estimate_memory(
            NUM_PARAMETERS, NUM_TRAINABLE, precision=precision, num_processes=num_processes, zero_stage=zero_stage,
            reference=reference,
        )  # fmt: skip

    assert estimate("precompute") == estimate(None)
    assert estimate("full").reference_bytes == full
    assert estimate("full").total_bytes == estimate(None).total_bytes + full
    if shared is not None:  # refused under ZeRO 3
        assert estimate("shared").reference_bytes == shared
