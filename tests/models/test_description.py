"""What a checkpoint is, told from its config alone."""

import json
import shutil

import huggingface_hub
import pytest
from safetensors.torch import load_file

from hftcli.errors import ModelError
from hftcli.models.description import describe_model, fetch_checkpoint
from hftcli.recipe.loading import load_recipe
from hftcli.runners import resolve_start


def test_a_description_needs_the_config_alone(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    description = describe_model(str(tmp_path))
    assert sum(parameter.num_elements for parameter in description.parameters) == sum(
        value.numel() for value in load_file(folder / "model.safetensors").values()
    )
    with pytest.raises(ModelError, match="has no weights as safetensors"):
        fetch_checkpoint(str(tmp_path))


def test_a_revision_of_a_hub_id_is_the_one_that_is_read(folder, tmp_path, monkeypatch):
    """As the hub's own cache keeps them: a folder for each commit, and files that name the commits of branches and tags."""
    kept = tmp_path / "models--owner--name"
    for commit, name, size in (("a" * 40, "main", 16), ("b" * 40, "v1", 8)):
        snapshot = kept / "snapshots" / commit
        shutil.copytree(folder, snapshot)
        config = json.loads((snapshot / "config.json").read_text()) | {"max_position_embeddings": size}
        (snapshot / "config.json").write_text(json.dumps(config))
        (kept / "refs" / name).parent.mkdir(exist_ok=True)
        (kept / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for given, commit, size in (("", "a", 16), ("@main", "a", 16), ("@v1", "b", 8), (f"@{'b' * 40}", "b", 8)):
        found = fetch_checkpoint(resolve_start(f"owner/name{given}").path)
        assert found == kept / "snapshots" / (commit * 40)
        assert describe_model(str(found)).max_positions == size
    with pytest.raises(ModelError, match="model.path owner/name@v2: no such folder, and the hub does not give it"):
        fetch_checkpoint("owner/name@v2")
    assert load_recipe(None, ["model.path=owner/name", "model.revision=v1"], needs_rows=False).model.place == "owner/name@v1"


@pytest.mark.parametrize("config", [{"model_type": "no-such-type"}, {"model_type": "llama", "hidden_size": 15}])
def test_a_config_that_does_not_load_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the model's config does not load"):
        describe_model(str(tmp_path))
