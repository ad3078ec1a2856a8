"""Adapters of PEFT's as commands have them: ten types on a real model, one round and two; what is told and what is refused."""

import json
from pathlib import Path

import pytest

# PEFT's own settings, but where its defaults do not fit a small model.
TYPES = {
    "LORA": "{type: LORA, r: 4, use_dora: true}",
    "ADALORA": "{type: ADALORA, init_r: 6, target_r: 4}",
    "IA3": "{type: IA3}",
    "OFT": "{type: OFT, oft_block_size: 4}",
    "BOFT": "{type: BOFT, boft_block_size: 4}",
    "OSF": "{type: OSF, effective_rank: 16}",
    "SHIRA": "{type: SHIRA, r: 2}",
    "VERA": "{type: VERA, r: 16}",
    "LN_TUNING": "{type: LN_TUNING}",
    "TRAINABLE_TOKENS": "{type: TRAINABLE_TOKENS, token_indices: [261, 262, 263, 264, 265, 266, 267, 268, 269, 270]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_ten_types_on_a_real_model(hft, settings, small, tmp_path: Path, kind: str):
    given = {**small, "method.peft": TYPES[kind], "freeze.trainable_fraction": 1.0, "eval.tasks": "[]"}
    shown = hft("sft", *settings(given), "--output", tmp_path / "run").stdout
    assert f"weights of {kind.lower()} trained" in shown
    assert "verified: " in shown
    found = json.loads(hft("plan", *settings(given), "--json").stdout)
    (result,) = (tmp_path / "run" / "rounds").glob("*/result.json")
    assert json.loads(result.read_text())["adapter"]["num_weights"] == found["num_adapter_weights"]
    hft("verify", tmp_path / "run")


def test_the_page_and_the_card_tell_of_the_adapter(hft, settings, tmp_path: Path):
    given = {
        "data.max_examples": 16, "data.max_length": 64, "train.max_steps": 1, "train.global_batch_size": 4,
        "train.per_device_train_batch_size": 4, "eval.tasks": "[]", "method.peft": TYPES["VERA"],
    }  # fmt: skip
    hft("sft", *settings(given), "--output", tmp_path / "run")
    said = "an adapter (vera, "
    assert said in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert said in (tmp_path / "run" / "rounds" / "00-sft" / "checkpoint" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_ten_types_in_a_sequence(hft, settings, small, shared: Path, tmp_path: Path, kind: str):
    given = {name: value for name, value in small.items() if name != "data.path"} | {
        "data.root": shared / "data" / "trace", "data.max_examples": 32, "method.peft": TYPES[kind], "eval.max_examples": 4,
        "continual.tasks": "[trace/NumGLUE-cm, trace/FOMC]",
    }  # fmt: skip
    hft("continual", *settings(given), "--output", tmp_path / "run")
    assert json.loads(hft("verify", tmp_path / "run", "--json").stdout)["violations"] == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.peft={type: LORA, lora_alhpa: 4}", "did you mean 'lora_alpha'"),
        ("method.peft={type: LORA, r: 0}", "`r` should be a positive integer"),
        (
            "method.peft={type: LORA, target_modules: [query]}",
            "no adapter would train: method.peft.target_modules is ['query']",
        ),
        ("method.lora={use_dora: true}", "set method.peft: {type: LORA, use_dora: true}"),
    ],
)
def test_bad_keys_are_found_by_a_dry_run(hft, tmp_path: Path, override: str, said: str):
    assert said in hft("sft", "--set", override, "--output", tmp_path / "run", "--dry-run", code=2).stderr


@pytest.mark.parametrize(
    ("settings_given", "said"),
    [
        (["method.peft={type: ADALORA}", "launch.num_processes=2"], "ADALORA moves ranks by the gradients"),
        (["method.peft={type: OFT}", "launch.num_processes=2", "launch.zero_stage=3"], "each process holds only pieces"),
    ],
)
def test_launches_that_cannot_carry_an_adapter_are_refused(hft, tmp_path: Path, settings_given: list[str], said: str):
    given = [part for one in settings_given for part in ("--set", one)]
    assert said in hft("sft", *given, "--output", tmp_path / "run", "--dry-run", code=2).stderr
