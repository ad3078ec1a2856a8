"""The quiet half and columns as commands have them: the short name, runs and what is told of them, proofs, what is refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hftcli.errors import RecipeError
from hftcli.recipe.loading import load_recipe

SHORT = {
    "data.max_examples": 16, "data.max_length": 64, "train.max_steps": 2, "train.global_batch_size": 4,
    "train.per_device_train_batch_size": 4, "eval.tasks": "[]", "freeze.keep.samples": 8,
}  # fmt: skip


def test_the_recipe_is_the_short_name_with_rows_to_keep():
    quiet = load_recipe("quiet").freeze
    assert quiet.keep.samples == 200
    assert quiet.model_copy(update={"keep": None}) == load_recipe(None, ["freeze=quiet"]).freeze
    changed = load_recipe(None, ["freeze=quiet", "freeze.trainable_fraction=0.25"]).freeze
    assert (changed.trainable_fraction, changed.blocks) == (0.25, 32)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "method.lora={}",
            "method.lora works on whole matrices, and of these freeze.grain: .*directions. trains a part",
        ),
        ("method.l2sp={strength: 0.1}", "method.l2sp works on whole matrices"),
        ("freeze={blocks: 32}", "freeze.blocks would have no effect beside freeze.grain matrices"),
        ("freeze={grain: directions, part: ssu}", "part is ssu, and grain directions has quiet, random"),
        ("freeze={grain: [directions, matrices]}", "give matrices, biases, directions, columns, entries, or"),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, said: str):
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, ["freeze=quiet", override])


def test_a_run_and_its_proof(hft, settings, tmp_path: Path):
    folder = tmp_path / "run"
    shown = hft("sft", "--recipe", "quiet", *settings(SHORT), "--output", folder).stdout
    assert "21 moved in their open directions alone" in shown
    assert "of the energy of 2 earlier sources lies in what was closed" in shown
    assert "How the input space fills" in (folder / "report.html").read_text(encoding="utf-8")
    found = json.loads(hft("verify", folder, "--json").stdout)
    assert found["leaked"] == []
    path = folder / "rounds" / "00-sft" / "checkpoint" / "model.safetensors"
    weights, name = load_file(path), next(iter(found["rounds"]["00-sft"]["closed_change"]))
    weights[name][7] *= 1.001
    save_file(weights, path, {"format": "pt"})
    assert f"trained in directions, but moved in others: {name} (1 rows" in hft("verify", folder, code=3).stdout


def test_frozen_columns_are_proved(hft, settings, tmp_path: Path):
    folder, given = tmp_path / "run", {key: value for key, value in SHORT.items() if not key.startswith("freeze")}
    shown = hft("sft", *settings(given | {"freeze.grain": "columns"}), "--output", folder).stdout
    assert "2,976 frozen columns compared bit for bit" in shown  # 6 layers, 6 matrices of 128 inputs and one of 224
    path = folder / "rounds" / "00-sft" / "checkpoint" / "model.safetensors"
    weights, name = load_file(path), "model.layers.0.mlp.down_proj.weight"
    open_columns = load_file(folder / "rounds" / "00-sft" / "quiet" / "bases.safetensors")[name].tolist()
    frozen = next(number for number in range(224) if number not in open_columns)
    weights[name][7, frozen] *= 1.001
    save_file(weights, path, {"format": "pt"})
    found = hft("verify", folder, code=3).stdout
    assert f"trained in columns, but moved in frozen ones: {name} (1 of 112 frozen columns)" in found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"freeze.keep.path": "missing.jsonl"}, "freeze.keep.path missing.jsonl: no such file"),
        pytest.param({"freeze.keep.path": "empty.jsonl"}, "empty.jsonl", marks=pytest.mark.slow),
        pytest.param({"freeze.keep.path": "odd.jsonl"}, "odd.jsonl", marks=pytest.mark.slow),
        ({"freeze.blocks": 9}, "freeze.blocks 9 does not divide the 224 inputs"),
        ({"model.path": "quantized"}, "quantized"),
    ],
)
def test_bad_input_is_found_by_a_dry_run(hft, settings, tmp_path: Path, monkeypatch, given: dict, said: str):
    from hftcli import PACKAGE

    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("odd.jsonl").write_text('{"picture": "x"}\n', encoding="utf-8")
    Path("quantized").mkdir()
    for file in (PACKAGE / "tinyworld" / "model").iterdir():
        (Path("quantized") / file.name).write_bytes(file.read_bytes())
    config = json.loads(Path("quantized/config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    Path("quantized/config.json").write_text(json.dumps(config), encoding="utf-8")
    done = hft("sft", "--recipe", "quiet", *settings(SHORT | given), "--output", tmp_path / "run", "--dry-run", code=2)
    assert said in done.stderr, done.stderr
