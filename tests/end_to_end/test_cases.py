"""Settings on which hft once fell short, on the small inputs that showed it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_weights import read_raw

Sft = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def cases(shared: Path, tmp_path_factory) -> Path:
    """The inputs, with the tiny models that are made for them."""
    if not (shared / "cases").is_dir():
        pytest.skip(f"the inputs are not at {shared / 'cases'}")
    folder = tmp_path_factory.mktemp("cases")
    for name in ("rows", "runs"):
        shutil.copytree(shared / "cases" / name, folder / name)
    command = [sys.executable, folder / "rows" / "make_models.py", shared / "models" / "MiniMind2-Small", folder / "rows" / "m"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def rows(cases, monkeypatch) -> Path:
    monkeypatch.chdir(cases / "rows")
    return cases / "rows"


@pytest.fixture
def runs(cases, shared, monkeypatch) -> list[str]:
    """In the folder of the recipes, what brings them to their model."""
    monkeypatch.chdir(cases / "runs")
    return ["--set", f"model.path={shared / 'models' / 'stories260K'}"]


@pytest.mark.slow
def test_a_start_of_two_types(hft, rows, tmp_path):
    """The matrices are stored in bfloat16 and the norms in float32: both keep their type, and what is frozen its bytes."""
    hft("sft", "--recipe", "base.yaml", "--output", tmp_path / "run", "--set", "model.path=m/mixed")
    round_ = tmp_path / "run" / "rounds" / "00-sft"
    start, trained = read_raw(rows / "m" / "mixed"), read_raw(round_ / "checkpoint")
    frozen = json.loads((round_ / "freeze_plan.json").read_text())["frozen"]
    assert {dtype for dtype, _, _ in start.values()} == {"BF16", "F32"}
    assert {name: tensor[:2] for name, tensor in trained.items()} == {name: tensor[:2] for name, tensor in start.items()}
    assert [name for name in frozen if trained[name] != start[name]] == []
    assert any("norm" in name for name in frozen)
    assert "bit-identical" in hft("verify", tmp_path / "run").stdout


@pytest.mark.slow
def test_a_base_model_with_another_end(hft, rows, tmp_path):
    hft("sft", "--recipe", "two.yaml", "--output", tmp_path / "run")
    command = [sys.executable, "generate.py", tmp_path / "run" / "rounds" / "00-sft" / "checkpoint"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "'A heron stands in the water.<|im_end|>'" in said
    assert int(said.split()[0]) < 40


def test_a_matrix_whose_base_is_the_best(hft, cases):
    """By arXiv 1801.10112, equation 3, the model before training does not count: 0.5 - 0.3 and 0.8 - 0.6."""
    shown = json.loads(hft("report", cases / "runs" / "matrix_base_best.json", "--json").stdout)
    assert shown["forgetting"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train.packing": True, "train.packing_strategy": "wrapped", "train.global_batch_size": 2,
             "train.per_device_train_batch_size": 2},
            "train.packing_strategy is not taken: hft packs whole rows, and attention never crosses their borders",
        ),
        (
            {"data.path": "plain.jsonl", "train.eos_token": "<|endoftext|>"},
            "train.eos_token is not taken: it acts after the rows are tokenized",
        ),
        (
            {"model.path": "m/gpt2", "data.max_length": 1024, "data.path": "long558.jsonl"},
            "data.max_length is 1024, but the model has 512 positions",
        ),
    ],
)  # fmt: skip
def test_rows_that_would_be_trained_otherwise_than_it_is_said(hft, settings, rows, tmp_path, changes, expected):
    done = hft("sft", "--recipe", "base.yaml", "--output", tmp_path / "run", "--dry-run", *settings(changes), code=2)
    assert expected in done.stderr


def test_the_default_recipe_on_six_rows(hft, settings, rows, tmp_path):
    changes = {"model.path": "m/llama", "data.path": "six.jsonl", "data.max_length": 256, "launch.num_processes": 1}
    done = hft("sft", "--output", tmp_path / "run", *settings(changes))
    assert "steps   1 of 32 sequences out of 6; learning rate up to 2e-05, linear, without a warm-up" in done.stderr
    metrics = (tmp_path / "run" / "rounds" / "00-sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["learning_rate"] for row in metrics] == [2e-5]


def test_smoothed_labels_of_a_loss_that_has_none(hft, settings, runs, tmp_path):
    changes = {"dpo.beta": 0.05, "dpo.label_smoothing": 0.1}
    done = hft("dpo", "--recipe", "dpo.yaml", "--output", tmp_path / "run", *runs, *settings(changes), code=2)
    assert "dpo.label_smoothing would have no effect beside dpo.loss_type sigmoid" in done.stderr


def test_an_end_that_would_be_saved_and_not_trained(hft, settings, runs, tmp_path):
    changes = {"train.eos_token": "<unk>"}
    done = hft("sft", "--recipe", "s.yaml", "--output", tmp_path / "run", *runs, *settings(changes), code=2)
    assert "train.eos_token is not taken" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", ["trail", "eosanswer"])
def test_a_task_that_is_learned_by_heart_is_known(hft, runs, cases, tmp_path, task):
    """The prompts of the one end with a blank, the answers of the other with the end token's text."""
    arguments = ["--recipe", "cl.yaml", "--tasks", task, "--output", tmp_path / "run", *runs]
    hft("continual", *arguments, "--set", f"data.root={cases}/runs/tasks")
    matrix = json.loads((tmp_path / "run" / "forgetting.json").read_text())
    assert matrix["scores"][-1] == [1.0]


@pytest.mark.slow
def test_answers_with_stops_in_them_can_be_given(hft, settings, runs, cases, tmp_path):
    """3.14, J. K. Rowling, A, Washington, D.C., 1,000, blue, C++: taught word for word, and asked."""
    changes = {"data.root": cases / "runs" / "tasks", "train.max_steps": 150}
    hft("continual", "--recipe", "cl.yaml", "--tasks", "qa", "--output", tmp_path / "run", *runs, *settings(changes))
    output = tmp_path / "eval.json"
    hft("eval", "--model", tmp_path / "run", "--tasks", "closed_book_stops.jsonl", "--output", output)
    assert json.loads(output.read_text())["tasks"]["closed_book_stops.jsonl"]["score"] == 1


def test_three_tasks_and_then_two(hft, runs, cases, tmp_path):
    """A dry run that nobody trained leaves no round to the next start."""
    arguments = [
        "--recipe",
        "cl.yaml",
        "--output",
        tmp_path / "run",
        "--dry-run",
        *runs,
        "--set",
        f"data.root={cases}/runs/tasks",
    ]
    hft("continual", "--tasks", "trail,eosanswer,qa", *arguments)
    shown = hft("continual", "--tasks", "qa,trail", *arguments).stdout
    assert sorted(path.name for path in (tmp_path / "run" / "rounds").iterdir()) == ["00-qa", "01-trail"]
    assert shown.count("hftcli.training.worker") == 2
