"""Pairs made by hand, the trainer that takes them, and DPO's loss in float64."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hftcli import PACKAGE
from hftcli.freezing.activations import LossKernel
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.recipe.sections import DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.spec import RoundSpec
from hftcli.training.references import PrecomputedReference, SharedReference
from hftcli.training.trainers import PairTrainer, make_training_arguments

START = PACKAGE / "tinyworld" / "model"
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
