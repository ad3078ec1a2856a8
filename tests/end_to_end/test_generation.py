"""A round that learns a task and answers questions of others, in one process and in two."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hftcli import PACKAGE
from hftcli.freezing.rule import FreezeRule
from hftcli.launching.watch import launch_round
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec, Scoring
from hftcli.tasks import load_task

LEARNED, OTHER, UNSEEN = "tinyworld/sum", "tinyworld/topic", "tinyworld/sale"
NUM_QUESTIONS = 41  # ranks and batches do not divide it


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """Random weights, with an untied head that is large enough for ZeRO 3 to keep in pieces."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **special, vocab_size=4096, tie_word_embeddings=False)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PACKAGE / "tinyworld" / "model").save_pretrained(folder)
    return folder


def run(folder: Path, start: Path, num_processes: int = 1, zero_stage: int = 2) -> Round:
    round_ = Round(folder)
    folder.mkdir(parents=True)
    launch = LaunchSection(num_processes=num_processes, zero_stage=zero_stage)
    spec = RoundSpec(
        objective="sft",
        index=0,
        model=ModelSection(path=str(start)),
        data=DataSection(max_length=96, max_examples=320),
        freeze=FreezeRule(),
        train=TrainSection(
            bf16=False, max_steps=30, learning_rate=3e-3, global_batch_size=32, per_device_train_batch_size=32 // num_processes
        ),
        launch=launch,
        scoring=Scoring(before=(LEARNED,), after=(LEARNED, OTHER), likelihood=(UNSEEN,), max_examples=NUM_QUESTIONS),
        task=LEARNED,
    )
    write_model(round_.spec_path, spec)
    launch_round(round_, launch, lambda progress: None)
    return round_


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory) -> Round:
    return run(tmp_path_factory.mktemp("rounds") / "one", start)


@pytest.mark.slow
def test_a_round_scores_what_it_is_asked(one_process):
    scores, result = one_process.read_scores(), one_process.read_result()
    assert list(scores.before) == [LEARNED]
    assert list(scores.after) == [LEARNED, OTHER, UNSEEN]
    before, after = scores.before[LEARNED], scores.after[LEARNED]
    assert before.score == 0
    assert 0 < after.score < 1
    assert after.nll < before.nll / 2
    assert (scores.after[UNSEEN].score, scores.after[UNSEEN].num_examples) == (None, NUM_QUESTIONS)
    assert (result.data.format, result.data.num_used, result.data.sources[0].path) == ("task", 320, LEARNED)


@pytest.mark.slow
def test_what_became_of_each_question_adds_up_to_the_scores(one_process):
    after = one_process.read_scores().after
    for name, score in after.items():
        rows = one_process.read_predictions("after", name)
        assert [row.index for row in rows] == list(range(NUM_QUESTIONS))
        nats = sum(row.nll * row.num_tokens for row in rows)
        assert nats / sum(row.num_tokens for row in rows) == pytest.approx(score.nll, rel=1e-9)
    examples = load_task(LEARNED).examples[:NUM_QUESTIONS]
    rows = one_process.read_predictions("after", LEARNED)
    assert [row.score for row in rows] == [
        row.prediction == example.answer for row, example in zip(rows, examples, strict=True)
    ]
    assert after[LEARNED].score == sum(row.score for row in rows) / NUM_QUESTIONS


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_score_as_one_process_does(one_process, start, tmp_path, stage):
    two = run(tmp_path / "two", start, num_processes=2, zero_stage=stage)
    for moment in ("before", "after"):
        first, second = (getattr(round_.read_scores(), moment) for round_ in (one_process, two))
        assert list(first) == list(second)
        for name in first:
            assert (second[name].score, second[name].lenient) == (first[name].score, first[name].lenient)
            assert second[name].nll == pytest.approx(first[name].nll, abs=1e-3)
            texts = [[row.prediction for row in round_.read_predictions(moment, name)] for round_ in (one_process, two)]
            assert texts[0] == texts[1]
    assert json.loads(two.metrics_path.read_text().splitlines()[-1])["step"] == 30
