"""The grid of recipes that a comparison runs."""

import re
from pathlib import Path

import pytest
from written_runs import FACTS, SKILL, write_run

from hftcli.comparing.comparison import compare_runs
from hftcli.comparing.grid import aim_at, choose_settings, make_grid
from hftcli.errors import RecipeError
from hftcli.recipe.loading import load_recipe
from hftcli.reporting.measures import describe_choice


def test_grid_is_the_product_with_a_folder_for_each_run(tmp_path):
    vary = ["freeze.trainable_fraction=0.5,1.0", "train.learning_rate=3e-4,7e-4"]
    grid = make_grid("tinyworld", ["train.max_steps=4"], vary, (1, 2), tmp_path)
    assert len({planned.settings for planned in grid}) == 4
    grid = [planned.recipe for planned in grid]
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
    grid = [planned.recipe for planned in make_grid("tinyworld-continual", [], vary, (1,), tmp_path)]
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
        make_grid("tinyworld", [], [vary], (1, 2), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("vary", "expected", "fix"),
    [
        (
            ["train.learning_rate=3e-4", "train.max_steps=4", "train.learning_rate=7e-4"],
            "--vary train.learning_rate is given twice",
            "--vary train.learning_rate=A,B",
        ),
        (["method.lora.r=4,8", "method={},{lora: {}}"], "--vary method would write over --vary method.lora.r", "before it"),
        (["train.max_steps=4,4"], "two runs would be written to", "each value once"),
    ],
)
def test_values_that_would_be_lost_are_refused_before_anything_runs(tmp_path, vary, expected, fix):
    with pytest.raises(RecipeError, match=re.escape(expected)) as caught:
        make_grid("tinyworld", [], vary, (1,), tmp_path / "runs")
    assert fix in caught.value.fix
    assert not (tmp_path / "runs").exists()


def test_a_key_inside_a_section_that_is_varied_before_it_refines_that(tmp_path):
    vary = ["freeze={grain: columns},{grain: biases}", "freeze.trainable_fraction=0.25,0.5"]
    found = [planned.recipe.freeze for planned in make_grid("tinyworld", [], vary, (1,), tmp_path)]
    expected = [("columns", 0.25), ("columns", 0.5), ("biases", 0.25), ("biases", 0.5)]
    assert [(freeze.grain, freeze.trainable_fraction) for freeze in found] == expected


def test_settings_are_those_that_none_of_the_methods_others_beats(tmp_path):
    """On the seeds that choose: half is best at the second rate or the third, full at its second alone."""
    vary = ["freeze.trainable_fraction=0.5,1.0", "train.learning_rate=3e-4,5e-4,7e-4"]
    grid = make_grid("tinyworld", [], vary, (1, 2), tmp_path)
    # Learning and forgetting.
    scores = {
        (0.5, 3e-4): (0.4, 0.3), (0.5, 5e-4): (0.5, 0.1), (0.5, 7e-4): (0.6, 0.2),
        (1.0, 3e-4): (0.5, 0.4), (1.0, 5e-4): (0.9, 0.3), (1.0, 7e-4): (0.8, 0.5),
    }  # fmt: skip
    for planned in grid:
        recipe = planned.recipe
        learned, lost = scores[recipe.freeze.trainable_fraction, recipe.train.learning_rate]
        overrides = [*planned.settings, f"train.seed={recipe.train.seed}", f"freeze.seed={recipe.freeze.seed}"]
        write_run(Path(recipe.output), *overrides, rows=({FACTS: 1.0, SKILL: 0.0}, {FACTS: 1.0 - lost, SKILL: learned}))
    comparison = compare_runs([Path(planned.recipe.output) for planned in grid], merges_settings=True)
    assert choose_settings(grid, comparison) == [
        ("freeze.trainable_fraction=1.0", "train.learning_rate=5e-4"),
        ("freeze.trainable_fraction=0.5", "train.learning_rate=5e-4"),
        ("freeze.trainable_fraction=0.5", "train.learning_rate=7e-4"),
    ]
    assert describe_choice(comparison, 2) == (
        "settings chosen on 2 other seeds, by learning tinyworld/skill: full 0.0005; half 0.0005 or 0.0007"
    )


def test_other_tasks_take_the_place_of_the_recipes_own():
    found = load_recipe("tinyworld", aim_at("tinyworld", [], ["tinyworld/topic"]))
    assert found.data.path == "tinyworld/topic"
    assert found.eval.tasks == ("tinyworld/facts", "tinyworld/facts-reworded", "tinyworld/topic")
    overrides = aim_at("tinyworld-continual", ["continual.order=2"], ["tinyworld/topic", "tinyworld/skill"])
    found = load_recipe("tinyworld-continual", overrides, "continual")
    assert found.continual.tasks == ("tinyworld/topic", "tinyworld/skill")
    assert found.continual.order is None
    with pytest.raises(RecipeError, match="the recipe learns one task, and 2 are given"):
        aim_at("tinyworld", [], ["tinyworld/topic", "tinyworld/skill"])
