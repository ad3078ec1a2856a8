"""On a GPU: bfloat16 compute, float32 masters for what trains, and the memory that was planned."""

import pytest
import torch

from hftcli.run import Round

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_round_in_bfloat16_keeps_the_frozen_half_and_moves_the_other(hft, settings, tmp_path, share):
    change = {"train.bf16": "true", "train.max_steps": 20, "model.dtype": "bfloat16", "freeze.trainable_fraction": share}
    hft("sft", "--output", tmp_path / "run", *settings(change))
    result = Round(tmp_path / "run" / "rounds" / "00-sft").read_result()
    assert result.verification.passed
    assert all(update > 0 for update in result.updates.values())
    plan = Round(tmp_path / "run" / "rounds" / "00-sft").read_plan()
    assert result.gradient_bytes == 4 * plan.num_trainable
    assert result.optimizer_bytes == 8 * plan.num_trainable
