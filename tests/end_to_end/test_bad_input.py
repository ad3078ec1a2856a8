"""Bad input: a message that names the place, what was got and the fix; exit 2; nothing written over; no model loaded."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    return path


def check(hft, *arguments: object) -> str:
    error = hft(*arguments, code=2).stderr
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train.lerning_rate": 1}, "unknown key 'lerning_rate' under train (did you mean 'learning_rate'?)"),
        ({"train.learning_rate": "fast"}, "train.learning_rate: input should be a valid number"),
        (
            {"freeze.trainable_fraction": 1.2},
            "freeze.trainable_fraction: input should be less than or equal to 1, got 1.2",
        ),
        ({"freeze.trainable_fraction": 0}, "freeze.trainable_fraction: input should be greater than 0, got 0"),
        ({"model.path": "./no-such-model", "data.path": "d"}, "model.path ./no-such-model: no such folder"),
        ({"train.global_batch_size": 40}, "train.global_batch_size is 40, not a multiple of"),
        ({"eval.tasks": "[tinyworld/fact]"}, "unknown task 'tinyworld/fact'"),
        ({"eval.temperature": 0.5}, "eval.temperature would have no effect: each of tinyworld/facts, tinyworld/facts-rew"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_front_refuses_before_anything_is_written(hft, settings, tmp_path, change, expected):
    assert expected in check(hft, "sft", "--output", tmp_path / "run", *settings(change))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_asks_as_many_questions_as_the_recipe_says(hft, settings, tmp_path):
    asked = {"eval.max_examples": 7, "eval.temperature": 0.5, "eval.tasks": "[tinyworld/facts, tinyworld/sum]"}
    hft("sft", "--dry-run", "--output", tmp_path / "run", *settings(asked))
    scoring = json.loads((tmp_path / "run" / "rounds" / "00-sft" / "round.json").read_text())["scoring"]
    assert (scoring["max_examples"], scoring["temperature"]) == (7, 0.5)


def test_unknown_family(hft, settings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    error = check(hft, "sft", "--output", tmp_path / "run", *settings({"model.path": tmp_path, "data.path": "d"}))
    assert "no roles are known for model_type 'mamba'" in error
    assert "freeze.roles" in error


@pytest.mark.parametrize(
    ("change", "text", "expected"),
    [
        ({"data.path": "missing.jsonl"}, None, "data.path missing.jsonl: no such file"),
        ({}, "", "there are no rows in it"),
        ({}, '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "row 2: field 'completion' is missing"),
        ({}, '{"prompt": "a"\n', "rows.jsonl:1: not JSON"),
        ({"data.max_length": 100000}, "rows", "data.max_length is 100000, but the model has 256 positions"),
        ({"model.attn_implementation": "curly"}, "rows", "model.attn_implementation curly:"),
    ],
    ids=["no file", "empty", "field", "json", "positions", "kernel"],
)
def test_the_worker_refuses_before_a_model_is_loaded(hft, settings, rows, tmp_path, change, text, expected):
    if text not in (None, "rows"):
        rows.write_text(text)
    run = tmp_path / "run"
    error = check(hft, "sft", "--output", run, *settings({"data.path": rows} | change))
    assert expected in error
    assert "loading" not in error
    assert sorted(path.name for path in (run / "rounds" / "00-sft").glob("*.json*")) == [
        "failure.json", "progress.json", "round.json",
    ]  # fmt: skip


def test_a_mended_recipe_may_take_the_folder_of_a_run_that_never_trained(hft, settings, rows, tmp_path):
    run = tmp_path / "run"
    check(hft, "sft", "--output", run, *settings({"data.path": "missing.jsonl"}))
    hft("sft", "--output", run, "--dry-run", *settings({"data.path": rows}))


def test_a_conversation_without_a_chat_template(hft, settings, shared, tmp_path):
    change = {"model.path": shared / "models" / "stories15M", "data.path": shared / "data" / "sft" / "dolly3k.jsonl"}
    error = check(hft, "sft", "--output", tmp_path / "run", *settings(change | {"data.max_length": 200}))
    assert "no chat template" in error
    assert "model.chat_template" in error


def test_unknown_option_and_command(hft):
    assert "No such option" in check(hft, "sft", "--recepi", "x")
    assert "No such command" in check(hft, "stf")
