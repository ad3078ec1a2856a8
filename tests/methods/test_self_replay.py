"""Self-replay: what the start writes stands among the rows, once and the same for whoever comes."""

import json
from pathlib import Path

import pytest
import torch
from end_to_end.running import assert_same
from transformers import AutoModelForCausalLM

from hftcli import PACKAGE
from hftcli.measuring.drift import identify_writer
from hftcli.models.description import load_tokenizer
from hftcli.runs.run import Run

EMBEDDED = PACKAGE / "tinyworld" / "model"
SHORT = {
    "train.max_steps": 4, "train.logging_steps": 1, "eval.tasks": "[]", "data.max_examples": 40,
    "method.self_replay": "{fraction: 0.5, max_tokens: 24}", "train.global_batch_size": 8,
    "train.per_device_train_batch_size": 4, "train.learning_rate": 3e-4,
}  # fmt: skip


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "own-rows"


def test_texts_of_the_start_are_trained_on_among_the_rows(hft, settings, tmp_path, own_cache):
    hft("sft", "--output", tmp_path / "dry", "--dry-run", *settings(SHORT))
    assert not own_cache.exists()  # nothing is loaded, and the texts are counted all the same
    hft("sft", "--output", tmp_path / "run", *settings(SHORT))
    assert Run(tmp_path / "run").rounds[0].read_outlook().num_sequences == 60
    texts = json.loads(next(own_cache.glob("*.json")).read_text())
    assert len(texts) == 20
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    nlls = []
    for ids, labels in texts:
        assert len(ids) <= 24
        assert labels == [-100, *ids[1:]]
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        nlls.append(loss.item())
    assert sum(nlls) / len(nlls) < 2  # its own words: a uniform guess among its tokens has 7 nats and more


def test_a_dry_run_says_the_same_number_of_steps(hft, settings, tmp_path, own_cache):
    epochs = SHORT | {"train.max_steps": -1, "train.num_train_epochs": 1}
    said = hft("sft", "--output", tmp_path / "dry", "--dry-run", *settings(epochs))
    assert "8 of 8 sequences out of 60" in said.stdout + said.stderr  # 40 rows and 20 texts in batches of 8


def test_a_tokenizer_that_begins_otherwise_writes_other_texts():
    tokenizer = load_tokenizer(EMBEDDED)
    first = identify_writer(EMBEDDED, tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    assert identify_writer(EMBEDDED, tokenizer) != first


@pytest.mark.slow
def test_a_second_run_finds_the_texts_and_trains_the_same(hft, settings, tmp_path, own_cache):
    for name in ("one", "two"):
        hft("sft", "--output", tmp_path / name, *settings(SHORT))
    assert len(list(own_cache.glob("*.json"))) == 1
    assert_same(*(Run(tmp_path / name).rounds[0] for name in ("one", "two")))


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ("dpo", {}, "`hft dpo` trains on pairs"),
        ("continual", {"method.replay.when": "after"}, "drop one"),
        ("sft", {"method.self_replay.fraction": 0}, "greater than 0"),
    ],
)
def test_what_it_does_not_go_with_is_said(hft, settings, command, values, said):
    assert said in hft(command, "--dry-run", *settings({"method.self_replay.max_tokens": 24} | values), code=2).stderr


@pytest.mark.slow
def test_two_ranks_equal_one_process(hft, settings, tmp_path):
    losses = {}
    for num, stage in ((1, 2), (2, 2), (2, 3)):
        run = tmp_path / f"{num}-{stage}"
        launch = {"launch.num_processes": num, "launch.zero_stage": stage, "train.bf16": False}
        hft("sft", "--output", run, *settings(SHORT | launch))
        losses[num, stage] = [row["loss"] for row in Run(run).rounds[0].read_metrics()]
    assert losses[2, 2] == pytest.approx(losses[1, 2], abs=1e-5)
    assert losses[2, 3] == pytest.approx(losses[1, 2], abs=1e-5)


@pytest.mark.slow
def test_every_round_of_a_sequence_writes_anew(hft, settings, tmp_path, own_cache):
    tasks = {"continual.tasks": "[tinyworld/sum,tinyworld/topic]", "eval.max_examples": 4}
    hft("continual", "--output", tmp_path / "run", *settings(SHORT | tasks))
    assert len(list(own_cache.glob("*.json"))) == 2
