"""`hft plan`, `hft data` and the command line itself."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

LLAMA2 = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}


@pytest.mark.parametrize(
    ("size", "num_parameters", "units", "percent"),
    [("7b", 6_738_415_616, (144, 288), 51.9), ("13b", 13_015_864_320, (180, 360), 51.3)],
)
def test_plan_of_a_config_alone(hft, tmp_path, size, num_parameters, units, percent):
    LlamaConfig(**LLAMA2[size], vocab_size=32000, tie_word_embeddings=False).save_pretrained(tmp_path)
    found = json.loads(hft("plan", "--model", tmp_path, "--json").stdout)
    assert found["num_parameters"] == num_parameters
    assert (found["num_trainable_units"], found["num_units"]) == units
    assert round(100 * found["trainable_fraction"], 1) == percent
    memory = found["memory"]
    assert memory["half"]["optimizer_bytes"] / memory["full"]["optimizer_bytes"] == pytest.approx(found["trainable_fraction"])


def test_plan_shows_roles_and_memory(hft):
    shown = hft("plan").stdout
    for word in ("attention", "mlp", "norm", "embedding", "final_norm", "head", "optimizer", "full fine-tuning"):
        assert word in shown


def test_data_shows_what_is_trained(hft):
    shown = hft("data").stdout
    assert "messages" in shown
    assert "⟦name=" in shown
    found = json.loads(hft("data", "--json").stdout)
    assert found["format"] == "messages"
    assert found["num_rows"] == found["num_used"] > 1000
    trained = [part["text"] for part in found["sample"] if part["trained"]]
    assert len(trained) == 1
    assert trained[0].endswith("<|end|>")


def test_data_of_real_rows(hft, settings, shared):
    found = json.loads(
        hft(
            "data",
            "--json",
            *settings(
                {
                    "model.path": shared / "models" / "MiniMind2-Small",
                    "data.path": shared / "data" / "sft" / "alpaca_en_demo.jsonl",
                    "data.max_length": 256,
                    "train.packing": "true",
                }
            ),
        ).stdout
    )
    assert (found["format"], found["num_rows"]) == ("messages", 999)
    assert found["num_sequences"] < found["num_used"]
    assert 0 < found["num_trained_tokens"] < found["num_tokens"] <= 256 * found["num_sequences"]


def test_a_folder_called_tinyworld_does_not_hide_the_embedded_one(hft, tmp_path, monkeypatch):
    (tmp_path / "tinyworld" / "skill").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "1,091,200 parameters" in hft("plan").stdout
    assert json.loads(hft("data", "--json").stdout)["num_rows"] > 1000


def test_help_names_the_commands_and_no_command_is_an_error(hft):
    shown = hft("--help").stdout
    for command in ("sft", "plan", "data", "verify"):
        assert command in shown
    assert hft("--version").stdout.strip()
    hft(code=2)


def test_traceback_is_shown_on_request_only(hft, tmp_path: Path):
    assert "Traceback" not in hft("verify", tmp_path, code=2).stderr
    assert "Traceback" in hft("verify", tmp_path, "--traceback", code=1).stderr
