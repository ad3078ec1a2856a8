"""The anchor: loss and gradient by hand in float64, plain training at strength 0, and a start that stays where it was."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from end_to_end.running import assert_same
from methods.rounds import START, make_rows, make_spec, make_trainer
from training.quiet_rounds import go_back, make_start, run
from training.quiet_rounds import make_spec as make_round_spec
from transformers import AutoModelForCausalLM

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.launching.processes import StopRequest
from hftcli.methods.anchor import Anchor
from hftcli.methods.expectations import make_key, read_expectations
from hftcli.recipe.methods import AnchorSection, MethodSection
from hftcli.recipe.sections import CheckpointSection, LaunchSection
from hftcli.training.loss import SFT_OUTPUTS, find_columns, keep_logits, set_loss_kernel, shape_loss
from hftcli.training.round import run_round

KINDS = ("forward", "reverse", "target_masked")
EMBEDDED = PACKAGE / "tinyworld" / "model"
SHORT = {
    "train.max_steps": 3, "train.logging_steps": 1, "eval.tasks": "[]", "train.learning_rate": 1e-3,
    "train.global_batch_size": 8, "train.per_device_train_batch_size": 4,
}  # fmt: skip


def measure_by_hand(kind: str, model: torch.Tensor, start: torch.Tensor, target: int) -> torch.Tensor:
    """The divergence at one place, of logits (V,)."""
    if kind == "target_masked":
        others = [token for token in range(len(model)) if token != target]
        model, start, kind = model[others], start[others], "forward"
    p, q = model.softmax(0), start.softmax(0)
    return (p * (p / q).log()).sum() if kind == "reverse" else (q * (q / p).log()).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_float64(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).train()
    start = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    exact = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    section = {"strength": 0.7, "kind": kind}
    method = Anchor(make_spec({"anchor": section}), AnchorSection(**section))
    method.prepare_model(model, None, START, mixed=False, sharded=False)
    method.start(SimpleNamespace(model=model))
    with torch.no_grad():  # somewhere else than at the start
        for own, other in zip(model.parameters(), exact.parameters(), strict=True):
            own.add_(0.02 * torch.randn_like(own))
            other.copy_(own)
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 7:] = -100
    moved, expected = exact(ids).logits, start(ids).logits.detach()
    losses = []
    for row, place in (labels[:, 1:] != -100).nonzero().tolist():
        target = labels[row, place + 1].item()
        nll = -moved[row, place].log_softmax(0)[target]
        losses.append(nll + 0.7 * measure_by_hand(kind, moved[row, place], expected[row, place], target))
    loss = torch.stack(losses).mean()
    loss.backward()
    set_loss_kernel(model, "chunked")
    keep_logits(model, SFT_OUTPUTS, [method.penalize_tokens])
    shape_loss(model, [])
    inputs = {"input_ids": ids, "labels": labels}
    method.read_ahead(model, inputs, find_columns(labels))
    found = model(**inputs, use_cache=False, fused_lm_head=True)
    own_loss = -found.log_probs.sum() / found.label_mask.sum()
    own_loss.backward()
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def count_by_hand(kind: str, model: torch.Tensor, start: torch.Tensor, target: int, num_kept: int) -> torch.Tensor:
    """The divergence at one place, of logits (V,), with all but the start's likeliest tokens as one."""
    if kind == "target_masked":
        others = [token for token in range(len(model)) if token != target]
        model, start, kind = model[others], start[others], "forward"
    p, q = model.softmax(0), start.softmax(0)
    kept = sorted(range(len(q)), key=lambda token: -q[token].item())[:num_kept]
    classes = [(p[token], q[token]) for token in kept]
    if num_kept < len(q):
        left = [token for token in range(len(q)) if token not in kept]
        classes.append((p[left].sum(), q[left].sum()))
    terms = [a * (a / b).log() if kind == "reverse" else b * (b / a).log() for a, b in classes]
    return torch.stack(terms).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_kept", "packing"), [(3, False), (3, True), (703, False), (704, False)])
def test_the_likeliest_tokens_and_the_rest_are_those_of_float64(tmp_path, monkeypatch, kind, num_kept, packing):
    """704 is the whole vocabulary, so that it is also the exact divergence."""
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))
    section = {"strength": 0.7, "kind": kind, "top_k": num_kept}
    spec = make_spec({"anchor": section}, share=1.0, packing=packing, global_batch_size=4)
    rows = make_rows(10, 11, 12)
    if packing:
        rows = rows.add_column("seq_lengths", [[4]] * 3)
    trainer = make_trainer(spec, {"new": rows}, tmp_path)
    (method,) = trainer.methods
    method.ask_untouched(trainer, lambda done, total: None)
    start, exact = (AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for own, other in zip(trainer.model.parameters(), exact.parameters(), strict=True):
            own.add_(0.02 * torch.randn_like(own))
            other.copy_(own)
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        moved, expected = exact(ids).logits[0], start(ids).logits[0].detach()
        for place in (1, 2):
            target = row["input_ids"][place + 1]
            divergence = count_by_hand(kind, moved[place], expected[place], target, num_kept)
            if num_kept == 704:
                whole = measure_by_hand(kind, moved[place], expected[place], target)
                assert divergence.item() == pytest.approx(whole.item(), abs=1e-6)
            losses.append(0.7 * divergence - moved[place].log_softmax(0)[target])
    loss = torch.stack(losses).mean()
    loss.backward()
    (batch,) = trainer.get_train_dataloader()
    own_loss = trainer.compute_loss(trainer.model, batch)
    own_loss.backward()
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, own), other in zip(trainer.model.named_parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_what_is_kept_is_of_this_base_and_these_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))
    changes = {
        "first": {}, "again": {}, "kind": {"kind": "reverse"}, "masked": {"kind": "target_masked"}, "more": {"top_k": 6},
        "rows": {},
    }  # fmt: skip
    asked, cache = {}, tmp_path / "cache" / "expectations"
    for name, values in changes.items():
        spec = make_spec({"anchor": {"strength": 1, "top_k": 5} | values})
        trainer = make_trainer(spec, {"new": make_rows(*((10, 13) if name == "rows" else (10, 11)))}, tmp_path / name)
        calls = []
        trainer.methods[0].ask_untouched(trainer, lambda done, total, calls=calls: calls.append(done))
        asked[name] = bool(calls), len(list(cache.iterdir()))
    # One direction of the divergence is kept as the other is; without the taught token it is another distribution.
    assert asked == {
        "first": (True, 1), "again": (False, 1), "kind": (False, 1), "masked": (True, 2), "more": (True, 3), "rows": (True, 4),
    }  # fmt: skip
    starts = trainer.methods[0].expectations.starts_R1
    one, other = sorted(cache.iterdir())[:2]
    other.write_bytes(one.read_bytes())
    with pytest.raises(InputError, match="holds what another base expects, or of other rows"):
        read_expectations(other, starts, 5)
    other.write_bytes(b"12345678")
    with pytest.raises(InputError, match="is damaged"):
        read_expectations(other, starts, 5)


def test_what_is_kept_is_of_its_arithmetic(tmp_path):
    """Which is another in bfloat16, another there by DeepSpeed, and another where frozen embeddings are held in bfloat16."""
    plain, mixed = (make_spec({"anchor": {"strength": 1, "top_k": 5}}, bf16=bf16) for bf16 in (False, True))
    trainer = make_trainer(plain, {"new": make_rows(10, 11)}, tmp_path)
    sharded = mixed.model_copy(update={"launch": LaunchSection(num_processes=2)})
    keys = [make_key(trainer, spec, EMBEDDED, 5, False) for spec in (plain, mixed, sharded)]
    assert keys[0] == make_key(trainer, plain, EMBEDDED, 5, False)
    trainer.model.get_input_embeddings().to(torch.bfloat16)
    keys.append(make_key(trainer, mixed, EMBEDDED, 5, False))
    assert len({*keys}) == 4


def read_losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "rounds" / "00-sft" / "metrics.jsonl").read_text().splitlines()]


def test_no_strength_is_plain_training_and_the_first_step_has_no_penalty(hft, settings, tmp_path):
    for name, values in {"plain": {}, "none": {"method.anchor.strength": 0}, "held": {"method.anchor.strength": 5}}.items():
        hft("sft", "--output", tmp_path / name, *settings(SHORT | values))
    plain, none, held = (read_losses(tmp_path / name) for name in ("plain", "none", "held"))
    assert none == pytest.approx(plain, abs=1e-6)
    assert held[0] == pytest.approx(plain[0], abs=1e-6)
    assert held[2] > plain[2] + 0.01


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ("dpo", {}, "a reference of its own"),
        ("sft", {"train.loss_kernel": "chunked"}, "never has all"),
        ("sft", {"train.label_smoothing_factor": 0.1}, "would have no effect beside train.label_smoothing_factor"),
        ("sft", {"method.peft.type": "OFT"}, "may begin elsewhere"),
        ("sft", {"launch.num_processes": 2, "launch.zero_stage": 3}, "holds only pieces"),
        ("sft", {"method.anchor.strength": -1}, "greater than or equal to 0"),
        ("sft", {"method.anchor.top_k": 0}, "greater than or equal to 1"),
        ("sft", {"method.anchor.top_k": 1000000}, "top_k is 1000000, and the model's vocabulary has"),
        ("sft", {"train.loss_type": "dft"}, "would take for a likelihood"),
    ],
)
def test_what_it_does_not_go_with_is_said(hft, settings, command, values, said):
    assert said in hft(command, "--dry-run", *settings({"method.anchor.strength": 1} | values), code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "stages"), [(None, (1, 2)), (8, (2, 3))])
def test_two_ranks_equal_one_process(hft, settings, tmp_path, monkeypatch, top_k, stages):
    for num, stage in ((1, 2), *((2, stage) for stage in stages)):
        monkeypatch.setenv("HFT_CACHE", str(tmp_path / f"cache-{num}-{stage}"))  # each asks by itself
        launch = {"launch.num_processes": num, "launch.zero_stage": stage, "train.bf16": False, "method.anchor.strength": 2}
        top = {} if top_k is None else {"method.anchor.top_k": top_k}
        hft("sft", "--output", tmp_path / f"{num}-{stage}", *settings(SHORT | launch | top))
    for stage in stages:
        assert read_losses(tmp_path / f"2-{stage}") == pytest.approx(read_losses(tmp_path / "1-2"), abs=1e-5)


@pytest.mark.parametrize(("grain", "top_k"), [("matrices", None), ("directions", None), ("columns", None), ("matrices", 8)])
def test_a_round_that_was_killed_goes_on_against_the_same_start(tmp_path, monkeypatch, grain, top_k):
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))
    start = make_start(tmp_path / "start")
    anchor = AnchorSection(strength=2, top_k=top_k)
    held = {"checkpoint": CheckpointSection(save_steps=1, keep=9), "method": MethodSection(anchor=anchor)}
    done = run(tmp_path / "done" / "00", make_round_spec(start, {"grain": grain}, **held))
    resumed = go_back(done, 2, tmp_path / "resumed" / "00")
    shutil.rmtree(tmp_path / "cache")  # the step checkpoint has what the start said
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    assert_same(done, resumed)
