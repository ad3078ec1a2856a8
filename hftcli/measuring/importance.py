"""What the units of a model matter: the scores that `freeze.rank` goes by, a number for each unit in the layers.

Every score is a mean over a unit's weights, so that units of unlike size compare; but for `spectrum`, which is a ratio.

Shapes: O and I, outputs and inputs of a matrix; T tokens of a row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from hftcli.data.tokens import IGNORED
from hftcli.freezing.directions import name_input
from hftcli.freezing.roles import Unit
from hftcli.methods.ewc import differentiating, draw_gradients
from hftcli.models.device import make_exact

Read = Callable[[str], torch.Tensor]  # a parameter by its name
Lesson = tuple[float, Sequence[int], Sequence[int]]  # a sign, the ids of a row, and its labels

QUARTILES_APART = 1.349  # of a normal distribution, in standard deviations


def score_magnitude(units: Iterable[Unit], read: Read) -> dict[str, float]:
    """The mean absolute weight."""
    return average(units, lambda name: make_exact(read(name)).abs().sum().item())


def score_wanda(units: Iterable[Unit], read: Read, squares: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The mean of |W_ij| times the root mean square of input j (arXiv 2306.11695).

    Args:
        squares: mean square of each input (I), by what a matrix reads.
    """
    found = {}
    for unit in units:
        if unit.role != "norm":
            weight_OI, squares_I = make_exact(read(unit.parameters[0].name)), make_exact(squares[name_input(unit)])
            found[unit.name] = (weight_OI.abs().mean(0) * squares_I.sqrt()).mean().item()
    return found


def score_spectrum(units: Iterable[Unit], read: Read) -> dict[str, float]:
    """Signal to noise of a matrix's singular values, over the largest of them (arXiv 2406.06623).

    Noise is all that is no larger than the edge of the Marchenko-Pastur law, s (1 + sqrt(shorter over longer side)), where s is
    what the values' quartiles would say of a normal distribution. Of several matrices in one parameter, the mean.
    """
    return {unit.name: measure_signal(read(unit.parameters[0].name)) for unit in units if len(unit.parameters[0].shape) > 1}


def measure_signal(weight: torch.Tensor) -> float:
    """See `score_spectrum`; less noise than the rounding of the largest value counts as that."""
    if weight.ndim > 2 and weight.shape[1] == 1:  # a convolution of each channel by itself
        weight = weight.flatten(1)
    exact = make_exact(weight)
    matrices = exact.flatten(0, -3) if weight.ndim > 2 else exact[None]
    found: list[float] = []
    for matrix_OI in matrices:
        values = torch.linalg.svdvals(matrix_OI)
        low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64, device=values.device))
        shape = sorted(matrix_OI.shape)
        edge = (high - low) / QUARTILES_APART * (1 + (shape[0] / shape[1]) ** 0.5)
        signal, noise = values[values > edge].sum(), values[values <= edge].sum()
        floor = torch.finfo(torch.float64).eps * values.max()
        found.append((signal / torch.maximum(noise, floor) / values.max()).item())
    return sum(found) / len(found)


def score_fisher(
    units: Iterable[Unit], model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device, seed: int
) -> dict[str, float]:
    """The mean over weights and rows of the squared gradient of log p(labels), with labels that the model draws."""
    batches = (
        {"input_ids": (ids_1T := torch.tensor([list(ids)], device=device)), "labels": ids_1T} for ids in rows if len(ids) > 1
    )
    sums: dict[str, float] = {}
    for gradients in draw_gradients(model, batches, torch.Generator(device).manual_seed(seed)):
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0.0) + make_exact(gradient).square().sum().item()
    return average(units, lambda name: sums[name] / len(rows))


def score_gradient(
    units: Iterable[Unit], model: nn.Module, lessons: Iterable[Lesson], device: torch.device
) -> dict[str, float]:
    """The mean absolute gradient of what new rows would teach, summed over their tokens."""
    with differentiating(model) as parameters:
        sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        for sign, ids, labels in lessons:
            labels_T = torch.tensor(list(labels), device=device)
            logits_TV = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, :-1].float()
            nats = nn.functional.cross_entropy(logits_TV, labels_T[1:], ignore_index=IGNORED, reduction="sum")
            gradients = torch.autograd.grad(sign * nats, list(parameters.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.float()
    return average(units, lambda name: make_exact(sums[name]).abs().sum().item())


def average(units: Iterable[Unit], add_up: Callable[[str], float]) -> dict[str, float]:
    """By unit, the sums of its parameters over its weights."""
    return {unit.name: sum(add_up(item.name) for item in unit.parameters) / unit.num_parameters for unit in units}
