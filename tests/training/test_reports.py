"""What a round says of the time that it took."""

import time

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
