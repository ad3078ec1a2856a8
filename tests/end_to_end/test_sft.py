"""`hft sft` from the command line to the checkpoint, on real models and real rows, in real processes."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hftcli import PACKAGE
from hftcli.runs.run import Round


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in Round(run / "rounds" / "00-sft").read_metrics()]


@pytest.fixture(scope="module")
def one_process(hft, settings, small, tmp_path_factory) -> Path:
    """A finished run in one process."""
    run = tmp_path_factory.mktemp("runs") / "one"
    hft("sft", "--output", run, *settings(small))
    return run


def test_the_checkpoint_is_a_plain_folder_that_loads_and_generates(one_process):
    checkpoint = one_process / "rounds" / "00-sft" / "checkpoint"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    generated = model.generate(input_ids=prompt.input_ids, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > prompt.input_ids.shape[1]


def test_verify_agrees_by_text_and_by_json(hft, one_process):
    assert "verified: 22 of 22 frozen parameters bit-identical" in hft("verify", one_process).stdout
    found = json.loads(hft("verify", one_process / "rounds" / "00-sft", "--json").stdout)
    assert (found["num_frozen"], found["num_trained"], found["violations"], found["unmoved"]) == (22, 25, [], [])


def test_what_the_plan_froze_is_what_the_files_keep(one_process, shared):
    """Independent of the product's own comparison."""
    round_ = Round(one_process / "rounds" / "00-sft")
    plan = round_.read_plan()
    start = load_file(shared / "models" / "stories260K" / "model.safetensors")
    end = load_file(round_.checkpoint / "model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in plan.frozen)
    assert not any(torch.equal(start[name], end[name]) for name in plan.trained)


def test_plan_is_what_the_round_does(hft, settings, small, one_process):
    planned = json.loads(hft("plan", "--json", *settings(small)).stdout)
    round_ = one_process / "rounds" / "00-sft"
    assert json.loads((round_ / "freeze_plan.json").read_text())["fingerprint"] == planned["fingerprint"]
    result = json.loads((round_ / "result.json").read_text())
    assert result["gradient_bytes"] == planned["memory"]["half"]["gradients_bytes"]
    assert result["optimizer_bytes"] == planned["memory"]["half"]["optimizer_bytes"]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_two_ranks_agree_with_one_process(hft, settings, small, one_process, tmp_path, stage):
    run = tmp_path / "two"
    small = small | {"launch.zero_stage": stage, "train.per_device_train_batch_size": 4}
    hft("sft", "--output", run, "--num-processes", 2, *settings(small))
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-3)
    one, two = (Round(path / "rounds" / "00-sft").read_result() for path in (one_process, run))
    assert two.rank_fingerprints == (one.fingerprint, one.fingerprint)
    assert two.num_tokens == one.num_tokens
    hft("verify", run)
    weights = [load_file(path / "rounds" / "00-sft" / "checkpoint" / "model.safetensors") for path in (one_process, run)]
    for name in Round(run / "rounds" / "00-sft").read_plan().frozen:
        assert torch.equal(weights[0][name], weights[1][name])


def measure_move(run: Path, start: Path) -> float:
    """Distance of the weights from where they started."""
    round_ = Round(run / "rounds" / "00-sft")
    before, after = load_file(start / "model.safetensors"), load_file(round_.checkpoint / "model.safetensors")
    return sum((after[name] - before[name]).square().sum().item() for name in before) ** 0.5


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_adapters_are_one_line(hft, settings, small, one_process, tmp_path, method):
    run = tmp_path / "run"
    shown = hft("sft", "--output", run, *settings(small | {f"method.{method}": "{}"})).stdout
    assert f"weights of {method} trained (" in shown
    hft("verify", run)
    rounds = [Round(path / "rounds" / "00-sft") for path in (run, one_process)]
    assert (rounds[0].adapter / "adapter_model.safetensors").exists()
    assert set(rounds[0].read_plan().trained) < set(rounds[1].read_plan().trained)
    assert losses(run)[-1] < losses(run)[0]


def test_the_distance_penalty_is_one_line_and_holds_the_weights(hft, settings, small, one_process, tmp_path):
    hft("sft", "--output", tmp_path / "run", *settings(small | {"method.l2sp.strength": 100}))
    hft("verify", tmp_path / "run")
    assert 0 < measure_move(tmp_path / "run", small["model.path"]) < 0.9 * measure_move(one_process, small["model.path"])


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """Random weights, with an untied head that is large enough for ZeRO 3 to keep in pieces."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096, tie_word_embeddings=False)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model").save_pretrained(folder)
    return folder


def test_held_out_rows_have_the_loss_that_training_on_them_starts_with(hft, settings, small, tmp_path):
    """One step on all rows at once, which are held out too: its loss is their likelihood before."""
    rows = {"data.max_examples": 8, "eval.held_out.max_examples": 8, "train.global_batch_size": 8}
    rows |= {"eval.held_out.path": small["data.path"], "train.per_device_train_batch_size": 8, "train.max_steps": 2}
    run = tmp_path / "held"
    printed = hft("sft", "--output", run, *settings(small | rows)).stdout
    scores = Round(run / "rounds" / "00-sft").read_scores()
    before, after = scores.before["held-out rows"], scores.after["held-out rows"]
    assert (before.score, before.num_examples) == (None, 8)
    assert losses(run)[0] == pytest.approx(before.nll, abs=1e-4)
    assert after.nll < before.nll
    assert "held-out rows" in printed


@pytest.fixture(scope="module")
def wide(wide_model) -> dict[str, object]:
    """Three steps that are scored before and after."""
    return {
        "model.path": wide_model,
        "train.max_steps": 3,
        "train.logging_steps": 1,
        "train.per_device_train_batch_size": 32,
        "eval.tasks": "[tinyworld/skill]",
    }


@pytest.fixture(scope="module")
def wide_run(hft, settings, wide, tmp_path_factory) -> Path:
    """Of one process, which ZeRO leaves as it is at every stage."""
    run = tmp_path_factory.mktemp("runs") / "wide"
    hft("sft", "--recipe", "tinyworld", "--output", run, *settings(wide))
    return run


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_score_as_one_process_does(hft, settings, wide, wide_run, tmp_path, stage):
    """Scored before and after training; ranks and batches do not divide the number of questions."""
    two_ranks = {"launch.zero_stage": stage, "launch.num_processes": 2, "train.per_device_train_batch_size": 16}
    run = tmp_path / "two"
    hft("sft", "--recipe", "tinyworld", "--output", run, *settings(wide | two_ranks))
    assert losses(run) == pytest.approx(losses(wide_run), abs=1e-3)
    one, two = (Round(path / "rounds" / "00-sft").read_scores() for path in (wide_run, run))
    for moment in ("before", "after"):
        first, second = (getattr(scores, moment)["tinyworld/skill"] for scores in (one, two))
        assert second.nll == pytest.approx(first.nll, abs=1e-3)
        assert second.score == first.score


def test_four_micro_batches_give_the_loss_of_one_batch(hft, settings, small, one_process, tmp_path):
    run = tmp_path / "micro"
    hft("sft", "--output", run, *settings(small | {"train.per_device_train_batch_size": 2}))
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-4)


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(hft, settings, small, one_process):
    result = one_process / "rounds" / "00-sft" / "result.json"
    before = result.stat().st_mtime_ns
    hft("sft", "--output", one_process, *settings(small))
    assert result.stat().st_mtime_ns == before
    refused = hft("sft", "--output", one_process, *settings(small | {"freeze.seed": 7}), code=2)
    assert "holds the run of another recipe (differs in freeze.seed)" in refused.stderr
    assert result.stat().st_mtime_ns == before


def test_a_run_that_starts_from_a_run_draws_another_half(hft, settings, small, one_process, tmp_path):
    run = tmp_path / "next"
    hft("sft", "--output", run, *settings(small | {"model.path": one_process}))
    first, second = (Round(path / "rounds" / "00-sft") for path in (one_process, run))
    assert second.read_spec().index == 1
    assert second.read_plan().fingerprint != first.read_plan().fingerprint
    assert json.loads((run / "manifest.json").read_text())["parent"] == str(one_process.resolve())
    hft("verify", run)


@pytest.mark.parametrize(("kind", "message"), [("trained", "did not move"), ("frozen", "but moved")])
def test_verify_finds_a_tensor_that_it_should_not(hft, one_process, tmp_path, shared, kind, message):
    run = tmp_path / "tampered"
    shutil.copytree(one_process, run)
    round_ = Round(run / "rounds" / "00-sft")
    name = getattr(round_.read_plan(), kind)[-1]
    file = round_.checkpoint / "model.safetensors"
    weights = load_file(file)
    if kind == "frozen":
        weights[name].view(torch.int32).view(-1)[0] ^= 1  # the last bit of one weight
    else:
        weights[name] = load_file(shared / "models" / "stories260K" / "model.safetensors")[name]
        result = json.loads(round_.result_path.read_text())
        result["updates"][name] = 0.0
        round_.result_path.write_text(json.dumps(result))
    save_file(weights, file, metadata={"format": "pt"})
    assert f"{message}: {name}" in hft("verify", run, code=3).stdout


def test_a_loss_that_is_not_a_number_stops_the_round(hft, settings, small, tmp_path):
    run = tmp_path / "nan"
    wild = {"train.learning_rate": 1e30, "train.warmup_steps": 0, "train.max_grad_norm": 0}
    failed = hft("sft", "--output", run, *settings(small | wild), code=1)
    assert "the loss became" in failed.stderr
    assert "fix: " in failed.stderr
    assert not (run / "rounds" / "00-sft" / "result.json").exists()
    assert not math.isfinite(losses(run)[-1])


def test_a_stopped_run_starts_its_round_again(hft, settings, small, one_process, tmp_path):
    """What a crash leaves: a round without a result."""
    run = tmp_path / "crashed"
    shutil.copytree(one_process, run)
    whole = (run / "rounds" / "00-sft" / "checkpoint" / "model.safetensors").read_bytes()
    (run / "rounds" / "00-sft" / "result.json").unlink()
    hft("sft", "--output", run, *settings(small))
    assert (run / "rounds" / "00-sft" / "checkpoint" / "model.safetensors").read_bytes() == whole


def test_dry_run_prints_the_command_and_trains_nothing(hft, settings, small, tmp_path):
    small = small | {"train.per_device_train_batch_size": 4}
    printed = hft("sft", "--output", tmp_path / "dry", "--dry-run", "--num-processes", 2, *settings(small)).stdout
    assert "deepspeed.launcher.runner --num_gpus 2" in printed
    assert not (tmp_path / "dry" / "rounds" / "00-sft" / "metrics.jsonl").exists()
