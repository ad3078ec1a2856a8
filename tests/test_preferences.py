"""DPO's loss, gradient and measures against an independent computation in float64, and its three references."""

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.freezing.activations import LossKernel
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezeRule, make_plan
from hftcli.measuring.pairs import read_pairs, score_pairs
from hftcli.methods.l2sp import L2sp
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.recipe.methods import L2spSection
from hftcli.recipe.sections import DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.spec import RoundSpec
from hftcli.training.references import PrecomputedReference, SharedReference, make_reference_key, read_log_probs
from hftcli.training.trainers import PairTrainer, make_training_arguments

START = PACKAGE / "tinyworld" / "model"
CPU = torch.device("cpu")
BETA = 0.3


def make_pairs() -> Dataset:
    """Made by hand: answers of other lengths, one of them a single token."""
    return Dataset.from_list(
        [
            {"prompt_ids": [5, 9, 20], "chosen_ids": [31, 7, 8, 2], "rejected_ids": [40]},
            {"prompt_ids": [11], "chosen_ids": [3], "rejected_ids": [17, 18, 3]},
            {"prompt_ids": [6, 6, 6, 6, 6], "chosen_ids": [12, 13], "rejected_ids": [13, 12]},
        ]
    )


def make_trainer(folder: Path, mode: str, kernel: LossKernel = "plain", **dpo: object) -> PairTrainer:
    spec = RoundSpec(
        objective="dpo", index=0, model=ModelSection(path=str(START)), data=DataSection(path="d", max_length=32),
        freeze=FreezeRule(), train=TrainSection(bf16=False, global_batch_size=4), launch=LaunchSection(num_processes=1),
        dpo=DpoSection(**{"beta": BETA} | dpo), reference=mode,
    )  # fmt: skip
    described = describe_model(str(START))
    plan = make_plan(assign_roles(described.model_type, described.parameters), spec.freeze, 0)
    model, second = (load_model(spec.model, START, plan, mixed=False, sharded=False) for _ in range(2))
    reference = {
        "precompute": lambda: PrecomputedReference(folder / "log_probs.safetensors", lambda done, total: None),
        "shared": SharedReference,
        "full": lambda: None,
    }[mode]()
    args = make_training_arguments(spec, folder)
    tokenizer = AutoTokenizer.from_pretrained(START)
    trainer = PairTrainer(
        model, args, make_pairs(), tokenizer, [], [], kernel, reference,
        second.requires_grad_(False) if mode == "full" else None,
    )  # fmt: skip
    if reference is not None:
        reference.prepare(trainer)
    torch.manual_seed(0)
    with torch.no_grad():  # as if it had trained for a while
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return trainer


def compute_loss(trainer: PairTrainer) -> torch.Tensor:
    return trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))


def sum_log_probs(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """One sequence at a time, one token at a time, in float64."""
    log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + place - 1, token] for place, token in enumerate(answer))


def compute_by_hand(model: torch.nn.Module, start: torch.nn.Module) -> tuple[torch.Tensor, list[float]]:
    """Equation 7 of arXiv 2305.18290, and the rewards' margins."""
    margins = []
    for pair in make_pairs():
        ratios = [
            sum_log_probs(model, pair["prompt_ids"], pair[name]) - sum_log_probs(start, pair["prompt_ids"], pair[name]).detach()
            for name in ("chosen_ids", "rejected_ids")
        ]
        margins.append(BETA * (ratios[0] - ratios[1]))
    return -torch.stack(margins).sigmoid().log().mean(), [margin.item() for margin in margins]


@pytest.mark.parametrize(
    ("mode", "kernel"), [("precompute", "plain"), ("shared", "plain"), ("full", "plain"), ("shared", "chunked")]
)
def test_loss_and_gradient_are_those_of_float64(tmp_path, mode, kernel):
    trainer = make_trainer(tmp_path, mode, kernel)
    loss = compute_loss(trainer)
    loss.backward()
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(START, dtype=torch.float64))
    start = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float64)
    for name, parameter in trainer.model.named_parameters():
        model.get_parameter(name).data = parameter.detach().double()
    expected, _ = compute_by_hand(model, start)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)  # log-probabilities of some -50, in float32
    assert loss.item() != pytest.approx(math.log(2), abs=1e-3)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
        else:
            assert parameter.grad is None


def test_the_untrained_model_has_the_loss_of_a_coin(tmp_path):
    trainer = make_trainer(tmp_path, "shared")
    for parameter, start in trainer.reference.copies:
        parameter.data.copy_(start)
    assert compute_loss(trainer).item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_shared_reference_leaves_the_trained_tensors_in_place(tmp_path):
    trainer = make_trainer(tmp_path, "shared")
    before = [(parameter.data_ptr(), parameter.detach().clone()) for parameter in trainer.model.parameters()]
    compute_loss(trainer)
    for parameter, (address, values) in zip(trainer.model.parameters(), before, strict=True):
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, values)
    trained = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trainer.reference.num_bytes == trained


def test_precomputed_log_probs_are_reused_and_another_s_are_refused(tmp_path):
    first = make_trainer(tmp_path, "precompute").reference
    again = make_trainer(tmp_path, "precompute").reference
    assert (first.is_reused, again.is_reused) == (False, True)
    assert torch.equal(first.log_probs_P2, again.log_probs_P2)
    with pytest.raises(InputError, match="holds the reference of another model or of other pairs"):
        read_log_probs(first.path, num_pairs=4)
    other = first.path.rename(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds the reference of another model"):
        read_log_probs(other, num_pairs=3)
    other.write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="is damaged"):
        read_log_probs(other, num_pairs=3)


def test_the_key_covers_weights_tokens_precision_and_options(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def make_key(tokens: str = "t", mixed: bool = False, dtype: str | None = None, **dpo: object) -> str:
        spec = RoundSpec(
            objective="dpo", index=0, model=ModelSection(path="m", dtype=dtype), data=DataSection(path="d"),
            freeze=FreezeRule(), train=TrainSection(), launch=LaunchSection(num_processes=1),
            dpo=DpoSection(**dpo), reference="precompute",
        )  # fmt: skip
        return make_reference_key(spec, tmp_path, tokens, mixed)

    keys = [make_key(), make_key("u"), make_key(mixed=True), make_key(dtype="bfloat16"), make_key(ld_alpha=0.5)]
    (tmp_path / "model.safetensors").write_bytes(b"weights of another model")
    keys.append(make_key())
    assert len(set(keys)) == len(keys)
    assert make_key(beta=0.7) == make_key()


def test_measures_are_those_of_float64(tmp_path):
    trainer = make_trainer(tmp_path, "full")
    reference = read_pairs(trainer.ref_model, make_pairs(), CPU)
    found = score_pairs(read_pairs(trainer.model, make_pairs(), CPU, reference=reference), reference, BETA, CPU)
    model, start = copy.deepcopy(trainer.model).double(), copy.deepcopy(trainer.ref_model).double()
    _, margins = compute_by_hand(model, start)
    assert found.reward_margin == pytest.approx(sum(margins) / 3, abs=1e-5)
    assert found.reward_accuracy == sum(margin > 0 for margin in margins) / 3
    same = score_pairs(reference, reference, BETA, CPU)
    assert (same.reward_accuracy, same.reward_margin, same.kl) == (0.5, 0.0, 0.0)


def test_kl_is_estimated_without_bias(tmp_path):
    trainer = make_trainer(tmp_path, "full")
    pairs = Dataset.from_list(list(make_pairs()) * 200)
    reference = read_pairs(trainer.ref_model, pairs, CPU)
    found = score_pairs(read_pairs(trainer.model, pairs, CPU, reference=reference), reference, BETA, CPU)
    kl, places = 0.0, 0
    for pair in make_pairs():
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            ids = torch.tensor([pair["prompt_ids"] + answer])
            start, model = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (trainer.ref_model, trainer.model))
            exact_T = (start.exp() * (start - model)).sum(-1)[len(pair["prompt_ids"]) - 1 : -1]
            kl, places = kl + exact_T.sum().item(), places + len(exact_T)
    assert found.kl == pytest.approx(kl / places, rel=0.1)


def test_the_distance_from_the_start_is_added_to_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, "shared")
    plain = compute_loss(trainer)
    method = L2sp(None, L2spSection(strength=0.5))
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    method.anchors = {name: torch.zeros_like(value) for name, value in trained.items()}
    method.start(trainer)
    trainer.methods = [method]
    squares = sum(value.square().sum() for value in trained.values())
    assert compute_loss(trainer).item() == pytest.approx((plain + 0.5 / 2 * squares).item(), rel=1e-5)


def test_settings_that_do_not_go_together_are_the_user_s_fault(tmp_path):
    with pytest.raises(InputError, match="TRL refuses these settings"):
        make_trainer(tmp_path, "shared", loss_type="exo_pair")
