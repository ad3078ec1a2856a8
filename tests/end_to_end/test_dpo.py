"""`hft dpo` from the command line to the checkpoint, on real models and real pairs, in real processes."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hftcli.runs.run import Round

STEPS = 4


@pytest.fixture(scope="module")
def pairs(shared: Path) -> dict[str, object]:
    """Four steps of eight real pairs, as conversations, with a small model."""
    return {
        "model.path": shared / "models" / "stories260K",
        "model.chat_template": "tulu",
        "data.path": shared / "data" / "preference" / "pandalm_human.jsonl",
        "data.max_length": 200,
        "data.max_examples": 18,
        "train.max_steps": STEPS,
        "train.learning_rate": 0.001,
        "train.global_batch_size": 8,
        "train.per_device_train_batch_size": 8,
        "train.logging_steps": 1,
        "eval.tasks": "[]",
        "eval.held_out.path": "null",
    }


def round_of(run: Path) -> Round:
    return Round(run / "rounds" / "00-dpo")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in round_of(run).read_metrics()]


@pytest.fixture(scope="module")
def one_process(hft, settings, pairs, tmp_path_factory) -> Path:
    """A finished run in one process, with its reference computed and kept."""
    run = tmp_path_factory.mktemp("runs") / "one"
    hft("dpo", "--output", run, *settings(pairs))
    return run


def test_the_first_loss_is_that_of_a_coin_and_the_frozen_half_is_kept(hft, one_process, shared):
    # Up to rounding: the reference's logits are computed tile by tile, the model's are kept.
    assert losses(one_process)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(one_process)[-1] < math.log(2) - 1e-3
    hft("verify", one_process)
    plan = round_of(one_process).read_plan()
    start = load_file(shared / "models" / "stories260K" / "model.safetensors")
    end = load_file(round_of(one_process).checkpoint / "model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in plan.frozen)
    assert not any(torch.equal(start[name], end[name]) for name in plan.trained)


@pytest.mark.parametrize("mode", ["shared", "full"])
def test_every_reference_gives_the_same_losses(hft, settings, pairs, one_process, tmp_path, mode):
    run = tmp_path / mode
    hft("dpo", "--output", run, *settings(pairs | {"reference": mode}))
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-5)
    start, precomputed, other = (
        (Path(pairs["model.path"]) / "model.safetensors").stat().st_size,
        round_of(one_process).read_result().reference,
        round_of(run).read_result().reference,
    )
    assert precomputed.num_bytes < other.num_bytes < 1.1 * start


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora: {}", "ia3: {}", "l2sp: {strength: 0.1}"])
def test_every_reference_gives_the_same_losses_under_a_method(hft, settings, pairs, tmp_path, method):
    found = {}
    for mode in ("precompute", "shared", "full"):
        hft("dpo", "--output", tmp_path / mode, *settings(pairs | {"reference": mode, "method": f"{{{method}}}"}))
        found[mode] = losses(tmp_path / mode)
        hft("verify", tmp_path / mode)
    assert found["precompute"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found["precompute"][-1] < math.log(2) - 1e-5
    assert found["precompute"] == pytest.approx(found["shared"], abs=1e-5)
    assert found["precompute"] == pytest.approx(found["full"], abs=1e-5)


SLOW = [(stage, mode) for mode in ("precompute", "shared", "full") for stage in (0, 1, 2, 3)]
FAST = [(3, "precompute")]


@pytest.mark.parametrize(
    ("stage", "mode"),
    FAST
    + [
        pytest.param(*combination, marks=pytest.mark.slow)
        for combination in SLOW
        if combination not in (*FAST, (3, "shared"))  # the last is refused, which has a test of its own
    ],
)
def test_two_ranks_agree_with_one_process(hft, settings, pairs, one_process, tmp_path, monkeypatch, stage, mode):
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))  # nothing is there to be reused
    run = tmp_path / "two"
    change = {"launch.zero_stage": stage, "train.per_device_train_batch_size": 4, "reference": mode}
    hft("dpo", "--output", run, "--num-processes", 2, *settings(pairs | change))
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-3)
    hft("verify", run)
    weights = [load_file(round_of(path).checkpoint / "model.safetensors") for path in (one_process, run)]
    for name in round_of(run).read_plan().frozen:
        assert torch.equal(weights[0][name], weights[1][name])


def test_the_reference_is_reused_until_the_model_or_the_template_changes(hft, settings, pairs, one_process, tmp_path):
    first = round_of(one_process).read_result().reference
    changes = {
        "same": {"dpo.beta": 0.2},
        "template": {"model.chat_template": tmp_path / "chat.jinja"},
        "model": {"model.path": tmp_path / "m"},
    }
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    shutil.copytree(round_of(one_process).checkpoint, tmp_path / "m")
    found = {}
    short = pairs | {"train.max_steps": 1, "train.warmup_steps": 0}
    for name, change in changes.items():
        hft("dpo", "--output", tmp_path / name, *settings(short | change))
        found[name] = round_of(tmp_path / name).read_result().reference
    assert (first.is_reused, found["same"].is_reused, found["same"].key) == (False, True, first.key)
    assert not found["template"].is_reused
    assert not found["model"].is_reused
    assert len({first.key, found["template"].key, found["model"].key}) == 3


@pytest.mark.slow
def test_a_round_that_is_killed_starts_again_with_the_reference_it_computed(
    hft, settings, pairs, one_process, tmp_path, monkeypatch
):
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))  # nothing is there to be reused
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "hftcli", "dpo", "--output", run, *settings(pairs)]
    front = psutil.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache" / "references").glob("*.safetensors")):
        assert time.monotonic() < deadline, "the reference was not computed"
        time.sleep(0.01)
    for process in [*front.children(recursive=True), front]:
        process.kill()
    front.wait()
    assert not round_of(run).result_path.exists()
    hft("dpo", "--output", run, *settings(pairs))
    assert round_of(run).read_result().reference.is_reused
    assert losses(run) == losses(one_process)


def test_a_round_after_an_sft_run_draws_another_half(hft, settings, pairs, small, tmp_path):
    hft("sft", "--output", tmp_path / "sft", *settings(small))
    hft("dpo", "--output", tmp_path / "dpo", *settings(pairs | {"model.path": tmp_path / "sft"}))
    first, second = Round(tmp_path / "sft" / "rounds" / "00-sft"), round_of(tmp_path / "dpo")
    assert second.read_spec().index == 1
    assert second.read_plan().fingerprint != first.read_plan().fingerprint
    assert json.loads((tmp_path / "dpo" / "manifest.json").read_text())["parent"] == str((tmp_path / "sft").resolve())
    hft("verify", tmp_path / "dpo")


@pytest.mark.slow
def test_the_quick_start_learns_what_is_preferred(hft, tmp_path):
    shown = hft("dpo", "--output", tmp_path / "run").stdout
    assert "held-out pairs" in shown
    result, scores = round_of(tmp_path / "run").read_result(), round_of(tmp_path / "run").read_scores()
    assert (result.pairs.before.reward_accuracy, result.pairs.before.reward_margin) == (0.5, 0.0)
    assert result.pairs.after.reward_accuracy > 0.9
    assert result.pairs.after.kl > 0
    assert scores.before["tinyworld/facts"].score > 0.99


@pytest.mark.slow
def test_two_ranks_measure_as_one_process_does(hft, settings, tmp_path):
    found = []
    for num_processes in (1, 2):
        run = tmp_path / str(num_processes)
        batch = {"train.per_device_train_batch_size": 32 // num_processes, "launch.num_processes": num_processes}
        change = {"train.max_steps": 4, "launch.zero_stage": 3}
        hft("dpo", "--output", run, *settings(change | batch))
        found.append(round_of(run).read_result().pairs.after)
    one, two = found
    assert two.num_pairs == one.num_pairs == 150
    assert two.reward_margin == pytest.approx(one.reward_margin, abs=1e-3)
    assert two.kl == pytest.approx(one.kl, abs=0.02)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dpo.bta": 1}, "unknown key 'bta' under dpo (did you mean 'beta'?)"),
        ({"dpo.loss_type": "sigmod"}, "dpo.loss_type"),
        ({"train.loss_type": "ipo"}, "train.loss_type is not a key of hft: use dpo.loss_type"),
        ({"dpo.learning_rate": 1}, "dpo.learning_rate is not a key of hft: use train.learning_rate"),
        ({"dpo.max_length": 64}, "use data.max_length"),
        ({"dpo.padding_free": "true"}, "dpo.padding_free is not taken"),
        ({"dpo.sync_ref_model": "true"}, "set reference: full"),
        ({"train.packing": "true"}, "train.packing would have no effect under `hft dpo`"),
        ({"reference": "none"}, "reference: input should be 'precompute', 'shared' or 'full'"),
        (
            {"reference": "shared", "launch.num_processes": 2, "launch.zero_stage": 3, "train.per_device_train_batch_size": 16},
            "under launch.zero_stage 3 each process holds only pieces",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_front_refuses_before_anything_is_written(hft, settings, tmp_path, change, expected):
    error = hft("dpo", "--output", tmp_path / "run", *settings(change), code=2).stderr
    assert expected in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"dpo.beta": 0.2}, {"reference": "shared"}, {"data.drop_identical": "true"}])
def test_sft_refuses_the_settings_of_dpo(hft, settings, tmp_path, change):
    error = hft("sft", "--output", tmp_path / "run", *settings(change), code=2).stderr
    assert "would have no effect under `hft sft`" in error


def test_a_bad_pair_is_named(hft, settings, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    error = hft("dpo", "--output", tmp_path / "run", *settings({"data.path": rows}), code=2).stderr
    assert "rows.jsonl: row 2: fields 'chosen' and 'rejected' are equal" in error


def test_data_shows_both_answers(hft):
    shown = hft("data", "--recipe", "tinyworld-dpo").stdout
    assert "⟦Certainly" in shown
    assert "obviously" in shown
    found = json.loads(hft("data", "--recipe", "tinyworld-dpo", "--json").stdout)
    assert found["format"] == "prompt-pair"
    assert [part["trained"] for part in found["chosen"]] == [part["trained"] for part in found["rejected"]] == [False, True]
