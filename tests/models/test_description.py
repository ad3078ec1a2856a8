"""What a checkpoint is, told from its config alone."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from methods.rounds import make_spec
from safetensors.torch import load_file

from hftcli.errors import ModelError
from hftcli.methods import make_methods
from hftcli.models.description import describe_model, fetch_checkpoint, pin_start
from hftcli.recipe.loading import load_recipe
from hftcli.runners import prepare_single, resolve_start


def test_a_description_needs_the_config_alone(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    description = describe_model(str(tmp_path))
    assert sum(parameter.num_elements for parameter in description.parameters) == sum(
        value.numel() for value in load_file(folder / "model.safetensors").values()
    )
    with pytest.raises(ModelError, match="has no weights as safetensors"):
        fetch_checkpoint(str(tmp_path))


@pytest.fixture
def kept(folder, tmp_path, monkeypatch) -> Path:
    """As the hub's own cache keeps a model: a folder for each commit, and files that name the commits of branches and tags."""
    kept = tmp_path / "models--owner--name"
    for commit, name, size in (("a" * 40, "main", 16), ("b" * 40, "v1", 8)):
        snapshot = kept / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        config = json.loads((snapshot / "config.json").read_text()) | {"max_position_embeddings": size}
        (snapshot / "config.json").write_text(json.dumps(config))
        (kept / "refs" / name).parent.mkdir(exist_ok=True)
        (kept / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return kept


def test_a_revision_of_a_hub_id_is_the_one_that_is_read(kept):
    for given, commit, size in (("", "a", 16), ("@main", "a", 16), ("@v1", "b", 8), (f"@{'b' * 40}", "b", 8)):
        found = fetch_checkpoint(resolve_start(f"owner/name{given}").path)
        assert found == kept / "snapshots" / (commit * 40)
        assert describe_model(str(found)).max_positions == size
    with pytest.raises(ModelError, match="model.path owner/name@v2: no such folder, and the hub does not give it"):
        fetch_checkpoint("owner/name@v2")
    assert load_recipe(None, ["model.path=owner/name", "model.revision=v1"], needs_rows=False).model.place == "owner/name@v1"


def test_a_hub_id_is_one_model_in_all_that_a_run_does(kept, tmp_path):
    """What a branch names when the run goes on is another."""
    recipe = load_recipe(None, ["model.path=owner/name", "data.path=tinyworld/skill", f"output={tmp_path / 'run'}"])
    run, round_ = prepare_single(recipe)
    assert pin_start(round_).model.path == f"owner/name@{'a' * 40}"
    (kept / "refs" / "main").write_text("b" * 40)
    run.lock.release()
    prepare_single(recipe)
    assert round_.read_spec().model.path == "owner/name"
    for path in (pin_start(round_).model.path, round_.find_start()):
        assert fetch_checkpoint(path) == kept / "snapshots" / ("a" * 40)
    (method,) = make_methods(make_spec({"lora": {}}, (("new", round_.folder),)))
    assert method.find_base(tmp_path) == kept / "snapshots" / ("a" * 40)


def test_the_start_of_a_folder_is_not_pinned(folder, tmp_path):
    recipe = load_recipe(None, [f"model.path={folder}", "data.path=tinyworld/skill", f"output={tmp_path / 'run'}"])
    _, round_ = prepare_single(recipe)
    assert pin_start(round_) == round_.read_spec()
    assert not round_.start_path.exists()


def test_a_tokenizer_in_its_slow_form_is_fetched_whole(folder, tmp_path, monkeypatch):
    """The hub is a folder; the library says which of its files the patterns mean."""
    hub = shutil.copytree(folder, tmp_path / "hub")
    for name in ("vocab.json", "merges.txt", "vocab.txt", "notes.txt", "modeling_own.py"):
        (hub / name).touch()

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        (tmp_path / "here").mkdir()
        for file in filter_repo_objects([path.name for path in hub.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(hub / file, tmp_path / "here")
        return str(tmp_path / "here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = {path.name for path in fetch_checkpoint("owner/name").iterdir()}
    assert found == {path.name for path in hub.iterdir()} - {"notes.txt", "modeling_own.py"}


@pytest.mark.parametrize("config", [{"model_type": "no-such-type"}, {"model_type": "llama", "hidden_size": 15}])
def test_a_config_that_does_not_load_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the model's config does not load"):
        describe_model(str(tmp_path))
