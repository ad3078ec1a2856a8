"""Where a process computes."""

import pytest
import torch

from hftcli.models.device import find_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="the NVIDIA GPU comes first")
def test_the_gpu_of_a_mac_serves_one_process_that_does_not_hide_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [find_device(num_ranks).type for num_ranks in (None, 1, 2)] == ["mps", "mps", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device(1).type == "cpu"
