"""What `hft plan --measure` does not measure, and files that options cannot write."""

import pytest
from comparing.matrices import ROWS, TASKS, write
from written_runs import write_run

from hftcli.commands.look import refuse_unmeasured
from hftcli.errors import InputError
from hftcli.recipe.loading import load_recipe


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("launch.offload=optimizer", "launch.offload: optimizer"),
        ("method={lora: {}}", "method.lora"),
        ("method={ia3: {}}", "method.ia3"),
        ("method={peft: {type: LORA}}", "method.peft"),
        ("train.optim=adafactor", "train.optim: adafactor"),
    ],
)
def test_what_is_measured_is_what_the_recipe_trains(override: str, named: str):
    with pytest.raises(InputError, match=f"the recipe has {named}"):
        refuse_unmeasured(load_recipe(None, [override]))


@pytest.mark.parametrize("override", ["train.optim=adamw_torch", "data.max_length=64", "launch.offload=none"])
def test_steps_of_adamw_on_the_weights_are_measured(override: str):
    refuse_unmeasured(load_recipe(None, [override]))


def test_a_folder_is_no_file_to_write(hft, tmp_path):
    matrix = write(tmp_path, {"tasks": TASKS, "scores": ROWS})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n")
    for name in ("page.html", "figure.svg", "answers.json"):
        (tmp_path / name).mkdir()
    for option, command in {
        "--html": ("report", matrix, "--html", tmp_path / "page.html"),
        "--figure": ("report", matrix, "--figure", tmp_path / "figure.svg"),
        "--output": ("generate", "tinyworld", "--prompts", prompts, "--output", tmp_path / "answers.json"),
    }.items():
        assert f"{option} {command[-1]} is a folder" in hft(*command, code=2).stderr
    for command in (
        ("eval", "--model", "tinyworld", "--tasks", "tinyworld/facts", "--output", tmp_path / "answers.json"),
        ("compare", tmp_path / "run", "--html", tmp_path / "page.html"),
        ("compare", tmp_path / "run", "--figure", tmp_path / "figure.svg"),
    ):
        assert f"{command[-1]} is a folder" in hft(*command, code=2).stderr
    assert f"{prompts} is a file" in hft("report", matrix, "--html", prompts / "page.html", code=2).stderr


@pytest.mark.parametrize("options", [(), ("--lost",), ("--json", "--lost"), ("--latex",)])
def test_a_round_is_no_run_to_report(hft, tmp_path, options):
    """Its questions before are its run's, and `--lost` would find none of them."""
    run = write_run(tmp_path / "run")
    said = hft("report", run / "rounds" / "00-sft", *options, code=2).stderr
    assert "is a round, and a report is of its run" in said
    assert f"hft report {run}" in " ".join(said.split())


def test_a_model_by_a_key_is_examined_as_one_of_a_recipe(hft, tmp_path):
    assert "nowhere" in hft("doctor", "--set", f"model.path={tmp_path / 'nowhere'}", code=2).stdout


def test_no_process_is_no_number_of_processes(hft):
    for command in (("sft",), ("plan",), ("doctor",), ("eval", "--model", "tinyworld", "--tasks", "tinyworld/facts")):
        said = hft(*command, "--num-processes", 0, code=2).stderr
        assert "--num-processes" in said
        assert "greater than or equal" in said
