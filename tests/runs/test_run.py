"""A run on disk: claimed once, never written over, read back or refused."""

import os
import shutil
from collections.abc import Callable

import pytest
import yaml
from written_runs import make_result

from hftcli.errors import InputError, NewerFile
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import LaunchSection
from hftcli.runners import make_manifest
from hftcli.runs.files import read_model, write_model, write_text
from hftcli.runs.records import Manifest
from hftcli.runs.run import Round, Run, find_rounds
from hftcli.runs.scores import Prediction
from hftcli.runs.spec import Progress, RoundSpec


@pytest.fixture
def manifest() -> Manifest:
    return make_manifest(parent=None)


def test_claimed_run_can_be_claimed_again_by_its_recipe(tmp_path, manifest):
    run, recipe = Run(tmp_path / "run"), load_recipe(None)
    run.claim(recipe, recipe.launch, manifest)
    created = run.manifest_path.read_text()
    run.claim(recipe, recipe.launch, make_manifest(parent="elsewhere"))
    assert run.manifest_path.read_text() == created


@pytest.fixture
def trained(tmp_path, manifest) -> Run:
    """A run of eight ranks that has taken a step."""
    run = Run(tmp_path / "run")
    recipe = load_recipe(None, ["launch.num_processes=8"])
    run.claim(recipe, recipe.launch, manifest)
    round_ = run.round("00-sft")
    round_.folder.mkdir(parents=True)
    spec = RoundSpec(
        objective="sft", index=0, model=recipe.model, data=recipe.data, freeze=recipe.freeze, train=recipe.train,
        launch=recipe.launch,
    )  # fmt: skip
    write_model(round_.spec_path, spec)
    round_.metrics_path.write_text("")
    return run


def claim_again(run: Run, *overrides: str, num_nodes: int = 1) -> None:
    recipe = load_recipe(None, ["launch.num_processes=8", *overrides])
    run.claim(recipe, recipe.launch.model_copy(update={"num_nodes": num_nodes}), make_manifest(None))


def test_trained_run_refuses_another_recipe_and_names_the_keys(trained):
    held = trained.recipe_path.read_text()
    with pytest.raises(InputError, match=r"differs in freeze\.seed, train\.learning_rate\)"):
        claim_again(trained, "freeze.seed=1", "train.learning_rate=1")
    assert trained.recipe_path.read_text() == held


def test_trained_run_refuses_a_section_without_keys_that_it_has_not(tmp_path, trained, manifest):
    """IA3 has no key of its own: it is there, or it is not."""
    with pytest.raises(InputError, match=r"differs in method\.ia3\)"):
        claim_again(trained, "method.ia3={}")
    adapted, recipe = Run(tmp_path / "adapted"), load_recipe(trained.recipe_path, ["method.ia3={}"])
    adapted.claim(recipe, recipe.launch, manifest)
    shutil.copytree(trained.folder / "rounds", adapted.folder / "rounds")
    with pytest.raises(InputError, match=r"differs in method\.ia3\)"):
        claim_again(adapted)
    claim_again(adapted, "method.ia3={}")


def test_a_tracker_may_come_and_go(trained):
    claim_again(trained, "train.report_to=wandb", "train.run_name=mine")
    assert load_recipe(trained.recipe_path).train.extra["report_to"] == "wandb"
    claim_again(trained)


@pytest.mark.parametrize(
    "override",
    ["launch.hostfile=hosts", "launch.slurm={partition: long, time: '8:00:00'}", "launch.timeout_minutes=5", "output=./runs/a"],
)
def test_trained_run_may_move_to_other_machines(trained, override):
    """Nothing of the result depends on where its ranks are; the recipe on disk says where they are now."""
    created = trained.manifest_path.read_text()
    claim_again(trained, override)
    assert load_recipe(trained.recipe_path) == load_recipe(None, ["launch.num_processes=8", override])
    assert trained.manifest_path.read_text() == created


def test_trained_run_may_spread_its_ranks_over_machines(trained):
    claim_again(trained, "launch.num_processes=4", "launch.hostfile=hosts", num_nodes=2)


@pytest.mark.parametrize(
    ("override", "num_nodes", "named"),
    [
        ("launch.num_processes=4", 1, "launch.num_processes x launch.num_nodes"),
        ("launch.timeout_minutes=5", 2, "launch.num_processes x launch.num_nodes"),
        ("launch.zero_stage=3", 1, "launch.zero_stage"),
    ],
)
def test_trained_run_refuses_to_split_its_work_otherwise(trained, override, num_nodes, named):
    with pytest.raises(InputError) as caught:
        claim_again(trained, override, num_nodes=num_nodes)
    assert f"differs in {named})" in caught.value.message


def test_one_process_shards_nothing_at_any_stage():
    assert LaunchSection(zero_stage=2).split == LaunchSection(zero_stage=3).split


def test_untrained_run_takes_a_mended_recipe(tmp_path, manifest):
    run = Run(tmp_path / "run")
    for overrides in (["data.path=typo"], []):
        recipe = load_recipe(None, overrides)
        run.claim(recipe, recipe.launch, manifest)
    assert "typo" not in run.recipe_path.read_text()


@pytest.mark.parametrize("left", [[], [".recipe.yaml.12"], ["recipe.yaml"], ["recipe.yaml", ".manifest.json.12"]])
def test_a_claim_that_was_cut_short_is_made_again(tmp_path, manifest, left):
    run, recipe = Run(tmp_path), load_recipe(None)
    run.claim(recipe, recipe.launch, manifest)
    for path in (run.recipe_path, run.manifest_path):
        if path.name not in left:
            path.unlink()
    for name in left:
        (tmp_path / name).touch()
    run.claim(recipe, recipe.launch, manifest)
    assert run.read_manifest() == manifest
    assert load_recipe(run.recipe_path) == recipe


def test_foreign_folder_is_left_alone(tmp_path, manifest):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no run"):
        Run(tmp_path).claim(load_recipe(None), LaunchSection(), manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_with_a_recipe_of_the_user_s_own_is_left_alone(tmp_path, manifest):
    held = {"recipe.yaml": "train: {seed: 1}\n", "job.sh": "sbatch\n", "rounds/notes.txt": "precious"}
    (tmp_path / "rounds").mkdir()
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="not empty and holds no run"):
        Run(tmp_path).claim(load_recipe(None), LaunchSection(), manifest)
    assert {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == held


def test_files_are_written_whole_and_leave_no_litter(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_model(tmp_path / "a.json", Progress(phase="loading"))
    assert read_model(tmp_path / "a.json", Progress).phase == "loading"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_manifest_is_on_the_disk_before_it_has_its_name(trained, monkeypatch):
    """What it tells of is then removed."""
    flush, flushed = os.fsync, {}

    def see(descriptor: int) -> None:
        flush(descriptor)
        flushed.setdefault(os.fstat(descriptor).st_ino, trained.manifest_path.stat().st_ino)

    monkeypatch.setattr(os, "fsync", see)
    before = trained.manifest_path.stat().st_ino
    trained.record(trained.round("00-sft"), make_result("0f", None))
    assert flushed[trained.manifest_path.stat().st_ino] == before
    assert trained.folder.stat().st_ino in flushed
    assert trained.read_manifest().rounds.keys() == {"00-sft"}


@pytest.mark.parametrize("text", ["{", '{"phase": "flying"}', '{"phase": "loading", "more": 1}'])
def test_damaged_file_is_named(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(InputError, match=r"progress\.json is damaged or of another version"):
        read_model(tmp_path / "progress.json", Progress)


def test_paths_that_are_no_run(tmp_path, manifest):
    with pytest.raises(InputError, match="neither a run nor a round"):
        find_rounds(tmp_path)
    Run(tmp_path).claim(load_recipe(None), LaunchSection(), manifest)
    with pytest.raises(InputError, match="no finished round"):
        find_rounds(tmp_path)


def test_round_names_its_files(tmp_path):
    assert Round(tmp_path / "00-sft").result_path == tmp_path / "00-sft" / "result.json"


def edit_recipe(run: Run, change: Callable[[dict], None]) -> None:
    """Change the recipe that a run holds."""
    values = yaml.safe_load(run.recipe_path.read_text())
    change(values)
    run.recipe_path.write_text(yaml.safe_dump(values, sort_keys=False))


def test_trained_run_takes_a_key_with_its_default_for_one_that_is_left_out(trained):
    """As a recipe of an earlier hft leaves out the keys that came later."""
    written = trained.recipe_path.read_text()
    edit_recipe(trained, lambda values: [values.pop("version"), values["train"].pop("weight_decay"), values.pop("checkpoint")])
    claim_again(trained)
    assert trained.recipe_path.read_text() == written


def test_trained_run_refuses_a_key_that_has_another_value_than_the_default_left_out(trained):
    edit_recipe(trained, lambda values: values["train"].pop("weight_decay"))
    with pytest.raises(InputError, match=r"holds the run of another recipe \(differs in train\.weight_decay\)$"):
        claim_again(trained, "train.weight_decay=0.1")


@pytest.mark.parametrize("names_its_form", [True, False])
def test_trained_run_of_the_first_form_whose_true_left_bfloat16_to_the_device_goes_on(trained, names_its_form):
    def write_first_form(values: dict) -> None:
        values.pop("version")
        values["train"]["bf16"] = True

    edit_recipe(trained, write_first_form)
    if names_its_form:
        edit_recipe(trained, lambda values: values.update(version=1))
    held = trained.recipe_path.read_text()
    with pytest.raises(InputError, match=r"differs in train\.bf16\)"):
        claim_again(trained, "train.bf16=false")
    for override, taken in (("train.bf16=null", None), ("train.bf16=true", True)):
        trained.recipe_path.write_text(held)
        claim_again(trained, override)
        assert yaml.safe_load(trained.recipe_path.read_text())["train"]["bf16"] is taken
    with pytest.raises(InputError, match=r"differs in train\.bf16\)"):
        claim_again(trained, "train.bf16=null")  # in this form, true is another recipe


def test_recipe_that_no_longer_reads_is_compared_as_text(trained):
    edit_recipe(trained, lambda values: values["train"].update(momentum=0.9))
    with pytest.raises(InputError, match=r"differs in train\.momentum\); compared as text, because") as caught:
        claim_again(trained)
    assert "unknown key 'momentum' under train" in caught.value.message


def test_recipe_of_a_newer_hft_is_left_alone(trained):
    edit_recipe(trained, lambda values: values.update(version=3))
    written = trained.recipe_path.read_text()
    with pytest.raises(NewerFile, match=r"recipe\.yaml was written by a newer hft: its form has version 3"):
        claim_again(trained)
    assert trained.recipe_path.read_text() == written


def test_a_row_of_metrics_that_was_cut_short_is_none(tmp_path):
    round_ = Round(tmp_path)
    round_.metrics_path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert round_.read_metrics() == [{"step": 1, "loss": 2.5}]
    round_.metrics_path.write_text("")
    assert round_.read_metrics() == []


def test_answers_are_read_back_with_every_mark_in_them(tmp_path):
    answer = "a\u2028b\u2029c\x85d\x0be\x0cf\x1eg\r\nh"
    written = [Prediction(index=0, prediction=answer, score=1.0, lenient=None, nll=1.0, num_tokens=1, question=answer)] * 2
    Round(tmp_path).write_predictions("before", "facts", written)
    assert Round(tmp_path).read_predictions("before", "facts") == written
