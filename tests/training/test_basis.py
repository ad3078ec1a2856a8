"""What the untouched model scored is taken again by whoever would compute the same numbers."""

from pathlib import Path

import torch
from training.quiet_rounds import KNOWN, LEARNED, ONCE, make_spec, make_start, run


def test_another_half_takes_the_scores_and_frozen_embeddings_do_not(tmp_path: Path, monkeypatch):
    """Where they are frozen, one process holds them in bfloat16, and adds up in it what the layers add to them."""
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))
    start, train = make_start(tmp_path / "start", torch.bfloat16), {"bf16": True, "max_steps": 1}
    found = []
    for place, freeze in enumerate(({}, {"seed": 7}, {"embeddings": "freeze"}, {"embeddings": "freeze", "seed": 7})):
        round_ = run(tmp_path / str(place), make_spec(start, freeze, scoring=ONCE, train=train))
        found.append((round_.read_result().reused_before, round_.read_scores().before))
    both = (LEARNED, KNOWN)
    assert [reused for reused, _ in found] == [(), both, (), both]
    nll = [before[KNOWN].nll for _, before in found]
    assert nll[0] == nll[1]
    assert nll[2] == nll[3]
    assert nll[0] != nll[2]  # which is why
