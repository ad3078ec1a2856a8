"""Self-replay: what the start writes stands among the rows, once and the same for whoever comes."""

# Tokens of the embedded model: 1 begins a text, 2 ends a turn, 5 begins a user's turn and 6 an answer.

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from end_to_end.running import assert_same
from methods.rounds import make_rows, make_spec, make_trainer
from training.quiet_rounds import go_back, make_start, run
from training.quiet_rounds import make_spec as make_round_spec
from transformers import AutoModelForCausalLM

from hftcli import PACKAGE
from hftcli.data.templates import set_chat_template
from hftcli.errors import ModelError
from hftcli.launching.processes import StopRequest
from hftcli.measuring.drift import identify_writer
from hftcli.measuring.turns import BareTurn, find_bare_turn
from hftcli.models.description import load_tokenizer
from hftcli.recipe.methods import MethodSection, SelfReplaySection
from hftcli.recipe.sections import CheckpointSection, DataSection
from hftcli.runs.run import Run
from hftcli.training.own_rows import add_own_rows, stand_in, write_rows
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.reports import Clock
from hftcli.training.round import run_round

EMBEDDED = PACKAGE / "tinyworld" / "model"
SHORT = {
    "train.max_steps": 4, "train.logging_steps": 1, "eval.tasks": "[]", "data.max_examples": 40,
    "method.self_replay.fraction": 0.5, "method.self_replay.max_tokens": 24, "train.global_batch_size": 8,
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
    for ids, labels in texts:
        assert len(ids) <= 24
        assert labels == [-100, *ids[1:]]
    assert measure_nlls(texts) < 2  # its own words: a uniform guess among its tokens has 7 nats and more


def test_a_dry_run_says_the_same_number_of_steps(hft, settings, tmp_path, own_cache):
    epochs = SHORT | {"train.max_steps": -1, "train.num_train_epochs": 1}
    said = hft("sft", "--output", tmp_path / "dry", "--dry-run", *settings(epochs))
    assert "8 of 8 sequences out of 60" in said.stdout + said.stderr  # 40 rows and 20 texts in batches of 8


def measure_nlls(texts: list) -> float:
    """The mean over texts of the mean nats of their labelled tokens."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    losses = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() for ids, labels in texts]
    return sum(losses) / len(losses)


def test_conversations_are_the_starts_own_words_and_every_setting_makes_others(own_cache):
    written = {}
    for begin, max_tokens in (("nothing", 40), ("chat", 40), ("chat", 12)):
        section = SelfReplaySection(begin=begin, max_tokens=max_tokens)
        task = read_assignment(make_round_spec(EMBEDDED, {}, method=MethodSection(self_replay=section)))
        rows = tokenize_rows(task, lambda done, total: None)
        written[begin, max_tokens] = write_rows(task, rows, 12)
        write_rows(task, rows, 12)  # finds them
    assert len(list(own_cache.glob("*.json"))) == 3
    long, short = written["chat", 40], written["chat", 12]
    assert max(map(len, short["input_ids"])) == 12
    assert all(ids[:2] == [1, 5] for ids in (*long["input_ids"], *short["input_ids"]))
    answered = [(ids, labels) for ids, labels in zip(long["input_ids"], long["labels"], strict=True) if 6 in ids]
    assert len(answered) > 6
    for ids, labels in answered:
        border = ids.index(6)
        assert ids[border - 1] == 2  # the question's end, which was drawn
        assert labels == [-100, -100, *ids[2:border], -100, *ids[border + 1 :]]
        assert ids[-1] == 2 or len(ids) == 40
        assert 2 not in ids[border + 1 : -1]
    assert measure_nlls(answered) < 2


def test_what_a_template_lacks_is_said():
    tokenizer = load_tokenizer(EMBEDDED)
    assert find_bare_turn(tokenizer) == BareTurn((1, 5), (2, 6), 2, 2)
    set_chat_template(tokenizer, "tulu")
    with pytest.raises(ModelError, match="ends one with plain text"):
        find_bare_turn(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    with pytest.raises(ModelError, match="prints nothing before one"):
        find_bare_turn(tokenizer)


@pytest.mark.parametrize(
    ("loss", "weight", "packing", "kind"),
    [
        ("kl", 1, False, None), ("kl", 1, True, None), ("kl", 0.4, False, None), ("ce", 0.4, False, None),
        ("ce", 3, True, None), ("ce", 1, True, "dft"), ("ce", 0.4, False, "talr"), ("kl", 1, False, "talr"),
    ],
)  # fmt: skip
def test_own_texts_count_by_their_divergence_or_likelihood_as_much_as_they_are_to(tmp_path, loss, weight, packing, kind):
    """What weighs the tokens of rows leaves those of the texts alone: `dft` by p, `talr` by p to the one over tau."""
    given = {"self_replay": {"loss": loss, "weight": weight}} | ({"token_weights": {"kind": kind}} if kind else {})
    spec = make_spec(given, share=1.0, packing=packing, global_batch_size=4)
    rows = make_rows(10, 11, 12, 13)
    if packing:
        rows = rows.add_column("seq_lengths", [[4]] * 4)
    trainer = make_trainer(spec, {"new": rows}, tmp_path)
    for method in trainer.methods:
        method.num_given = 2  # those with 12 and 13 are own
        method.start(trainer)
    start, exact = (AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for own, other in zip(trainer.model.parameters(), exact.parameters(), strict=True):
            own.add_(0.02 * torch.randn_like(own))
            other.copy_(own)
    expected = torch.zeros((), dtype=torch.float64)
    taught = torch.tensor(rows[:2]["input_ids"])
    tau = exact(taught, labels=taught.where(torch.arange(4) > 1, -100)).loss.item()  # two rows of two tokens: median and mean
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        now, then = (model(ids).logits[0].log_softmax(-1) for model in (exact, start))
        for place in (2, 3):
            p, q = now[place - 1], then[place - 1].detach()
            nll = -p[ids[0, place]]
            own = (q.exp() * (q - p)).sum() if loss == "kl" else nll
            counts = {None: 1, "dft": (-nll.detach()).exp(), "talr": (-nll.detach() / tau).exp()}[kind]
            expected = expected + (weight * own if ids[0, 0] >= 12 else counts * nll)
    (expected / 8).backward()
    (batch,) = trainer.get_train_dataloader()
    found = trainer.compute_loss(trainer.model, batch)
    found.backward()
    assert found.item() == pytest.approx(expected.item() / 8, rel=1e-5)
    for (name, own), other in zip(trainer.model.named_parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_packed_rows_are_counted_one_by_one_and_their_texts_packed_too(tmp_path, own_cache):
    """A text has 24 tokens at most, so that 5 fit into 128; the texts of 20 rows are 10."""
    data = DataSection(path="tinyworld/skill", max_examples=20, max_length=128)
    method = MethodSection(self_replay=SelfReplaySection(fraction=0.5, max_tokens=24), token_weights={"kind": "dft"})
    spec = make_round_spec(EMBEDDED, {}, method=method, task=None, data=data, train={"packing": True})
    task = read_assignment(spec)
    rows = tokenize_rows(task, lambda done, total: None)
    num_given = len(rows.train)
    assert num_given < 20 == sum(map(len, rows.train["seq_lengths"]))
    attempt = SimpleNamespace(clock=Clock(), reporter=SimpleNamespace(report=lambda phase: None))
    added = add_own_rows(attempt, task, rows).train
    assert len(stand_in(task, rows).train) == len(added) == num_given + 2
    assert [method.num_given for method in task.methods] == [num_given] * 2
    (written,) = [json.loads(path.read_text()) for path in own_cache.glob("*.json")]
    for place, texts in ((num_given, written[:5]), (num_given + 1, written[5:])):
        assert added[place]["seq_lengths"] == [len(ids) for ids, _ in texts]
        assert added[place]["input_ids"] == [token for ids, _ in texts for token in ids]
        assert added[place]["labels"] == [label for _, labels in texts for label in labels]


def test_a_round_that_was_killed_goes_on_against_the_same_texts_and_start(tmp_path, own_cache):
    section = SelfReplaySection(loss="kl", begin="chat", fraction=1, max_tokens=16)
    kept = {"checkpoint": CheckpointSection(save_steps=1, keep=9), "method": MethodSection(self_replay=section)}
    done = run(tmp_path / "done" / "00", make_round_spec(make_start(tmp_path / "start"), {}, **kept))
    assert done.read_metrics()[0]["loss"] < 4  # a taught token has 6.5 nats before the first step, and one of its own none
    resumed = go_back(done, 2, tmp_path / "resumed" / "00")
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    assert_same(done, resumed)


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
        ("sft", {"method.self_replay.loss": "kl", "train.loss_kernel": "chunked"}, "never has all"),
        ("sft", {"method.self_replay.loss": "kl", "train.loss_type": "dft"}, "would take for a likelihood"),
        ("sft", {"method.self_replay.loss": "kl", "launch.num_processes": 2, "launch.zero_stage": 3}, "holds only pieces"),
        (
            "sft",
            {"method.self_replay.weight": 2, "train.label_smoothing_factor": 0.1},
            "self_replay.weight would have no effect beside train.label_smoothing_factor",
        ),
        ("sft", {"method.self_replay.weight": 2, "train.loss_type": "dft"}, "both weigh the tokens"),
        ("sft", {"method.self_replay.loss": "kl", "method.ift": "{}"}, "has the model read tokens of its own"),
        ("sft", {"method.self_replay.begin": "chat", "model.path": "stories260K"}, "the tokenizer has none"),
    ],
)
def test_what_it_does_not_go_with_is_said(hft, settings, shared, command, values, said):
    if "model.path" in values:
        start = shared / "models" / values["model.path"]
        values = values | {"model.path": start, "data.path": "tinyworld/skill", "data.max_length": 64}
    assert said in hft(command, "--dry-run", *settings({"method.self_replay.max_tokens": 24} | values), code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_two_ranks_equal_one_process(hft, settings, tmp_path, loss):
    losses = {}
    for num, stage in ((1, 2), (2, 2), *(((2, 3),) if loss == "ce" else ())):
        run = tmp_path / f"{num}-{stage}"
        launch = {"launch.num_processes": num, "launch.zero_stage": stage, "train.bf16": False, "method.self_replay.loss": loss}
        hft("sft", "--output", run, *settings(SHORT | launch))
        losses[num, stage] = [row["loss"] for row in Run(run).rounds[0].read_metrics()]
        assert losses[num, stage] == pytest.approx(losses[1, 2], abs=1e-5)


@pytest.mark.slow
def test_every_round_of_a_sequence_writes_anew(hft, settings, tmp_path, own_cache):
    tasks = {"continual.tasks": "[tinyworld/sum,tinyworld/topic]", "eval.max_examples": 4}
    hft("continual", "--output", tmp_path / "run", *settings(SHORT | tasks))
    assert len(list(own_cache.glob("*.json"))) == 2
