"""What held-out pairs say of a model, against an independent computation in float64."""

import copy

import pytest
import torch
from datasets import Dataset
from training.preferences import BETA, compute_by_hand, make_pairs, make_trainer

from hftcli.measuring.pairs import read_pairs, score_pairs

CPU = torch.device("cpu")


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
