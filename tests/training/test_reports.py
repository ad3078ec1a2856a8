"""What a round says of itself: the time that it took, and that it came to no numbers."""

import time

import pytest
import torch
from training.quiet_rounds import make_spec, make_start, run

from hftcli.errors import TrainingError
from hftcli.runs.run import Round
from hftcli.training.reports import Clock


def test_a_phase_within_another_is_counted_once(monkeypatch):
    """Self-replay writes its texts before training; within training, the tasks are scored twice and a reference is taken."""
    moments = iter([0, 7, 10, 11, 13, 14, 18, 20, 25, 30])
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(moments)))
    clock = Clock()
    with clock.measure("referencing"):  # 0 to 7
        pass
    with clock.measure("training"):  # 10 to 30
        with clock.measure("scoring"):  # 11 to 13
            pass
        with clock.measure("referencing"):  # 14 to 18
            pass
        with clock.measure("scoring"):  # 20 to 25
            pass
    spent = {phase: seconds for phase, seconds in clock.seconds.items() if seconds}
    assert spent == {"scoring": 7, "referencing": 11, "training": 9}


@pytest.mark.parametrize(
    ("max_steps", "message"), [(3, "the loss became nan by step 3 and"), (1, r"model\..*weight moved by nan and")]
)
def test_what_comes_to_no_number_after_the_last_row_stops_the_round(tmp_path, monkeypatch, max_steps, message):
    """The first step spoils a matrix: the loss of the next ones tells, and that of a last step is a number still."""
    step = torch.optim.AdamW.step

    def spoil(optimizer: torch.optim.AdamW, closure: None = None) -> None:
        step(optimizer, closure)
        optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    spec = make_spec(make_start(tmp_path / "start"), {}, train={"max_steps": max_steps, "logging_steps": 100})
    with pytest.raises(TrainingError, match=f"{message} the round is stopped"):
        run(tmp_path / "00-a", spec)
    assert not Round(tmp_path / "00-a").checkpoint.exists()
