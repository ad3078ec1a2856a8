"""L2-SP: the distance from the start by hand."""

from types import SimpleNamespace

import torch
from methods.rounds import START, make_spec

from hftcli.launching.holding import count_held
from hftcli.methods.l2sp import L2sp
from hftcli.recipe.methods import L2spSection


def test_the_distance_from_the_start_and_its_gradient_are_those_computed_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    spec = make_spec({"l2sp": {"strength": 3}})
    method = L2sp(spec, L2spSection(strength=3))
    method.prepare_model(model, None, START, mixed=False, sharded=False)
    assert sum(anchor.nbytes for anchor in method.anchors.values()) == 2 * count_held(spec, num_processes=1, mixed=False)
    method.start(SimpleNamespace(model=model))
    assert method.compute_penalty().item() == 0
    model.weight.data = torch.tensor([[3.0, -2.0]])
    penalty = method.compute_penalty()
    penalty.backward()
    assert penalty.item() == 3 / 2 * (2**2 + 3**2)
    assert model.weight.grad.tolist() == [[3 * 2, 3 * -3]]
