"""What stands beside the weights: the start's, and no more of it changed than training settles."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from hftcli import PACKAGE
from hftcli.errors import ModelError
from hftcli.models.configs import Configs, read_ends, settle_configs
from hftcli.models.description import load_tokenizer

CONFIG = {
    "architectures": ["LlamaModel"], "model_type": "llama", "torch_dtype": "bfloat16", "use_cache": True, "hidden_size": 16,
    "num_attention_heads": 2,
    "eos_token_id": 2, "bos_token_id": 1, "rope_theta": 1234.0, "vocab_size": 256, "what_others_read": {"a": 1},
}  # fmt: skip
GENERATION = {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "do_sample": False, "_from_model_config": True}


@pytest.fixture
def start(tmp_path) -> Path:
    folder = tmp_path / "start"
    shutil.copytree(PACKAGE / "tinyworld" / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write(folder, CONFIG, GENERATION)
    return folder


def write(folder: Path, config: dict, generation: dict | None) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def settle(start: Path, *ends: int, dtype: str | None = None) -> Configs:
    return settle_configs(start, "LlamaForCausalLM", load_tokenizer(start), dtype, ends)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_nothing_else_changes(start, tmp_path):
    """Neither a key that transformers does not know, nor one that it writes by another name, nor one that it refuses."""
    configs = settle(start, 2)
    (tmp_path / "end").mkdir()
    configs.write(tmp_path / "end")
    assert read(tmp_path / "end", "config.json") == CONFIG | {"architectures": ["LlamaForCausalLM"]}
    padded = {"pad_token_id": load_tokenizer(start).pad_token_id}
    assert read(tmp_path / "end", "generation_config.json") == GENERATION | padded
    assert configs.ends.eos_token_ids == (2,)
    assert configs.ends.added_ids == ()


def test_code_of_the_start_s_own_is_not_named_where_it_does_not_come_along(start, tmp_path):
    """Programs that are let run such code would look for it in vain."""
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    write(start, CONFIG | {"auto_map": own}, GENERATION)
    path = start / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}))
    (tmp_path / "end").mkdir()
    settle(start, 2).write(tmp_path / "end")
    assert read(tmp_path / "end", "config.json") == CONFIG | {"architectures": ["LlamaForCausalLM"]}
    assert "auto_map" not in read(tmp_path / "end", "tokenizer_config.json")
    assert load_tokenizer(tmp_path / "end").get_vocab() == load_tokenizer(start).get_vocab()


@pytest.mark.parametrize(
    ("own", "trained", "expected", "added"),
    [
        (2, (5,), [5, 2], (5,)),
        ([2, 7], (5,), [5, 2, 7], (5,)),
        ([2, 7], (7,), [2, 7], ()),
        ([2, 7], (), [2, 7], ()),
        (2, (5, 2), [5, 2], (5,)),
        (None, (5,), 5, (5,)),
        (None, (5, 6), [5, 6], (5, 6)),
    ],
)
def test_the_trained_end_joins_those_of_the_start(start, tmp_path, own, trained, expected, added):
    write(start, CONFIG, GENERATION | {"eos_token_id": own})
    configs = settle(start, *trained)
    assert configs.ends.added_ids == added
    assert configs.ends.trained_ids == trained
    (tmp_path / "end").mkdir()
    configs.write(tmp_path / "end")
    assert read(tmp_path / "end", "generation_config.json")["eos_token_id"] == expected
    listed = expected if isinstance(expected, list) else [expected]
    assert list(read_ends(tmp_path / "end")) == listed == list(configs.ends.eos_token_ids)
    assert read(tmp_path / "end", "config.json")["eos_token_id"] == (expected if set(added) - {2} else 2)
    assert AutoConfig.from_pretrained(tmp_path / "end").eos_token_id == (expected if set(added) - {2} else 2)


def test_a_start_without_a_generation_config_gets_the_one_that_transformers_makes(start, tmp_path):
    write(start, CONFIG | {"eos_token_id": [2, 3]}, None)
    (tmp_path / "end").mkdir()
    settle(start, 5).write(tmp_path / "end")
    assert GenerationConfig.from_pretrained(tmp_path / "end").eos_token_id == [5, 2, 3]
    assert GenerationConfig.from_pretrained(tmp_path / "end").bos_token_id == 1
    assert read_ends(start) == (2, 3)


def test_the_recipe_s_data_type_is_the_config_s(start):
    config = settle(start, 2, dtype="float16").config
    assert config["dtype"] == "float16"
    assert "torch_dtype" not in config


def test_a_token_to_pad_with_is_given_where_there_is_none(start, tmp_path):
    """The tokenizer and the generation config say the same; the config, whose token would be an embedding that never learns, is
    the start's."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(start)
    (tmp_path / "end").mkdir()
    settle(start, 2).write(tmp_path / "end")
    saved = AutoTokenizer.from_pretrained(tmp_path / "end")
    assert saved.pad_token_id == saved.eos_token_id == read(tmp_path / "end", "generation_config.json")["pad_token_id"]
    assert "pad_token_id" not in read(tmp_path / "end", "config.json")
    write(start, CONFIG, GENERATION | {"pad_token_id": 0})
    assert settle(start, 2).generation["pad_token_id"] == 0


def test_a_vocabulary_for_other_programs_comes_along(start, tmp_path):
    (start / "tokenizer.model").write_bytes(b"sentences in pieces")
    for source, target in ((start, tmp_path / "one"), (tmp_path / "one", tmp_path / "two")):
        target.mkdir()
        settle(source, 2).write(target)
        assert (target / "tokenizer.model").read_bytes() == b"sentences in pieces"


def test_a_damaged_generation_config_is_named(start):
    (start / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config.json is damaged"):
        settle(start, 2)
