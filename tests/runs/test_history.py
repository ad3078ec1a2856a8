"""A checkpoint knows the rounds behind it, wherever it goes; a run's folder holds the rounds of its recipe and no others."""

import json
import shutil
from pathlib import Path

import pytest

from hftcli import PACKAGE
from hftcli.errors import InputError, ModelError
from hftcli.freezing.rule import FreezeRule
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runners import prepare_continual, prepare_single, resolve_start, resolve_subject
from hftcli.runs.files import write_model
from hftcli.runs.history import HISTORY_NAME, History, PastRound, extend_history, read_history
from hftcli.runs.run import Run
from hftcli.runs.spec import RoundSpec

MODEL = PACKAGE / "tinyworld" / "model"


def make_spec(index: int, path: Path) -> RoundSpec:
    return RoundSpec(
        objective="dpo", index=index, model=ModelSection(path=str(path)), data=DataSection(path="d"), freeze=FreezeRule(),
        train=TrainSection(), launch=LaunchSection(num_processes=1),
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint with two rounds behind it."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(MODEL, folder)
    first = PastRound(index=0, objective="sft", task=None, fingerprint="a", parent="hub/base")
    write_model(folder / HISTORY_NAME, History(rounds=(first,)))
    write_model(folder / HISTORY_NAME, extend_history(folder, make_spec(1, folder), "b"))
    return folder


def test_a_round_is_added_to_those_before(checkpoint):
    history = read_history(checkpoint)
    assert [(round_.index, round_.objective, round_.fingerprint) for round_ in history.rounds] == [
        (0, "sft", "a"),
        (1, "dpo", "b"),
    ]
    assert history.rounds[0].parent == "hub/base"
    assert history.num_rounds == 2
    assert read_history(MODEL).num_rounds == 0


def test_a_run_goes_on_from_a_checkpoint_however_it_is_named(checkpoint, tmp_path):
    assert resolve_start(str(checkpoint)).num_rounds == 2
    assert resolve_start(str(checkpoint)).parent == str(checkpoint)
    copied = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert resolve_start(str(copied)).num_rounds == 2
    assert resolve_start(str(MODEL)).parent is None
    recipe = load_recipe(None, [f"model.path={copied}", "data.path=tinyworld/skill", f"output={tmp_path / 'run'}"])
    assert prepare_single(recipe)[1].read_spec().index == 2
    (copied / HISTORY_NAME).write_text("{")
    with pytest.raises(InputError, match=r"hft\.json is damaged"):
        resolve_start(str(copied))


def test_a_checkpoint_of_an_earlier_hft_is_told_by_its_round():
    checkpoint = Path(__file__).parent / "version_1" / "continual" / "rounds" / "01-sums" / "checkpoint"
    assert not (checkpoint / HISTORY_NAME).exists()
    assert resolve_start(str(checkpoint)).num_rounds == 2


def test_a_run_that_was_not_verified_is_no_start_and_is_asked_with_a_word(tmp_path, caplog):
    run = shutil.copytree(Path(__file__).parent / "version_1" / "sft", tmp_path / "run")
    checkpoint = run / "rounds" / "00-sft" / "checkpoint"
    assert resolve_start(str(run)).path == str(checkpoint)
    assert resolve_subject(str(run)).path == str(checkpoint)
    assert caplog.text == ""
    path = checkpoint.with_name("result.json")
    result = json.loads(path.read_text())
    result["verification"]["violations"] = ["model.norm.weight"]
    path.write_text(json.dumps(result))
    for given in (run, checkpoint):
        with pytest.raises(ModelError, match=f"model.path {given}: .*00-sft did not pass its verification") as caught:
            resolve_start(str(given))
        assert f"hft verify {checkpoint.parent}" in caught.value.fix
    assert resolve_subject(str(run)).path == str(checkpoint)
    assert f"{run} was not verified: `hft verify {run}` names what is wrong" in caplog.text


def names(run: Run) -> list[str]:
    return [round_.name for round_ in run.rounds]


def prepare(tmp_path: Path, *tasks: str) -> Run:
    listed = ",".join(f"tinyworld/{task}" for task in tasks)
    run = prepare_continual(load_recipe(None, [f'continual.tasks="{listed}"', f"output={tmp_path / 'run'}"], "continual"))
    run.lock.release()
    return run


def test_rounds_that_another_recipe_prepared_are_gone(tmp_path):
    assert names(prepare(tmp_path, "sum", "sale", "topic")) == ["00-sum", "01-sale", "02-topic"]
    run = prepare(tmp_path, "sale", "sum")
    assert names(run) == ["00-sale", "01-sum"]
    assert sorted(path.name for path in (run.folder / "rounds").iterdir()) == ["00-sale", "01-sum"]
    run.round("01-sum").failure_path.touch()
    assert names(prepare(tmp_path, "sale", "sum")) == ["00-sale", "01-sum"]
    assert run.round("01-sum").failure_path.exists(), "the same recipe goes on in its own rounds"
    recipe = load_recipe(None, [f"output={tmp_path / 'run'}"])
    assert names(prepare_single(recipe)[0]) == ["00-sft"]


def test_rounds_that_were_trained_are_kept(tmp_path):
    run = prepare(tmp_path, "sum", "sale")
    run.round("00-sum").metrics_path.touch()
    with pytest.raises(InputError, match="holds the run of another recipe"):
        prepare(tmp_path, "sale", "sum")
    assert names(run) == ["00-sum", "01-sale"]
