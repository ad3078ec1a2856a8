"""The recipe to begin with is one that loads, and says what the schema says."""

import pytest

from hftcli.errors import ModelError
from hftcli.freezing.rule import FreezeRule
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.starter import KEYS, read_max_positions, write_starter
from hftcli.runners import Start, check_start


def test_it_loads_as_the_defaults_with_what_was_given(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(write_starter("some/model: 1", "rows é.jsonl", "own.yaml", ["a.jsonl", "trace/FOMC"]), encoding="utf-8")
    recipe = load_recipe(path)
    assert (recipe.model.path, recipe.data.path, recipe.eval.tasks) == (
        "some/model: 1",
        "rows é.jsonl",
        ("a.jsonl", "trace/FOMC"),
    )
    bare = tmp_path / "bare" / "own.yaml"
    bare.parent.mkdir()
    bare.write_text("model: {path: 'some/model: 1'}\ndata: {path: rows é.jsonl}\neval: {tasks: [a.jsonl, trace/FOMC]}\n")
    assert load_recipe(bare) == recipe


def test_rows_are_cut_to_what_the_model_has_room_for(tmp_path):
    for model, expected in (("tinyworld", 256), ("some/model", 1024)):
        path = tmp_path / "own.yaml"
        path.write_text(write_starter(model, "rows.jsonl", "own.yaml", []), encoding="utf-8")
        assert load_recipe(path).data.max_length == expected


@pytest.mark.parametrize("text", ['{"model_type": "lla', "[]", ""])
def test_a_damaged_config_is_named(tmp_path, text: str):
    """As where its copying was cut off."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_max_positions(str(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        check_start(Start(str(tmp_path)), FreezeRule())


def test_every_key_has_a_comment():
    lines = write_starter("m", "d", "own.yaml", []).splitlines()
    for keys in KEYS.values():
        for key in keys:
            place = next(index for index, line in enumerate(lines) if line.startswith(f"  {key}:"))
            assert lines[place - 1].startswith("  # ")
    assert max(map(len, lines)) <= 100


def test_the_commands(hft, tmp_path):
    shown = hft("init", "--model", "tinyworld", "--data", "tinyworld/skill", "--output", tmp_path / "a.yaml")
    assert f" sft {tmp_path / 'a.yaml'}" in shown.stderr
    assert (
        "there is a file already" in hft("init", "--model", "m", "--data", "d", "--output", tmp_path / "a.yaml", code=2).stderr
    )
    listed = hft("recipes").stdout
    assert all(name in listed for name in ("tulu", "tinyworld-dpo", "trace"))
    assert hft("recipes", "tulu").stdout.startswith("# hft sft")
    assert "give one of" in hft("recipes", "none", code=2).stderr
