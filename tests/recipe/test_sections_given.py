"""How a recipe is read: numbers and texts, sections that are null or opened, what comes without a recipe."""

from pathlib import Path
from typing import get_origin

import pytest

from hftcli.errors import RecipeError
from hftcli.freezing.rule import FreezeRule
from hftcli.recipe.evaluation import EvalSection, HeldOutSection
from hftcli.recipe.loading import describe_defaults, dump_recipe, find_recipe, load_recipe
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.section import open_section
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.recipe.slurm import SlurmSection

BASE = ("model.path=m", "data.path=d.jsonl")


def list_sections(model: type = Recipe, prefix: str = "") -> list[tuple[str, type]]:
    found = []
    for name, field in model.model_fields.items():
        if (section := open_section(field.annotation)) and get_origin(field.annotation) is not tuple:
            found += [(f"{prefix}{name}", section), *list_sections(section, f"{prefix}{name}.")]
    return found


SECTIONS = list_sections()


@pytest.mark.parametrize("key", [key for key, _ in SECTIONS])
def test_every_section_can_be_null(key, tmp_path):
    """In a file and on the command line alike: one that is always there then has its defaults."""
    if key == "model":
        with pytest.raises(RecipeError, match=r"model\.path is missing"):
            load_recipe(None, [*BASE, "model=null"])
        return
    plain = load_recipe("tinyworld-continual" if key == "continual" else None, BASE if key not in ("data", "continual") else ())
    nested = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(key.split(".")))
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: m}\n" + nested)
    given = load_recipe(path, ["data.path=d.jsonl"] if key != "data" else ["data={path: d.jsonl}"], needs_rows=False)
    section, fresh = given, load_recipe(None, BASE)
    for name in key.split("."):
        section, fresh = getattr(section, name), getattr(fresh, name)
    assert section == fresh
    assert isinstance(plain, Recipe)


@pytest.mark.parametrize(("key", "section"), SECTIONS)
def test_every_section_can_be_opened_by_a_dotted_key(key, section, tmp_path):
    """Be it null in a recipe that was resolved and written."""
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(load_recipe(None, BASE)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"{key}.no_such_key=1"])
    # Which other keys an adapter of PEFT's takes is PEFT's to say, by its type.
    expected = "method.peft.type is missing" if key == "method.peft" else f"unknown key 'no_such_key' under {key}"
    assert expected in caught.value.message


def test_an_adapter_is_asked_for_over_a_resolved_recipe(tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(load_recipe(None, BASE)))
    assert load_recipe(path, ["method.lora.r=4"]).method.lora.r == 4
    assert load_recipe(path, ["launch.slurm.partition=long"]).launch.slurm == SlurmSection(partition="long")
    assert load_recipe(path, ["method.lora.r=4", "method.lora=null"]).method == MethodSection()
    assert load_recipe("tinyworld", ["eval.held_out.path=h.jsonl", "eval.held_out=null"]).eval.held_out == HeldOutSection()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-8", 1e-8), ("1E5", 1e5), (".5", 0.5), ("+1.", 1.0), ("-0.0", 0.0), ("010", 10), ("0x10", 16), ("0o10", 8),
    ],
)  # fmt: skip
def test_numbers_are_what_they_look_like(text, expected):
    assert load_recipe(None, [*BASE, f"train.lr_scheduler_kwargs={{a: {text}}}", "train.lr_scheduler_type=cosine"]).train.extra[
        "lr_scheduler_kwargs"
    ] == {"a": expected}


def test_words_are_what_they_look_like(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: no}\ndata: {path: 2024-01-01, name: on}\nlaunch: {slurm: {time: 8:00:00}}\n")
    recipe = load_recipe(path)
    assert (recipe.model.path, recipe.data.path, recipe.data.name) == ("no", "2024-01-01", "on")
    assert recipe.launch.slurm.time == "8:00:00"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_a_path_of_the_users_own_takes_nothing_of_the_recipes(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "model: {path: m}\ndata: {path: hub/rows, name: small, split: train_sft}\n"
        "eval: {held_out: {path: hub/rows, name: small, split: test_sft}}\n"
    )
    recipe = load_recipe(path, ["data.path=my.jsonl", "eval.held_out.path=h.jsonl"])
    assert recipe.data == DataSection(path="my.jsonl")
    assert recipe.eval.held_out == HeldOutSection(path="h.jsonl")
    assert load_recipe(path, ["data.name=large", "data.path=hub/more"]).data.name == "large"
    assert load_recipe("smollm2", ["data.path=my.jsonl"]).data.name is None


def test_a_path_may_begin_at_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    places = {
        "model.path": "model", "model.chat_template": "a.jinja", "data.path": "rows", "data.root": "tasks",
        "output": "runs/mine", "eval.held_out.path": "h.jsonl", "launch.hostfile": "hosts", "freeze.keep.path": "kept.jsonl",
    }  # fmt: skip
    given = [f"{key}=~/{place}" for key, place in places.items()]
    recipe = load_recipe(None, [*given, "eval.tasks=[~/known.jsonl, known, '~known']", "freeze.grain=directions"])
    assert recipe.eval.tasks == (f"{tmp_path}/known.jsonl", "known", "~known")
    for key, place in places.items():
        value = recipe
        for name in key.split("."):
            value = getattr(value, name)
        assert value == f"{tmp_path}/{place}"
    assert recipe.folder == tmp_path / "runs" / "mine"
    others = ["data.sources=[{path: ~/a}, {path: b}]", "freeze.rank=fisher", "freeze.importance.path=~/c"]
    recipe = load_recipe(None, ["model.path=m", *others])
    assert [part.path for part in recipe.data.sources] == [f"{tmp_path}/a", "b"]
    assert recipe.freeze.importance.path == f"{tmp_path}/c"


@pytest.mark.parametrize("key", ["name: small", "split: dev", "revision: main", "max_examples: 5"])
def test_held_out_rows_have_a_path(key, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"model: {{path: m}}\ndata: {{path: d.jsonl}}\neval:\n  held_out: {{{key}}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    expected = f"{path}:4: eval.held_out: {key.partition(':')[0]} would have no effect without rows: give eval.held_out.path"
    assert caught.value.message.startswith(expected)
    load_recipe(path, ["eval.held_out.path=h.jsonl"])
    load_recipe(path, ["eval.held_out=null"])
    load_recipe(None, [*BASE, "eval.held_out.split=test"])  # what is so without a word


def test_a_model_and_rows_without_a_recipe_take_the_defaults():
    recipe = load_recipe(None, BASE)
    assert recipe.train == TrainSection()
    assert recipe.eval == EvalSection()
    assert recipe.freeze == FreezeRule()
    assert recipe.output == "runs/sft"
    assert describe_defaults(recipe) == (
        "no recipe: 1 epoch at learning rate 2e-05 (linear), batches of 32, at most 1024 tokens, 50% of each category trained; "
        "--set changes each"
    )
    with pytest.raises(RecipeError, match=r"no recipe, and no --set: data\.path is missing"):
        load_recipe(None, ["model.path=m"])
    assert load_recipe(None, ["model.path=m"], needs_rows=False).data.max_length == 1024


def test_the_quick_start_stays_one_with_rows_of_ones_own():
    recipe = load_recipe(None, ["data.path=my.jsonl"])
    assert (recipe.model.path, recipe.train.learning_rate, recipe.train.max_steps) == ("tinyworld", 7e-4, 200)


@pytest.mark.parametrize("tasks", ["a,b", "[a, b]", "trace"])
def test_other_tasks_take_the_defaults(tasks):
    with pytest.raises(RecipeError, match=r"model\.path is missing"):
        load_recipe(None, [f"continual.tasks={tasks}", "data.root=r"], "continual")
    recipe = load_recipe(None, [f"continual.tasks={tasks}", "data.root=r", "model.path=m"], "continual")
    assert recipe.train == TrainSection()
    assert recipe.eval.tasks == ()
    own = load_recipe(None, ['continual.tasks="tinyworld/sum,tinyworld/sale"'], "continual")
    assert own.train == load_recipe(Path(find_recipe("tinyworld-continual"))).train
