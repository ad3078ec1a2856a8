"""EWC's penalty and Fisher information by hand, in the trainer, and over rounds."""

from types import SimpleNamespace

import pytest
import torch
from methods.rounds import START, make_rows, make_spec, read_weights, run_rounds, train
from safetensors.torch import load_file, save_file

from hftcli.methods.ewc import Ewc, QuadraticPenalty, sum_squared_gradients
from hftcli.models.description import describe_model
from hftcli.recipe.methods import EwcSection
from hftcli.runs.run import Round


def test_the_penalty_and_its_gradient_are_those_computed_by_hand():
    theta = torch.tensor([3.0, -1.0], requires_grad=True)
    spec = make_spec({"ewc": {}})
    method = Ewc(spec, EwcSection(strength=400))
    method.terms = [(theta, torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0]))]
    penalty = method.compute_penalty()
    penalty.backward()
    assert penalty.item() == 400 / 2 * (0.5 * 2**2 + 2 * 2**2)
    assert theta.grad.tolist() == [400 * 0.5 * 2, 400 * 2 * -2]


def test_the_penalty_s_gradient_is_that_of_its_value():
    theta = torch.randn(3, 2, requires_grad=True)
    fisher, anchor = torch.rand(3, 2), torch.randn(3, 2)
    QuadraticPenalty.apply(theta, fisher, anchor).backward()
    expected = torch.autograd.functional.jacobian(lambda value: (fisher * (value - anchor) ** 2).sum(), theta.detach())
    torch.testing.assert_close(theta.grad, expected)


class Coin(torch.nn.Module):
    """Predicts one of two tokens at every place with the same chance, which two weights decide."""

    def __init__(self, *weights: float):
        super().__init__()
        self.first = torch.nn.Parameter(torch.tensor(weights[0]))
        self.second = torch.nn.Parameter(torch.tensor(weights[1]), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack([self.first, self.second]).expand(*input_ids.shape, 2))


def test_fisher_information_is_that_of_the_model_s_own_predictions():
    """Of n tosses of a coin with chance p: n p (1 - p), for either weight."""
    model, num_rows, num_tokens = Coin(1.0, 0.0), 4000, 3
    labels = [-100, -100, 0, 0, 0]  # the data's own labels do not count, only which tokens are trained
    batch = {"input_ids": torch.zeros(1, 5, dtype=torch.long), "labels": torch.tensor([labels])}
    sums = sum_squared_gradients(model, [batch] * num_rows, torch.Generator().manual_seed(0))
    chance = torch.tensor(1.0).sigmoid().item()
    for name in ("first", "second"):  # the frozen one too
        assert sums[name].item() / num_rows == pytest.approx(num_tokens * chance * (1 - chance), rel=0.05)
    assert [value.requires_grad for value in model.parameters()] == [True, False]
    assert all(value.grad is None for value in model.parameters())


def test_gradients_are_squared_example_by_example():
    """One token each: the square is (1 - p)^2 or p^2, never that of a mean."""
    model = Coin(0.5, 0.0)
    batch = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "labels": torch.tensor([[-100, 0]])}
    chance = torch.tensor(0.5).sigmoid().item()
    for seed in range(5):
        found = sum_squared_gradients(model, [batch], torch.Generator().manual_seed(seed))["first"].item()
        assert any(found == pytest.approx(square, rel=1e-5) for square in (chance**2, (1 - chance) ** 2))


def test_the_penalty_counts_once_in_a_step_however_it_is_accumulated(tmp_path):
    earlier = Round(tmp_path / "00-a")
    earlier.fisher_path.parent.mkdir(parents=True)
    described = describe_model(str(START))
    save_file({parameter.name: torch.ones(parameter.shape) for parameter in described.parameters}, earlier.fisher_path)
    rows = {"new": make_rows(*range(16))}

    def run(method: dict, num_steps: int, size: int = 8) -> torch.Tensor:
        settings = {"max_steps": num_steps, "optim": "sgd", "learning_rate": 0.01, "global_batch_size": 8}
        spec = make_spec(method, (("a", earlier.folder),), per_device_train_batch_size=size, **settings)
        moved = train(spec, rows, tmp_path)
        return torch.cat([values.flatten() for values in moved.values()])

    ewc = {"ewc": {"strength": 50}}
    # The first step is free, the second has the penalty's gradient: strength times the first step.
    expected = run({}, 2) - 0.01 * 50 * run({}, 1)
    torch.testing.assert_close(run(ewc, 2), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(run(ewc, 2, size=2), expected, rtol=1e-3, atol=1e-6)
    # L2-SP has the same penalty here, where every Fisher information is one.
    torch.testing.assert_close(run({"l2sp": {"strength": 50}}, 2, size=2), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ewc_adds_up_what_the_rounds_measure(tmp_path, processes):
    first, second = run_rounds(tmp_path, {"ewc": {"num_examples": 16}}, num_processes=processes, zero_stage=2)
    before, after = load_file(first.fisher_path), load_file(second.fisher_path)
    assert before.keys() == after.keys() == read_weights(first).keys()  # the frozen half too
    assert all((after[name] >= before[name]).all() for name in before)
    assert all(values.sum() > 0 for values in before.values())
    assert [any("penalty" in row for row in round_.read_metrics()) for round_ in (first, second)] == [False, True]
