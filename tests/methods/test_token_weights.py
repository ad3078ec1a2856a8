"""Token weights: loss and gradient by hand in float64, plain training at strength 0, and what they do not go with."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from end_to_end.running import assert_same
from methods.rounds import START, make_spec, make_trainer
from training.quiet_rounds import go_back, make_start, run
from training.quiet_rounds import make_spec as make_round_spec
from transformers import AutoModelForCausalLM

from hftcli import PACKAGE
from hftcli.data.tokens import TOKEN_FEATURES
from hftcli.launching.processes import StopRequest
from hftcli.methods.token_weights import METRIC, TokenWeights
from hftcli.recipe.methods import MethodSection, TokenWeightsSection
from hftcli.recipe.sections import CheckpointSection
from hftcli.training.loss import find_columns, set_loss_kernel, shape_loss
from hftcli.training.round import run_round

KINDS = ("dft", "talr", "eaft", "stm", "psft")
EMBEDDED = PACKAGE / "tinyworld" / "model"


def make_method(kind: str, strength: float = 1.0) -> TokenWeights:
    section = {"kind": kind, "strength": strength}
    return TokenWeights(make_spec({"token_weights": section}), TokenWeightsSection(**section))


def weigh_by_hand(kind: str, logits_BTV: torch.Tensor, labels_BT: torch.Tensor, then_BTV: torch.Tensor) -> torch.Tensor:
    """Weights of the papers, token by token; 0 where nothing is trained.

    Args:
        then_BTV: logits of the model as it was.
    """
    weights = torch.zeros(labels_BT.shape, dtype=torch.float64)
    means = []
    for row, labels in zip(logits_BTV, labels_BT, strict=True):
        losses = [-row[place].log_softmax(-1)[label].item() for place, label in enumerate(labels) if label != -100]
        means.append(sum(losses) / len(losses))
    tau = sorted(means)[len(means) // 2]  # of three rows
    for b, t in (labels_BT != -100).nonzero().tolist():
        probabilities = logits_BTV[b, t].softmax(-1)
        p = probabilities[labels_BT[b, t]].item()
        entropy = -sum(value * math.log(value) for value in probabilities.tolist() if value > 0)
        q = then_BTV[b, t].softmax(-1)[labels_BT[b, t]].item()
        all_kinds = {
            "dft": p, "talr": p ** (1 / tau), "eaft": min(entropy / math.log(20), 1), "stm": float(1 / q <= 2.5),
            "psft": p / q if p / q <= 1.28 else 0,
        }  # fmt: skip
        weights[b, t] = all_kinds[kind]
    return weights


@pytest.mark.parametrize("kernel", ["plain", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_float64(kind, kernel):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    ids = torch.randint(3, model.config.vocab_size, (3, 12))
    ids[:, 5:] = model.generate(ids[:, :5], max_new_tokens=7, do_sample=True)[:, 5:]  # likely tokens, and some that are not
    ids[0, 7:9] = 50
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 9:] = -100
    exact = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    then = logits = exact(ids).logits[:, :-1]
    targets = labels[:, 1:]
    method = make_method(kind)
    method.prepare_model(model, None, START, mixed=False, sharded=False)
    method.start(SimpleNamespace(model=model))
    if kind in ("stm", "psft"):  # what the model has become since then must not count, or is compared
        with torch.no_grad():
            for own, other in zip(model.parameters(), exact.parameters(), strict=True):
                own.mul_(1.01)
                other.mul_(1.01)
        logits = exact(ids).logits[:, :-1]
    weights = weigh_by_hand(kind, logits.detach(), targets, then.detach())
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    expected = (weights.flatten() * losses).sum() / (targets != -100).sum()
    expected.backward()
    set_loss_kernel(model, kernel)
    shape_loss(model, [method.weigh_tokens])
    if method.reads_ahead:
        method.read_ahead(model, {"input_ids": ids, "labels": labels}, find_columns(labels))
    found = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True)
    loss = -found.log_probs.sum() / found.label_mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    total, count = method.list_totals()["token_weight"].tolist()
    assert (total, count) == (pytest.approx(weights.sum().item()), (targets != -100).sum().item())
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_talr_takes_the_median_over_packed_rows():
    """Four rows in two sequences: of their mean losses 1, 3, 8 and 2 the median is 2.5; the fifth trains nothing."""
    losses = torch.tensor([[9.0, 0.5, 1.5, 9.0, 3.0, 9.0, 8.0, 8.0], [9.0, 2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0]])
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]])
    labels = torch.where(losses < 9, 5, -100)
    section = {"kind": "talr"}
    spec = make_spec({"token_weights": section})
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"packing": True})})
    method = TokenWeights(spec, TokenWeightsSection(**section))
    assert method.reads_ahead
    method.read_ahead(None, {"input_ids": labels, "labels": labels, "position_ids": places}, find_columns(labels))
    weights = method.weigh_tokens(-losses[:, 1:], None, labels[:, 1:] != -100)
    assert weights[0].tolist() == pytest.approx([math.exp(-loss / 2.5) for loss in losses[0, 1:].tolist()])


def test_psft_has_the_gradient_of_the_clipped_ratio():
    """As in PPO with an advantage of 1, the bounds being 1 - 0.2 and 1 + 0.28."""
    now, then = torch.tensor([[0.1, 0.3, 0.05, 0.5], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    now = now.detach().requires_grad_()
    ratios = (now - then).exp()
    objective = torch.minimum(ratios, ratios.clamp(0.8, 1.28)).mean()
    (expected,) = torch.autograd.grad(objective, now)
    assert expected.tolist() == pytest.approx([1 / 4, 0, 1 / 24, 1.25 / 4])
    method = make_method("psft")
    method.start_log_probs_BT = then[None].float()
    weights = method.weigh_tokens(now[None], None, torch.ones(1, 4, dtype=torch.bool))
    assert (weights[0] / 4).tolist() == pytest.approx(expected.tolist())


def make_row(ids: list[int], num_trained: int) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [-100] * (len(ids) - num_trained) + ids[-num_trained:]}


def test_what_is_logged_is_the_mean_over_the_trained_tokens_of_all_micro_batches_and_ranks(tmp_path, monkeypatch):
    """Two micro-batches, of 2 trained tokens and of 6; the other rank, which stands in here, has 8 that weigh 1 each."""
    rows = [make_row([1, 5, 6, 7], 2), make_row([1, 9, 8, 7, 6, 5, 4, 3], 6)]
    model = AutoModelForCausalLM.from_pretrained(START)
    weights = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        probabilities = model(ids[None]).logits[0, :-1].softmax(-1).gather(-1, ids[1:, None])[:, 0]
        weights += probabilities[torch.tensor(row["labels"][1:]) != -100].tolist()
    sizes = {"global_batch_size": 2, "per_device_train_batch_size": 1, "max_steps": 1, "logging_steps": 1}
    spec = make_spec({"token_weights": {"kind": "dft"}}, **sizes)
    trainer = make_trainer(spec, {"new": Dataset.from_list(rows, features=TOKEN_FEATURES)}, tmp_path)
    trainer.train()
    assert len(weights) == 8
    assert trainer.state.log_history[0]["token_weight"] == pytest.approx(sum(weights) / 8, rel=1e-4)
    trainer.add_total("token_weight", torch.tensor([sum(weights), 8]))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total_2: total_2.add_(torch.tensor([8.0, 8.0])))
    monkeypatch.setattr(trainer, "args", SimpleNamespace(world_size=2, device=torch.device("cpu")))
    assert trainer.take_means() == {"token_weight": pytest.approx((sum(weights) + 8) / 16)}
    assert trainer.take_means() == {}


def read_losses(run, key: str = "loss") -> list[float]:
    return [json.loads(line)[key] for line in (run / "rounds" / "00-sft" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_no_strength_is_plain_training_and_every_kind_acts(hft, settings, tmp_path):
    short = {"train.max_steps": 2, "train.logging_steps": 1, "eval.tasks": "[]", "train.learning_rate": 3e-4}
    given = {
        "plain": {},
        "none": {"method.token_weights": "{kind: talr, strength: 0}"},
        "dft": {"method.token_weights.kind": "dft"},
        "trl": {"train.loss_type": "dft"},
    }
    for name, values in given.items():
        hft("sft", "--output", tmp_path / name, *settings(short | values))
    losses = {name: read_losses(tmp_path / name) for name in given}
    assert losses["none"] == pytest.approx(losses["plain"], abs=1e-6)
    assert losses["dft"] == pytest.approx(losses["trl"], abs=1e-6)
    assert max(losses["dft"]) < min(losses["plain"])


def test_a_round_that_weighs_nothing_is_told_apart_from_one_that_broke(hft, settings, tmp_path):
    """No token of the skill is as certain as this: the loss is 0, and no weight that trains moves."""
    given = {
        "method.token_weights": "{kind: stm, max_perplexity: 1.0000001}", "train.max_steps": 2, "train.logging_steps": 1,
        "eval.tasks": "[]",
    }  # fmt: skip
    error = hft("sft", "--output", tmp_path, *settings(given), code=3).stderr
    assert "0 frozen parameters moved" in error
    assert "the gradients' norm was 0.0e+00 at most" in error
    (round_,) = (tmp_path / "rounds").iterdir()
    assert [json.loads(line)["token_weight"] for line in (round_ / "metrics.jsonl").read_text().splitlines()] == [0, 0]
    assert "stm left a trained token 0 of its weight on average" in (round_ / "worker.log").read_text()


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("dft", "lower its strength, or drop it"),
        ("stm", "raise method.token_weights.max_perplexity"),
        ("psft", "raise method.token_weights.clip, or lower method.token_weights.snapshot_steps"),
    ],
)
def test_what_would_help_is_said(kind, remedy, caplog):
    """A token beyond PSFT's clip counts nothing at any strength."""
    trainer = SimpleNamespace(args=SimpleNamespace(process_index=0))
    make_method(kind).finish(trainer, SimpleNamespace(read_metrics=lambda: [{METRIC: 0.01}]))
    assert caplog.text.rstrip().endswith(f"next to nothing was taught; {remedy}")


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ("dpo", {}, "compares whole answers"),
        ("sft", {"train.loss_type": "dft"}, "both weigh the tokens"),
        ("sft", {"train.label_smoothing_factor": 0.1}, "would have no effect beside train.label_smoothing_factor"),
        ("sft", {"method.token_weights.max_perplexity": 3}, "would have no effect beside kind eaft"),
        ("sft", {"method.token_weights.snapshot_steps": "null"}, "snapshot_steps would have no effect beside kind eaft"),
        ("sft", {"method.token_weights": "{kind: psft, clip: 0}"}, "greater than 0"),
        (
            "sft",
            {"method.token_weights": "{kind: psft}", "launch.num_processes": 2, "launch.zero_stage": 3},
            "holds only pieces",
        ),
        ("sft", {"method.token_weights.strength": -1}, "greater than or equal to 0"),
    ],
)
def test_what_they_do_not_go_with_is_said(hft, settings, command, values, said):
    given = {"method.token_weights.kind": "eaft"} | values
    assert said in hft(command, "--dry-run", *settings(given), code=2).stderr


def test_psft_is_plain_training_without_strength_and_beside_a_copy_that_does_not_lag(tmp_path):
    start, losses = make_start(tmp_path / "start"), {}
    given = {
        "plain": None,
        "none": {"strength": 0},
        "anew": {"snapshot_steps": 1},
        "psft": {},
        "held": {"snapshot_steps": None},
    }
    for name, values in given.items():
        section = values if values is None else {"kind": "psft", "clip": 0.001} | values
        method = MethodSection.model_validate({"token_weights": section})
        spec = make_round_spec(start, {}, method=method, train={"logging_steps": 1, "max_steps": 3})
        losses[name] = [row["loss"] for row in run(tmp_path / name / "00", spec).read_metrics()]
    assert losses["none"] == pytest.approx(losses["plain"], abs=1e-6)
    assert losses["anew"] == pytest.approx(losses["plain"], abs=1e-5)
    for name in ("psft", "held"):  # most tokens have grown likelier in the first step
        assert losses[name][0] == pytest.approx(losses["plain"][0], abs=1e-5)
        assert losses[name][1] < losses["plain"][1] - 1


@pytest.mark.parametrize("grain", ["matrices", "directions", "columns"])
def test_a_round_that_was_killed_goes_on_beside_the_same_copy(tmp_path, grain):
    start = make_start(tmp_path / "start")
    section = TokenWeightsSection(kind="psft", snapshot_steps=2, clip=0.001)
    kept = {"checkpoint": CheckpointSection(save_steps=1, keep=9), "method": MethodSection(token_weights=section)}
    done = run(tmp_path / "done" / "00", make_round_spec(start, {"grain": grain}, train={"max_steps": 5}, **kept))
    resumed = go_back(done, 3, tmp_path / "resumed" / "00")  # the copy is neither the start nor the step's own weights
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 3
    assert_same(done, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stages"), [("eaft", (2, 3)), ("psft", (1, 2))])
def test_two_ranks_equal_one_process(hft, settings, tmp_path, kind, stages):
    short = {
        "train.max_steps": 5, "train.logging_steps": 1, "eval.tasks": "[]", "method.token_weights.kind": kind,
        "train.global_batch_size": 8, "train.per_device_train_batch_size": 4, "train.bf16": False,
    } | ({"method.token_weights.snapshot_steps": 2, "train.learning_rate": 1e-3} if kind == "psft" else {})  # fmt: skip
    for stage in stages:
        for num in (1, 2):
            launch = {"launch.num_processes": num, "launch.zero_stage": stage}
            hft("sft", "--output", tmp_path / f"{stage}-{num}", *settings(short | launch))
        for key in ("loss", "token_weight"):
            one, two = (read_losses(tmp_path / f"{stage}-{num}", key) for num in (1, 2))
            assert two == pytest.approx(one, abs=1e-5)
