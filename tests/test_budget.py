"""Bytes per device, against counts by hand."""

import pytest

from hftcli.freezing.budget import Budget, Memory, estimate_memory
from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.selection import FreezeRule, make_plan

NUM_PARAMETERS, NUM_TRAINABLE = 1000, 400


@pytest.mark.parametrize(
    ("precision", "num_processes", "zero_stage", "expected"),
    [
        # One process: what trains is its own float32 master, and the stage says nothing.
        ("float32", 1, 2, Memory(4000, 1600, 3200)),
        ("mixed", 1, 2, Memory(2 * 600 + 4 * 400, 1600, 3200)),
        ("mixed", 1, 3, Memory(2 * 600 + 4 * 400, 1600, 3200)),
        # DeepSpeed: bfloat16 weights and gradients, and 12 bytes of float32 master and moments.
        ("mixed", 8, 0, Memory(2000, 800, 4800)),
        ("mixed", 8, 1, Memory(2000, 800, 600)),
        ("mixed", 8, 2, Memory(2000, 100, 600)),
        ("mixed", 8, 3, Memory(250, 100, 600)),
        ("float32", 2, 2, Memory(4000, 800, 1600)),
        ("float32", 2, 3, Memory(2000, 800, 1600)),
        # Parts are rounded up: 2000 / 3, 800 / 3 and 4800 / 3.
        ("mixed", 3, 3, Memory(667, 267, 1600)),
    ],
)
def test_bytes_by_hand(precision: str, num_processes: int, zero_stage: int, expected: Memory):
    memory = estimate_memory(
        NUM_PARAMETERS, NUM_TRAINABLE, precision=precision, num_processes=num_processes, zero_stage=zero_stage
    )
    assert memory == expected
    assert memory.total_bytes == memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes


@pytest.mark.parametrize(("zero_stage", "expected_gb"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_figure_1_of_the_zero_paper(zero_stage: int, expected_gb: float):
    """7.5 billion weights on 64 devices (arXiv 1910.02054, figure 1)."""
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


def test_a_budget_names_its_parts():
    units = [Unit("lm_head", "head", None, (Parameter("lm_head.weight", (2, 5)),))]
    plan = make_plan(units, FreezeRule(), 0)
    memory = Memory(20, 20, 120)
    parts = {"weights_bytes": 20, "gradients_bytes": 20, "optimizer_bytes": 120, "total_bytes": 160}
    assert Budget(plan, memory, memory, "one device").describe() == {"half": parts, "full": parts}
