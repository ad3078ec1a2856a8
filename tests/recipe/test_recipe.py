"""A recipe is checked whole, and every fault names its place."""

import subprocess
import sys
from pathlib import Path

import pytest

from hftcli.errors import RecipeError
from hftcli.recipe.loading import dump_recipe, find_recipe, list_recipes, load_recipe
from hftcli.recipe.recipe import Recipe

GOOD = "model: {path: m}\ndata: {path: d.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def fail(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return caught.value.message


def test_defaults_are_the_papers_rule(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert (recipe.freeze.group, recipe.freeze.trainable_fraction, recipe.freeze.embeddings) == (
        "category",
        0.5,
        "train",
    )
    assert recipe.output == "runs/my"


@pytest.mark.parametrize("path", list_recipes(), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_open_with_their_command(path):
    assert isinstance(load_recipe(path), Recipe)
    assert path.read_text().startswith("# hft ")


def test_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = load_recipe(find_recipe("tulu"), ["train.neftune_noise_alpha=5"])
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_overrides_are_yaml_and_win(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["train.learning_rate=1e-5", "eval.tasks=[a, b]", "data.max_examples=7"])
    assert recipe.train.learning_rate == 1e-5
    assert recipe.eval.tasks == ("a", "b")
    assert recipe.data.max_examples == 7


def test_every_fault_at_once_with_line_key_and_guess(tmp_path):
    text = "model: {path: m}\ndata:\n  path: d\n  max_lenght: 10\ntrain:\n  lerning_rate: 1\n  num_train_epochs: many\n"
    message = fail(tmp_path, text, "freeze.trainable_fraction=1.5")
    assert "my.yaml:4: unknown key 'max_lenght' under data (did you mean 'max_length'?)" in message
    assert "my.yaml:7: train.num_train_epochs" in message
    assert "got 'many'" in message
    assert "--set freeze.trainable_fraction=1.5: freeze.trainable_fraction" in message


def test_misspelt_training_key_is_found_without_importing_torch(tmp_path):
    message = fail(tmp_path, GOOD + "train:\n  lerning_rate: 1\n")
    assert "my.yaml:4: unknown key 'lerning_rate' under train (did you mean 'learning_rate'?)" in message
    code = "import sys; from hftcli.recipe.loading import load_recipe; load_recipe('tulu'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_other_trainer_fields_pass(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD + "train: {adam_beta2: 0.95, loss_type: dft}\n"))
    assert recipe.train.extra == {"adam_beta2": 0.95, "loss_type": "dft"}


@pytest.mark.parametrize(
    ("key", "use"),
    [
        ("warmup_ratio", "train.warmup_steps"),
        ("max_seq_length", "data.max_length"),
        ("gradient_accumulation_steps", "train.global_batch_size"),
        ("gradient_checkpointing", "train.activation_checkpointing"),
        ("group_by_length", "train.train_sampling_strategy: group_by_length"),
        ("evaluation_strategy", "eval.tasks, or eval.held_out"),
    ],
)
def test_gone_and_derived_keys_name_their_successor(tmp_path, key, use):
    assert f"use {use}" in fail(tmp_path, GOOD + f"train: {{{key}: 1}}\n")


def test_a_setting_without_effect_is_refused(tmp_path):
    assert "train.eval_steps is not taken: hft evaluates before and after a round" in fail(
        tmp_path, GOOD + "train: {eval_steps: 10}\n"
    )
    assert "train.save_steps is not a key of hft: use checkpoint.save" in fail(tmp_path, GOOD + "train: {save_steps: 1}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {path: m\n", "my.yaml:2:1: not YAML"),
        ("- a\n- b\n", "my.yaml:1: a recipe is a mapping of sections, got a seq"),
        ("", "model.path is missing"),
        ("model: {path: m}\nmodel: {path: n}\n", "my.yaml:2: key 'model' is given twice, first at"),
        (GOOD + "modle: 1\n", "unknown key 'modle' (did you mean 'model'?)"),
        (GOOD + "train: 3\n", "my.yaml:3: train"),
        (GOOD + "freeze: {trainable_fraction: 0}\n", "my.yaml:3: freeze.trainable_fraction"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    assert expected in fail(tmp_path, text)


@pytest.mark.parametrize("override", ["train.learning_rate", "=3", "train..x=1"])
def test_override_without_form(tmp_path, override):
    assert f"--set {override}: expected key=value" in fail(tmp_path, GOOD, override)


def test_override_into_a_value(tmp_path):
    assert "output is a value, not a section" in fail(tmp_path, GOOD + "output: x\n", "output.a=1")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.learning_rate=.inf", "input should be a finite number, got inf"),
        ("train.learning_rate=inf", "input should be a finite number, got inf"),
        ("train.weight_decay=1e999", "input should be a finite number, got inf"),
        ("train.max_grad_norm=.inf", "input should be a finite number, got inf"),
        ("train.lr_scheduler_kwargs={power: .inf}", "input should be a finite number, got inf"),
        ("launch.timeout_minutes=.inf", "input should be a finite number, got inf"),
        ("train.seed=-1", "input should be greater than or equal to 0, got -1"),
        ("train.seed=4294967296", "input should be less than 4294967296"),
        ("train.data_seed=-1", "input should be greater than or equal to 0, got -1"),
        ("data.seed=-1", "input should be greater than or equal to 0, got -1"),
    ],
)
def test_numbers_that_nothing_could_take(tmp_path, override, reason):
    message = fail(tmp_path, GOOD, override)
    assert message.startswith(f"--set {override}: ")
    assert reason in message


def test_what_stands_in_no_section_is_placed_where_it_was_given(tmp_path):
    assert fail(tmp_path, GOOD, "lora.r=4").startswith("--set lora.r=4: unknown key 'lora'")


def test_a_value_of_a_choice_or_of_several_is_one_fault():
    for value in ("kto_pair", "5"):
        with pytest.raises(RecipeError) as caught:
            load_recipe("tinyworld-dpo", [f"dpo.loss_type={value}"])
        first, *others = caught.value.message.splitlines()
        assert first.startswith(f"--set dpo.loss_type={value}: dpo.loss_type: input should be 'sigmoid', ")
        assert not others or value == "5"
    for override, reason in (("loss_type=[]", "at least 1 item"), ("loss_weights=[0]", "greater than 0")):
        with pytest.raises(RecipeError, match=reason):
            load_recipe("tinyworld-dpo", [f"dpo.{override}"])


def test_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError) as caught:
        load_recipe("no-such.yaml")
    assert "tinyworld" in caught.value.fix


@pytest.mark.parametrize(("objective", "quick_start"), [("sft", "tinyworld"), ("dpo", "tinyworld-dpo")])
def test_methods_without_earlier_tasks(objective, quick_start):
    for method in ("lora: {}", "ia3: {}", "l2sp: {strength: 0.1}"):
        recipe = load_recipe(quick_start, [f"method={{{method}}}"], objective)
        assert recipe.method.names == (method.partition(":")[0],)
    for name in ("replay", "ewc", "gem", "agem", "olora"):
        expected = f"method.{name} defends earlier tasks, and `hft {objective}` has none: use `hft continual`"
        with pytest.raises(RecipeError, match=expected):
            load_recipe(quick_start, [f"method.{name}={{}}"], objective)
        assert load_recipe("tinyworld-continual", [f"method.{name}={{}}"]).method.names == (name,)
    with pytest.raises(RecipeError, match=r"method.l2sp.strength is missing"):
        load_recipe(quick_start, ["method.l2sp={}"], objective)
    with pytest.raises(RecipeError, match=r"unknown key 'r' under method.ia3 \(known: none\)"):
        load_recipe(quick_start, ["method.ia3.r=8"], objective)


def test_settings_of_the_fit_that_do_not_go_together():
    with pytest.raises(RecipeError, match="train.memory_bytes would have no effect: set train.fit: auto"):
        load_recipe(None, ["train.memory_bytes=1000"])
    with pytest.raises(RecipeError, match="train.activation_checkpointing is what train.fit chooses"):
        load_recipe(None, ["train.fit=auto", "train.activation_checkpointing=true"])
    with pytest.raises(RecipeError, match="train.fit does not count what method.ewc holds"):
        load_recipe("tinyworld-continual", ["train.fit=auto", "method={ewc: {}}"])
    assert load_recipe(None, ["train.fit=auto", "train.memory_bytes=1000"]).train.memory_bytes == 1000
