"""O-LoRA: the overlap of adapters by hand, and that it falls."""

import pytest
import torch
from methods.rounds import run_rounds

from hftcli.methods.lora import read_adapter
from hftcli.methods.olora import measure_overlap


def test_the_overlap_of_two_adapters_is_that_computed_by_hand():
    old = torch.tensor([[1.0, 0.0, 2.0]])
    new = torch.tensor([[3.0, 1.0, -1.0], [0.0, 5.0, 0.0]], requires_grad=True)
    overlap = measure_overlap(old, new)
    overlap.backward()
    assert overlap.item() == (3 - 2) ** 2 + 0**2
    assert new.grad.tolist() == [[2.0, 0.0, 4.0], [0.0, 0.0, 0.0]]  # 2 (a_old . a_new) a_old


@pytest.mark.slow
def test_new_adapters_turn_away_from_the_earlier_ones(tmp_path):
    def measure(strength: float) -> float:
        first, second = run_rounds(tmp_path / str(strength), {"olora": {"orthogonality": strength}})
        old, new = read_adapter(first.adapter), read_adapter(second.adapter)
        both = old.keys() & new.keys()
        assert both
        assert new.keys() == {name.removesuffix(".weight") for name in second.read_plan().trained}
        return sum(measure_overlap(old[name][0], new[name][0]).item() for name in both)

    assert measure(10.0) < 0.9 * measure(0.0)
