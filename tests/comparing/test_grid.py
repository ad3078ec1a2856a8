"""The grid of recipes that a comparison runs."""

import re
from pathlib import Path

import pytest

from hftcli.comparing.grid import make_grid
from hftcli.errors import RecipeError


def test_grid_is_the_product_with_a_folder_for_each_run(tmp_path):
    vary = ["freeze.trainable_fraction=0.5,1.0", "train.learning_rate=3e-4,7e-4"]
    grid = make_grid("tinyworld", ["train.max_steps=4"], vary, 2, tmp_path)
    assert len(grid) == 8
    assert len({recipe.output for recipe in grid}) == 8
    assert {(recipe.freeze.trainable_fraction, recipe.train.learning_rate) for recipe in grid} == {
        (0.5, 3e-4), (0.5, 7e-4), (1.0, 3e-4), (1.0, 7e-4)
    }  # fmt: skip
    assert {(recipe.freeze.seed, recipe.train.seed) for recipe in grid} == {(1, 1), (2, 2)}
    assert {recipe.train.max_steps for recipe in grid} == {4}
    assert Path(grid[0].output).name == "trainable_fraction=0.5,learning_rate=3e-4-1"


def test_grid_varies_whole_sections(tmp_path):
    vary = ["method={},{lora: {r: 4}}"]
    grid = make_grid("tinyworld-continual", [], vary, 1, tmp_path)
    assert [recipe.method.names for recipe in grid] == [(), ("lora",)]
    assert grid[1].method.lora.r == 4


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ("train.learning_rate", "expected key=value,value"),
        ("train.learning_rate=", "expected key=value,value"),
        ("train.lerning_rate=1,2", "unknown key 'lerning_rate'"),
        ("train.seed=1,2", "hft compare sets it itself"),
    ],
)
def test_fault_in_the_grid_is_named_before_anything_runs(tmp_path, vary, expected):
    with pytest.raises(RecipeError, match=re.escape(expected)):
        make_grid("tinyworld", [], [vary], 2, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
