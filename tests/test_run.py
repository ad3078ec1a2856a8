"""A run on disk: claimed once, never written over, read back or refused."""

import pytest

from hftcli.errors import InputError
from hftcli.recipe import load_recipe
from hftcli.run import Manifest, Progress, Round, Run, find_rounds, read_model, write_model, write_text
from hftcli.runners import make_manifest


@pytest.fixture
def manifest() -> Manifest:
    return make_manifest(parent=None)


def test_claimed_run_can_be_claimed_again_by_its_recipe(tmp_path, manifest):
    run, recipe = Run(tmp_path / "run"), load_recipe(None)
    run.claim(recipe, manifest)
    created = run.manifest_path.read_text()
    run.claim(recipe, make_manifest(parent="elsewhere"))
    assert run.manifest_path.read_text() == created


def test_trained_run_refuses_another_recipe_and_names_the_keys(tmp_path, manifest):
    run = Run(tmp_path / "run")
    run.claim(load_recipe(None), manifest)
    folder = run.round("00-sft").folder
    folder.mkdir(parents=True)
    (folder / "round.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    held = run.recipe_path.read_text()
    with pytest.raises(InputError, match=r"differs in freeze\.seed, train\.learning_rate"):
        run.claim(load_recipe(None, ["freeze.seed=1", "train.learning_rate=1"]), manifest)
    assert run.recipe_path.read_text() == held


def test_untrained_run_takes_a_mended_recipe(tmp_path, manifest):
    run = Run(tmp_path / "run")
    run.claim(load_recipe(None, ["data.path=typo"]), manifest)
    run.claim(load_recipe(None), manifest)
    assert "typo" not in run.recipe_path.read_text()


def test_foreign_folder_is_left_alone(tmp_path, manifest):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no run"):
        Run(tmp_path).claim(load_recipe(None), manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_are_written_whole_and_leave_no_litter(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_model(tmp_path / "a.json", Progress(phase="loading"))
    assert read_model(tmp_path / "a.json", Progress).phase == "loading"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["{", '{"phase": "flying"}', '{"phase": "loading", "more": 1}'])
def test_damaged_file_is_named(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(InputError, match=r"progress\.json is damaged or of another version"):
        read_model(tmp_path / "progress.json", Progress)


def test_paths_that_are_no_run(tmp_path, manifest):
    with pytest.raises(InputError, match="neither a run nor a round"):
        find_rounds(tmp_path)
    Run(tmp_path).claim(load_recipe(None), manifest)
    with pytest.raises(InputError, match="no finished round"):
        find_rounds(tmp_path)


def test_round_names_its_files(tmp_path):
    assert Round(tmp_path / "00-sft").result_path == tmp_path / "00-sft" / "result.json"
