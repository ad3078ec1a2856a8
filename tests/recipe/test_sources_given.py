"""Several sources of rows in a recipe: as a list, beside other keys, replaced from the command line, and their faults."""

from pathlib import Path

import pytest

from hftcli.errors import RecipeError
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.sections import DataSection, SourceSection

LIST = """
model: {path: m}
data:
  - {path: a.csv, weight: 3}
  - {path: owner/b, name: fruit, split: dev, revision: main, weight: 1}
"""
SECTION = """
model: {path: m}
data:
  sources: [{path: a.csv, max_examples: 10}, {path: b.jsonl}]
  max_length: 64
"""
FIRST = SourceSection(path="a.csv", weight=3)
SECOND = SourceSection(path="owner/b", name="fruit", split="dev", revision="main", weight=1)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def test_a_list_is_short_for_sources(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, LIST), ["data.max_length=32"], "sft")
    assert recipe.data == DataSection(sources=(FIRST, SECOND), max_length=32)
    resolved = write(tmp_path, dump_recipe(recipe))
    assert load_recipe(resolved, (), "sft") == recipe


def test_sources_stand_beside_other_keys(tmp_path: Path):
    data = load_recipe(write(tmp_path, SECTION), ["data.max_examples=7"], "sft").data
    assert data.max_length == 64
    assert [source.max_examples for source in data.parts] == [7, 7]
    assert [source.max_examples for source in load_recipe(write(tmp_path, SECTION), (), "sft").data.parts] == [10, None]


def test_a_path_replaces_what_the_recipe_says_of_its_rows(tmp_path: Path):
    for text in (LIST, SECTION, "model: {path: m}\ndata: {path: owner/c, name: n, split: dev, revision: r}"):
        assert load_recipe(write(tmp_path, text), ["data.path=d.jsonl"], "sft").data.parts == (SourceSection(path="d.jsonl"),)
        given = ["data.path=d", "data.split=test"]
        assert load_recipe(write(tmp_path, text), given, "sft").data.parts == (SourceSection(path="d", split="test"),)
    other = load_recipe(write(tmp_path, "model: {path: m}\ndata: {path: c, name: n}"), ["data.sources=[{path: d}]"], "sft")
    assert other.data == DataSection(sources=(SourceSection(path="d"),))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("[{path: a, weigt: 1}]", "unknown key 'weigt' under data.sources.0 (did you mean 'weight'?)"),
        ("[{path: a, weight: 1, weight: 2}]", "my.yaml:2: key 'data.0.weight' is given twice, first at"),
        ("[{path: a, weight: true}]", "data.sources.0.weight: input should be a number, got True"),
        ("[{path: a, max_examples: true}]", "data.sources.0.max_examples: input should be a number, got True"),
        ("[{weight: 1}]", "data.sources.0.path is missing"),
        ("[{path: a, weight: 1}, {path: b}]", "give every one of the sources a weight, or none"),
        ("[{path: a, weight: 1}]", "data.sources.0.weight would have no effect: it is a share beside other"),
        ("{path: a, sources: [{path: b}]}", "path and sources are both given"),
        ("[a.jsonl]", "data.sources.0"),
    ],
)
def test_faults_of_sources_are_named(data: str, fault: str, tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, f"model: {{path: m}}\ndata: {data}"), (), "sft")
    assert fault in caught.value.message


def test_a_run_s_own_recipe_with_the_weight_of_one_source_is_read(tmp_path: Path):
    path = write(tmp_path, "model: {path: m}\ndata: [{path: a, weight: 1}]")
    assert load_recipe(path, (), "sft", is_written=True).data.sources == (SourceSection(path="a", weight=1),)


def test_a_key_that_is_given_twice_on_the_command_line():
    for given in (
        "data.sources=[{path: a, weight: 1, weight: 2}, {path: b, weight: 1}]",
        "data={path: a, weight: 1, weight: 2}",
    ):
        with pytest.raises(RecipeError, match="key 'weight' is given twice"):
            load_recipe(None, ["model.path=m", given], "sft")


@pytest.mark.parametrize(
    "key", ["bad_rows=drop", "special_tokens_in_text=escape", "ignore_columns=[a]", "seed=1", "revision=r"]
)
def test_a_sequence_of_tasks_takes_no_keys_of_rows(key: str):
    with pytest.raises(RecipeError, match="would have no effect under `hft continual`"):
        load_recipe("tinyworld-continual", [f"data.{key}"], "continual")
