"""What is measured within a round is the model as its files would hold it: after the last step, what was measured of the files.

The start is in bfloat16, which rounds most of a step away, and the rounds train in float32.
"""

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from training.quiet_rounds import ONCE, SUITED, launch, make_spec, make_start, run

from hftcli.recipe.methods import MethodSection, PeftKind
from hftcli.recipe.sections import CheckpointSection, LaunchSection
from hftcli.runs.run import Round

TWICE = ONCE.model_copy(update={"every_steps": 2})
WHOLE = {"trainable_fraction": 1.0}
WAYS: dict[str, tuple[dict, dict]] = {
    "half": ({}, {}),
    "quiet": ({"grain": ["matrices", "directions"], "blocks": 16}, {}),
    "columns": ({"grain": "columns"}, {}),
    "entries": ({"grain": "entries"}, {}),
    "lora": (WHOLE, {"lora": {"r": 4}}),
    "quiet lora": (WHOLE, {"lora": {"r": 4, "quiet": True}}),
    "ia3": (WHOLE, {"ia3": {}}),
}
KINDS = {kind: (WHOLE, {"peft": {"type": kind, **SUITED.get(kind, {})}}) for kind in get_args(PeftKind)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("points") / "start", torch.bfloat16)


def list_ways() -> list[object]:
    return [*WAYS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)]


@pytest.mark.parametrize("way", list_ways())
def test_the_last_point_is_of_the_file(start: Path, tmp_path: Path, way: str):
    """And measuring leaves the training as it is."""
    freeze, method = (WAYS | KINDS)[way]
    values = {"method": MethodSection.model_validate(method), "checkpoint": CheckpointSection(save_steps=1, keep=9)}
    measured = run(tmp_path / "measured", make_spec(start, freeze, scoring=TWICE, **values))
    check_last_point(measured)
    plain = run(tmp_path / "plain", make_spec(start, freeze, **values))
    weights = [load_file(round_.checkpoint / "model.safetensors") for round_ in (measured, plain)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(values, weights[1][name]) for name, values in weights[0].items())


def check_last_point(round_: Round) -> None:
    scores = round_.read_scores()
    assert [point.step for point in scores.points] == [2, 4]
    within, after = ({name: score.nll for name, score in found.items()} for found in (scores.points[-1].scores, scores.after))
    assert within == pytest.approx(after, rel=1e-6)
    assert within != pytest.approx({name: score.nll for name, score in scores.before.items()}, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("way", ["half", "quiet", "columns", "lora"])
def test_on_two_ranks(start: Path, tmp_path: Path, way: str, stage: int):
    """Small weights too, which ZeRO 3 leaves gathered beside their pieces."""
    freeze, method = WAYS[way]
    spec = make_spec(
        start, freeze, scoring=TWICE, method=MethodSection.model_validate(method),
        launch=LaunchSection(num_processes=2, zero_stage=stage), train={"per_device_train_batch_size": 4},
    )  # fmt: skip
    check_last_point(launch(tmp_path / "two", spec))
