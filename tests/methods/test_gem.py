"""GEM and A-GEM: projections by hand, the dual against all ways to solve it, and a step in the trainer."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from methods.rounds import START, make_rows, make_spec, train
from transformers import AutoModelForCausalLM

from hftcli.data.tokens import TOKEN_FEATURES
from hftcli.methods.agem import project_on_plane
from hftcli.methods.gem import project_on_cone, solve_dual
from hftcli.runs.spec import RoundSpec


def vectors(*rows: tuple[float, ...]) -> list[list[torch.Tensor]]:
    """Gradients of two parameters, each of them a tensor of one number."""
    return [[torch.tensor([float(value)]) for value in row] for row in rows]


def numbers(gradient: list[torch.Tensor]) -> list[float]:
    return torch.cat(gradient).tolist()


@pytest.mark.parametrize(
    ("gradient", "memories", "margin", "expected"),
    [
        ((1, -1), [(0, 1)], 0.0, (1, 0)),  # what points against the memory is gone
        ((1, -1), [(0, 1)], 0.5, (1, 0.5)),  # v* = 1, and half a memory on top
        ((1, 1), [(0, 1)], 0.5, (1, 1)),  # nothing is violated: nothing changes, the margin neither
        ((2, -1), [(0, 1), (-1, 1)], 0.0, (0.5, 0.5)),  # both are violated, one of them binds: v* = (0, 3/2)
        ((1, -1), [(0, 1), (-1, 1)], 0.0, (0, 0)),  # v* = (0, 1)
        ((0, -2), [(1, 1), (-1, 1)], 0.0, (0, 0)),  # both bind: v* = (1, 1)
        ((1, -1), [(0, 1), (0, 1)], 0.0, (1, 0)),  # the same memory twice: the dual has many solutions, the primal one
        ((1, -1), [(0, 1), (1, 0)], 0.25, (1.25, 0.25)),  # v* = (1, 0); the margin is for every memory
    ],
)
def test_gem_projects_as_computed_by_hand(gradient, memories, margin, expected):
    (found,) = vectors(gradient)
    assert numbers(project_on_cone(found, vectors(*memories), margin)) == pytest.approx(expected, abs=1e-6)


def test_the_dual_is_solved_exactly():
    """Against all ways to choose which variables are zero."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        num_tasks = generator.integers(1, 7)
        memories = generator.normal(size=(num_tasks, generator.integers(1, 9)))  # often of lower rank than there are tasks
        memories[generator.integers(num_tasks)] = memories[0]
        gradient = generator.normal(size=memories.shape[1])
        gram, products = memories @ memories.T, memories @ gradient
        found = solve_dual(gram, products)
        assert found.min() >= 0
        assert measure_dual(gram, products, found) == pytest.approx(search_dual(gram, products), abs=1e-9)
        assert (memories @ (gradient + found @ memories)).min() >= -1e-8


def measure_dual(gram: np.ndarray, products: np.ndarray, weights: np.ndarray) -> float:
    return weights @ gram @ weights / 2 + products @ weights


def search_dual(gram: np.ndarray, products: np.ndarray) -> float:
    """The least value of the dual, by brute force."""
    least = 0.0
    for chosen in itertools.product([False, True], repeat=len(products)):
        free = np.array(chosen)
        weights = np.zeros(len(products))
        weights[free] = np.linalg.lstsq(gram[np.ix_(free, free)], -products[free])[0]
        if weights.min() >= 0:
            least = min(least, measure_dual(gram, products, weights))
    return least


def test_clipping_before_the_projection_scales_it():
    gradient, *memories = vectors((2, -1, 4), (0, 1, -3), (-1, 1, 0))
    whole = project_on_cone(gradient, memories, 0.0)
    clipped = project_on_cone([part / 8 for part in gradient], memories, 0.0)
    assert [8 * value for value in numbers(clipped)] == pytest.approx(numbers(whole), abs=1e-6)
    assert torch.cat(whole).norm() <= torch.cat(gradient).norm()


@pytest.mark.parametrize(
    ("gradient", "memory", "expected"),
    [((1, -2), (0, 2), (1, 0)), ((3, -1), (-1, 1), (1, 1)), ((3, 1), (-1, 3), (3, 1))],
)
def test_agem_projects_as_computed_by_hand(gradient, memory, expected):
    assert numbers(project_on_plane(*vectors(gradient, memory))) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_a_step_does_not_go_against_the_memory(tmp_path, name):
    """With plain descent a step is the gradient, and with all rows remembered that of the memory is known."""
    rows = {"new": make_rows(*range(8))}
    model = AutoModelForCausalLM.from_pretrained(START)
    with torch.no_grad():  # what the model says now: other answers to the same questions
        said_BT = model(input_ids=torch.tensor(rows["new"]["input_ids"])).logits.argmax(-1)
    known = [
        {"input_ids": [*ids[:2], said, 7], "labels": [-100, -100, said, -100]}
        for ids, said in zip(rows["new"]["input_ids"], said_BT[:, 1].tolist(), strict=True)
    ]
    rows["a"] = Dataset.from_list(known, features=TOKEN_FEATURES)
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.01, "global_batch_size": 8, "share": 1.0}
    model(input_ids=torch.tensor(rows["a"]["input_ids"]), labels=torch.tensor(rows["a"]["labels"])).loss.backward()

    def measure_rise(spec: RoundSpec) -> float:
        """The first-order change of the loss on the memory."""
        moved = train(spec, rows, tmp_path)
        return sum((moved[name] * value.grad).sum().item() for name, value in model.named_parameters())

    plain = measure_rise(make_spec({}, (("a", Path()),), **settings))
    section = {"margin": 0.0} if name == "gem" else {}
    projected = measure_rise(make_spec({name: section}, (("a", Path()),), **settings))
    assert plain > 1e-3
    assert abs(projected) < 1e-3 * plain
