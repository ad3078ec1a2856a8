"""What a round leaves is on the disk before its result says that the round is done."""

import os

from training.quiet_rounds import make_spec, make_start, run

from hftcli.recipe.methods import MethodSection
from hftcli.runs.run import Round


def test_what_a_round_leaves_is_on_the_disk_before_its_result(tmp_path, monkeypatch):
    """The front then removes the step checkpoints, and the masters of the rounds before."""
    round_, flush, before, after = Round(tmp_path / "00-a"), os.fsync, {}, {}

    def see(descriptor: int) -> None:
        flush(descriptor)
        state = os.fstat(descriptor)
        (after if round_.is_done else before)[state.st_ino] = state.st_size, state.st_mtime_ns

    monkeypatch.setattr(os, "fsync", see)
    start = make_start(tmp_path / "start")
    run(round_.folder, make_spec(start, {}, train={"max_steps": 1}, method=MethodSection.model_validate({"lora": {"r": 2}})))
    parts = [round_.checkpoint, round_.adapter, round_.checksums_path, round_.scores_path, round_.plan_path, round_.result_path]
    paths = [path for part in parts for path in (part, *part.rglob("*"))]
    assert {"model.safetensors", "hft.json", "config.json", "adapter_model.safetensors"} <= {path.name for path in paths}
    for path in paths:
        state = path.stat()
        assert before.get(state.st_ino) == (state.st_size, state.st_mtime_ns), path
    assert round_.folder.stat().st_ino in after, "the result's name too is there, before it is acted upon"
