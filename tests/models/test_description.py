"""What a checkpoint is, told from its config alone."""

import json

import pytest
from safetensors.torch import load_file

from hftcli.errors import ModelError
from hftcli.models.description import describe_model, fetch_checkpoint


def test_a_description_needs_the_config_alone(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    description = describe_model(str(tmp_path))
    assert sum(parameter.num_elements for parameter in description.parameters) == sum(
        value.numel() for value in load_file(folder / "model.safetensors").values()
    )
    with pytest.raises(ModelError, match="has no weights as safetensors"):
        fetch_checkpoint(str(tmp_path))


@pytest.mark.parametrize("config", [{"model_type": "no-such-type"}, {"model_type": "llama", "hidden_size": 15}])
def test_a_config_that_does_not_load_is_named(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the model's config does not load"):
        describe_model(str(tmp_path))
