"""Where the device has bfloat16: compute in it, float32 masters for what trains, and the memory that was planned."""

import pytest

from hftcli.run import Round
from hftcli.trainers import has_bfloat16

pytestmark = pytest.mark.skipif(not has_bfloat16(), reason="neither a GPU nor this processor has bfloat16")


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_round_in_bfloat16_keeps_the_frozen_half_and_moves_the_other(hft, settings, tmp_path, share):
    change = {"train.bf16": "true", "train.max_steps": 10, "model.dtype": "bfloat16", "freeze.trainable_fraction": share}
    hft("sft", "--output", tmp_path / "run", *settings(change))
    result = Round(tmp_path / "run" / "rounds" / "00-sft").read_result()
    assert result.precision == "bfloat16"
    assert result.verification.passed
    assert all(update > 0 for update in result.updates.values())
    plan = Round(tmp_path / "run" / "rounds" / "00-sft").read_plan()
    assert result.gradient_bytes == 4 * plan.num_trainable
    assert result.optimizer_bytes == 8 * plan.num_trainable
