"""A Mac's GPU, which stand_in_gpu.py stands for: what is asked of it is what it can, and gives what the processor gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_in_gpu import NoFloat64
from transformers import AutoConfig, AutoModelForCausalLM

from hftcli import PACKAGE
from hftcli.runs.run import Round, Run

STAND_IN = Path(__file__).parents[1] / "stand_in_gpu.py"
BRIEF = {"train.max_steps": 2, "eval.max_examples": 10}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="hft takes the NVIDIA GPU that is here")


def run_on_gpu(*arguments: object) -> str:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}
    command = [sys.executable, str(STAND_IN), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def train_on_gpu(hft, settings, tmp_path):
    """A round of a run of one."""

    def train(name: str, *objective: str, **values: object) -> Round:
        hft(*objective, "--output", tmp_path / name, "--dry-run", *settings({**BRIEF, **values}))
        (round_,) = Run(tmp_path / name).rounds
        run_on_gpu("hftcli.training.worker", round_.folder)
        result = round_.read_result()
        assert (result.hardware.device, result.precision, result.num_steps) == ("stand-in (MPS)", "float32", 2)
        return round_

    return train


@pytest.mark.slow
def test_a_round_is_that_of_the_processor(hft, settings, tmp_path, train_on_gpu):
    on_gpu = train_on_gpu("gpu", "sft")
    hft("sft", "--output", tmp_path / "cpu", *settings({**BRIEF, "train.bf16": False}))
    (on_cpu,) = Run(tmp_path / "cpu").rounds
    weights = [round_.checkpoint / "model.safetensors" for round_ in (on_gpu, on_cpu)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for moment in ("before", "after"):
        found, expected = (getattr(round_.read_scores(), moment) for round_ in (on_gpu, on_cpu))
        assert len(expected) == 3
        for name, score in expected.items():
            assert (found[name].score, found[name].nll) == pytest.approx((score.score, score.nll), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["magnitude", "spectrum", "wanda", "fisher", "gradient"])
def test_units_are_scored(train_on_gpu, rank):
    train_on_gpu("run", "sft", **{"freeze.rank": rank})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "values"),
    [
        (("dpo",), {}),
        (("sft", "quiet"), {}),
        (("sft",), {"freeze.grain": "columns"}),
        (("sft",), {"launch.offload": "optimizer"}),
        (("sft",), {"train.activation_checkpointing": True}),
    ],
    ids=["pairs", "directions", "columns", "offload", "checkpointing"],
)
def test_other_rounds(train_on_gpu, objective, values):
    train_on_gpu("run", *objective, **values)


@pytest.mark.slow
def test_an_evaluation_is_that_of_the_processor(hft, tmp_path):
    """Of choices and of several right answers, and of texts that the base draws."""
    rows = {
        "choices": {"question": "Where?", "choices": ["here", "there"], "answer": 0},
        "answers": {"question": "Who?", "answers": ["a fox", "the fox"]},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    tasks = ",".join(("tinyworld/facts", *(str(tmp_path / f"{name}.jsonl") for name in rows)))
    arguments = ("eval", "--model", "tinyworld", "--base", "tinyworld", "--tasks", tasks, "--max-examples", "5", "--json")
    found, expected = json.loads(run_on_gpu("hftcli", *arguments)), json.loads(hft(*arguments).stdout)
    assert len(expected["tasks"]) == 3
    for name, score in expected["tasks"].items():
        assert (found["tasks"][name]["score"], found["tasks"][name]["nll"]) == pytest.approx((score["score"], score["nll"]))
    assert found["base_text"]["num_tokens"] == expected["base_text"]["num_tokens"]
    assert found["base_text"]["base_nll"] == pytest.approx(expected["base_text"]["base_nll"])


def test_a_step_makes_no_float64_inside():
    """By torch's own meta device, which has types and shapes alone: forward and backward."""
    config = AutoConfig.from_pretrained(PACKAGE / "tinyworld" / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        ids_BT = torch.zeros(2, 8, dtype=torch.long)
        with NoFloat64():
            model(input_ids=ids_BT, labels=ids_BT).loss.backward()
            with pytest.raises(TypeError, match="float64"):
                model(input_ids=ids_BT).logits.double()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
