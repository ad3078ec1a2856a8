"""What is given with `--set` sets its key and no other, the last word wins, and a written recipe reads back the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hftcli.errors import RecipeError
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.recipe import Recipe

# With what YAML has a meaning for, and letters of several scripts.
TEXTS = st.text("aBcno0179e.:,;-_+=/\\#&*!|>%@`'\"?~{}[]() é你🙂", min_size=1, max_size=20)
PATHS = TEXTS.filter(lambda text: not text.startswith("~"))  # which is the user's home
COUNTS = st.integers(1, 10**9)
POSITIVE = st.floats(0, 1e6, exclude_min=True, allow_subnormal=False)
KEYS: dict[str, st.SearchStrategy[Any]] = {
    "model.path": PATHS,
    "model.dtype": st.sampled_from([None, "float32", "bfloat16", "float16"]),
    "data.path": PATHS,
    "data.split": TEXTS,
    "data.max_length": st.integers(8, 10**9),
    "data.max_examples": st.none() | COUNTS,
    "freeze.group": st.sampled_from(["category", "layer", "model"]),
    "freeze.trainable_fraction": st.floats(0, 1, exclude_min=True),
    "freeze.seed": st.integers(),
    "train.warmup_steps": POSITIVE,
    "train.max_steps": st.integers(1, 10**9),
    "train.learning_rate": POSITIVE,
    "train.packing": st.booleans(),
    "train.global_batch_size": COUNTS,
    "train.seed": st.integers(0, 2**31),
    "train.adam_beta2": st.sampled_from([0.9, 0.95, 0.999]),
    "eval.tasks": st.lists(PATHS).map(tuple),
    "eval.max_examples": st.none() | COUNTS,
    "output": PATHS,
}
CHANGES = st.sampled_from(sorted(KEYS)).flatmap(lambda key: st.tuples(st.just(key), KEYS[key]))


def write(key: str, value: Any) -> str:
    """As a user would: JSON is YAML."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def flatten(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found |= flatten(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return found


def list_values(recipe: Recipe) -> dict[str, Any]:
    return flatten(recipe.model_dump())


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return list_values(load_recipe("tinyworld", ["train.adam_beta2=0.5"]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@given(change=CHANGES)
def test_an_override_sets_its_key_and_no_other(plain: dict[str, Any], change: tuple[str, Any]):
    key, value = change
    found = list_values(load_recipe("tinyworld", ["train.adam_beta2=0.5", write(key, value)]))
    assert found == plain | {key: value}


@given(changes=st.lists(CHANGES, max_size=8))
def test_the_last_of_several_overrides_wins(plain: dict[str, Any], changes: list[tuple[str, Any]]):
    found = list_values(load_recipe("tinyworld", ["train.adam_beta2=0.5", *(write(*change) for change in changes)]))
    assert found == plain | dict(changes)


@settings(max_examples=20)
@given(changes=st.lists(CHANGES, max_size=8))
def test_a_written_recipe_reads_back_the_same(path: Path, changes: list[tuple[str, Any]]):
    recipe = load_recipe("tinyworld", [write(*change) for change in changes])
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_name_of_a_rule_leaves_what_the_file_says_besides(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: {path: m}\ndata: {path: d.jsonl}\n"
        "freeze: {seed: 7, embeddings: freeze, head: freeze, trainable_fraction: 0.25, grain: columns, part: random}\n",
        encoding="utf-8",
    )
    rule = load_recipe(path, ["freeze=quiet"]).freeze
    assert (rule.seed, rule.embeddings, rule.head, rule.trainable_fraction) == (7, "freeze", "freeze", 0.25)
    assert (rule.grain, rule.blocks, rule.part) == (("matrices", "directions"), 32, None)
    changed = load_recipe(path, ["freeze=quiet", "freeze.part=random", "freeze.blocks=16"]).freeze
    assert changed == rule.model_copy(update={"part": "random", "blocks": 16})
    assert load_recipe(path, ["freeze=quiet", "freeze=quiet"]).freeze == rule
    assert load_recipe(path, ["freeze={grain: entries}"]).freeze.seed == 42
    with pytest.raises(RecipeError, match="--set freeze=quiet: freeze: redraw draws whole matrices"):
        load_recipe(path, ["freeze.redraw.every=5", "freeze=quiet"])
