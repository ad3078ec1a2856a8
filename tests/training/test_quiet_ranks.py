"""Directions, columns and ranks by scores on two ranks: the weights of one process, at every stage of ZeRO, and in bfloat16."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.quiet_rounds import make_spec, make_start, run

from hftcli.launching.watch import launch_round
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round

QUIET = {"grain": ["matrices", "directions"], "blocks": 16, "rank": "fisher"}
RULES = {"quiet": QUIET, "columns": {"grain": "columns"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("quiet") / "start")


@pytest.fixture(scope="module", params=RULES)
def rule(request: pytest.FixtureRequest) -> dict:
    return RULES[request.param]


@pytest.fixture(scope="module")
def alone(start: Path, rule: dict, tmp_path_factory: pytest.TempPathFactory) -> Round:
    return run(tmp_path_factory.mktemp("quiet") / "alone", make_spec(start, rule))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(2, torch.bfloat16), (3, torch.bfloat16), (3, torch.float32)])
def test_two_ranks_in_bfloat16(tmp_path: Path, rule: dict, stage: int, dtype: torch.dtype):
    launch, train = LaunchSection(num_processes=2, zero_stage=stage), {"bf16": True, "per_device_train_batch_size": 4}
    spec = make_spec(make_start(tmp_path / "start", dtype), rule, launch=launch, train=train)
    round_ = Round(tmp_path / "00")
    round_.folder.mkdir()
    write_model(round_.spec_path, spec)
    launch_round(round_, launch, lambda progress: None)
    result = round_.read_result()
    assert result.precision == "bfloat16"
    assert result.verification.passed
    assert round_.read_metrics()[-1]["loss"] < round_.read_metrics()[0]["loss"] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_end_where_one_process_does(alone: Round, start: Path, rule: dict, tmp_path: Path, stage: int):
    spec = make_spec(
        start, rule, launch=LaunchSection(num_processes=2, zero_stage=stage), train={"per_device_train_batch_size": 4}
    )
    round_ = Round(tmp_path / "00")
    round_.folder.mkdir()
    write_model(round_.spec_path, spec)
    launch_round(round_, spec.launch, lambda progress: None)
    assert round_.read_result().verification.passed
    assert round_.read_plan() == alone.read_plan()
    one, two = (load_file(done.checkpoint / "model.safetensors") for done in (alone, round_))
    for name, values in one.items():
        assert torch.allclose(values, two[name], rtol=0, atol=1e-5), (name, (values - two[name]).abs().max())
    moments = [load_file(done.moments_path) for done in (alone, round_)]
    for name, values in moments[0].items():
        assert torch.allclose(values, moments[1][name], rtol=1e-4, atol=1e-5 * values.abs().max().item()), name
