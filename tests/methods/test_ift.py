"""Intuitive fine-tuning: loss and gradient by hand in float64, borders, plain training at 0, and what it goes with."""

import json
from types import SimpleNamespace

import pytest
import torch
from end_to_end.running import assert_same
from methods.rounds import make_rows, make_spec, train
from training.quiet_rounds import go_back, make_start, run
from training.quiet_rounds import make_spec as make_round_spec
from transformers import AutoModelForCausalLM

from hftcli import PACKAGE
from hftcli.launching.processes import StopRequest
from hftcli.methods.ift import Ift
from hftcli.recipe.methods import IftSection, MethodSection
from hftcli.recipe.sections import CheckpointSection
from hftcli.training.loss import find_columns, set_loss_kernel, shape_loss
from hftcli.training.round import run_round

EMBEDDED = PACKAGE / "tinyworld" / "model"
MIX, DECAY = 0.3, 0.9
SHORT = {
    "train.max_steps": 3, "train.logging_steps": 1, "eval.tasks": "[]", "train.learning_rate": 1e-3,
    "train.global_batch_size": 8, "train.per_device_train_batch_size": 4, "train.bf16": False,
}  # fmt: skip


def measure_by_hand(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], mix: float, decay: float) -> torch.Tensor:
    """The paper's loss of rows, ids with labels, each read by itself, token by token."""
    table, total, num_trained = model.get_input_embeddings().weight, 0.0, 0
    for ids, labels in rows:
        with torch.no_grad():
            guesses = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        read = []
        for place, token in enumerate(ids):
            said = token if place == 0 or labels[place] == -100 else guesses[place - 1]
            read.append(table[token] if said == token else (1 - mix) * table[token] + mix * table[said].detach())
            if said == token and place and labels[place] != -100:  # the same value, and the share of the gradient
                read[-1] = (1 - mix) * table[token] + mix * table[token].detach()
        log_probs = model(inputs_embeds=torch.stack(read)[None]).logits[0].log_softmax(-1)
        places = [place for place in range(1, len(ids)) if labels[place] != -100]
        losses = {place: -log_probs[place - 1, labels[place]] for place in places}
        sums = {t: sum(decay ** (j - t) * losses[j] for j in places if j >= t) for t in places}
        mean = sum(sums.values()) / len(places)
        total = total + sum(losses[t] * (sums[t] / mean if decay else 1) for t in places)
        num_trained += len(places)
    return total / num_trained


def make_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The embedded model a little off its place, and the same in float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).train()
    exact = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    with torch.no_grad():
        for own, other in zip(model.parameters(), exact.parameters(), strict=True):
            own.add_(0.02 * torch.randn_like(own))
            other.copy_(own)
    return model, exact


def draw_rows(num_tokens: int) -> list[tuple[list[int], list[int]]]:
    """A short answer, one to the end, and two answers in one row."""
    rows = [torch.randint(3, num_tokens, (length,)).tolist() for length in (7, 9, 11)]
    trained = [{4, 5}, {3, 4, 5, 6, 7, 8}, {2, 3, 7, 8, 9}]
    return [(ids, [t if at in places else -100 for at, t in enumerate(ids)]) for ids, places in zip(rows, trained, strict=True)]


def pad(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
    }


def pack(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """As the collator lays them out for packed training."""
    return {
        "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
        "labels": torch.tensor([[label for _, labels in rows for label in labels]]),
        "position_ids": torch.tensor([[place for ids, _ in rows for place in range(len(ids))]]),
    }


@pytest.mark.parametrize(
    ("mix", "decay", "kernel", "lay_out"),
    [(MIX, DECAY, "chunked", pad), (MIX, DECAY, "plain", pack), (0.0, DECAY, "chunked", pad), (MIX, 0.0, "plain", pad)],
)
def test_loss_and_gradient_are_those_of_float64(mix, decay, kernel, lay_out):
    model, exact = make_models()
    rows = draw_rows(model.config.vocab_size)
    loss = measure_by_hand(exact, rows, mix, decay)
    loss.backward()
    section = {"mix": mix, "decay": decay}
    method = Ift(make_spec({"ift": section}), IftSection(**section))
    set_loss_kernel(model, kernel)
    shape_loss(model, [method.weigh_tokens])
    method.start(SimpleNamespace(model=model))
    inputs = lay_out(rows)
    method.read_ahead(model, inputs, find_columns(inputs["labels"]))
    found = model(**inputs, use_cache=False, fused_lm_head=True)
    own_loss = -found.log_probs.sum() / found.label_mask.sum()
    own_loss.backward()
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_it_leaves_alone_what_it_did_not_read_ahead():
    model, _ = make_models()
    inputs = pad(draw_rows(model.config.vocab_size))
    plain = model(**inputs).loss.item()
    method = Ift(make_spec({"ift": {}}), IftSection())
    method.start(SimpleNamespace(model=model))
    method.read_ahead(model, inputs, find_columns(inputs["labels"]))
    with torch.no_grad():  # as a start that is laid in reads
        assert model(**inputs).loss.item() == plain
    assert model(**inputs).loss.item() != plain
    assert model(**inputs).loss.item() == plain  # as GEM reads what it remembers


def test_nothing_mixed_and_no_decay_is_plain_training(tmp_path):
    given = {"plain": {}, "none": {"ift": {"mix": 0, "decay": 0}}, "mix": {"ift": {"decay": 0}}, "decay": {"ift": {"mix": 0}}}
    rows = {"new": make_rows(*range(10, 26))}
    moved = {}
    for name, method in given.items():
        spec = make_spec(method, max_steps=2, learning_rate=1e-3, global_batch_size=8, per_device_train_batch_size=4)
        moved[name] = torch.cat([value.flatten() for value in train(spec, rows, tmp_path / name).values()])
    assert (moved["none"] - moved["plain"]).abs().max() <= 1e-6
    for name in ("mix", "decay"):
        assert (moved[name] - moved["plain"]).norm() > 0.01 * moved["plain"].norm()


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ("dpo", {}, "compares whole answers"),
        ("sft", {"train.loss_type": "dft"}, "both weigh the tokens"),
        ("sft", {"train.label_smoothing_factor": 0.1}, "would have no effect beside train.label_smoothing_factor"),
        ("sft", {"method.anchor.strength": 1}, "has the model read tokens of its own"),
        ("sft", {"method.token_weights.kind": "psft"}, "compares it with a copy that reads the rows'"),
        ("sft", {"method.ift.mix": 1.5}, "less than or equal to 1"),
        ("sft", {"method.ift.decay": -0.1}, "greater than or equal to 0"),
    ],
)
def test_what_it_does_not_go_with_is_said(hft, settings, command, values, said):
    assert said in hft(command, "--dry-run", *settings({"method.ift.mix": 0.2} | values), code=2).stderr


@pytest.mark.parametrize(
    ("grain", "method"),
    [
        ("matrices", {}),
        ("directions", {"token_weights": {"kind": "eaft"}}),
        ("matrices", {"lora": {}}),
        ("matrices", {"peft": {"type": "TRAINABLE_TOKENS", "token_indices": [5, 6]}}),
    ],
)
def test_a_round_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path, grain, method):
    start = make_start(tmp_path / "start")
    method = MethodSection.model_validate(method | {"ift": {}})
    held = {"checkpoint": CheckpointSection(save_steps=1, keep=9), "method": method}
    done = run(tmp_path / "done" / "00", make_round_spec(start, {"grain": grain}, **held))
    resumed = go_back(done, 2, tmp_path / "resumed" / "00")
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    assert_same(done, resumed)


def read_losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "rounds" / "00-sft" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(hft, settings, tmp_path, stage):
    for num in (1, 2):
        launch = {"launch.num_processes": num, "launch.zero_stage": stage, "method.ift": "{}"}
        hft("sft", "--output", tmp_path / str(num), *settings(SHORT | launch))
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "1"), abs=1e-5)
