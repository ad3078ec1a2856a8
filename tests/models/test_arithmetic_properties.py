"""Bits survive: a delta laid over its base is the model that a round left, and an interpolation ends at the two models."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.small_models import SIZES, TOKENIZER, assert_same, draw
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hftcli.freezing.selection import FreezePlan
from hftcli.models.arithmetic import interpolate_models, merge_delta
from hftcli.models.checkpoint import save_delta
from hftcli.models.configs import settle_configs
from hftcli.models.reader import Start
from hftcli.recipe.sections import ModelSection

Weights = dict[str, torch.Tensor]
CONFIG = LlamaConfig(**SIZES | {"num_hidden_layers": 1})
SHAPES = {name: tuple(value.shape) for name, value in LlamaForCausalLM(CONFIG).named_parameters()}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32)


class Place:
    """A folder for the checkpoints of one example, and what saving a delta asks for."""

    def __init__(self, top: Path):
        self.top, self.num_folders = top, 0
        CONFIG.save_pretrained(top)
        self.plan: FreezePlan = draw(top)

    def name_folder(self) -> Path:
        """A new one each time: a file is known by its path, size and time."""
        self.num_folders += 1
        return self.top / str(self.num_folders)

    def save(self, weights: Weights) -> Path:
        folder = self.name_folder()
        folder.mkdir()
        shutil.copy(self.top / "config.json", folder)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def save_delta(self, weights: Weights, start: Path, dtype: torch.dtype) -> Path:
        folder, section = self.name_folder(), ModelSection(path=str(start), dtype=str(dtype).removeprefix("torch."))
        configs = settle_configs(start, "LlamaForCausalLM", TOKENIZER, section.dtype, ())
        save_delta(configs, dict(weights), folder, Start(section, start, ()), self.plan)
        return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def draw_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bits at all: numbers of every size, infinities, what is no number, both zeros."""
    values = torch.empty(shape, dtype=dtype)
    values.view(torch.uint8).random_(0, 256, generator=generator)
    return values


def draw_weights(dtype: torch.dtype, generator: torch.Generator) -> Weights:
    return {name: draw_bits(shape, dtype, generator) for name, shape in SHAPES.items()}


# Which rows of which parameters a round changes.
CHANGES = st.fixed_dictionaries(
    {name: st.just(frozenset()) | st.frozensets(st.integers(0, n - 1)) for name, (n, *_) in SHAPES.items()}
)


@settings(max_examples=8)
@given(seed=SEEDS, dtype=DTYPES, rounds=st.lists(st.tuples(DTYPES, CHANGES), min_size=1, max_size=3))
def test_a_stack_of_deltas_merges_to_the_last_model_bit_for_bit(place: Place, seed, dtype, rounds):
    """Also where a round writes in another data type than its start: by way of float32, in which a model is loaded."""
    generator = torch.Generator().manual_seed(seed)
    weights = draw_weights(dtype, generator)
    folder = place.save(weights)
    for dtype, changes in rounds:
        weights = {
            name: values.clone() if values.dtype == dtype else values.float().to(dtype) for name, values in weights.items()
        }
        for name, rows in changes.items():
            weights[name][sorted(rows)] = draw_bits((len(rows), *SHAPES[name][1:]), dtype, generator)
        folder = place.save_delta(weights, folder, dtype)
        stored = {name.removesuffix("/rows") for name in load_file(folder / "delta.safetensors")}
        assert stored <= {name for name, rows in changes.items() if rows}
    merge_delta(folder, merged := place.name_folder())
    assert_same(load_file(merged / "model.safetensors"), weights)


@settings(max_examples=8)
@given(seed=SEEDS, dtype=DTYPES)
def test_the_ends_of_an_interpolation_are_the_models_bit_for_bit(place: Place, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    ends = [draw_weights(dtype, generator) for _ in range(2)]
    folders = [place.save(weights) for weights in ends]
    for weight, expected in zip((0.0, 1.0), ends, strict=True):
        interpolate_models(*folders, weight, found := place.name_folder())
        assert_same(load_file(found / "model.safetensors"), expected)


@settings(max_examples=8)
@given(seed=SEEDS, dtypes=st.tuples(DTYPES, DTYPES), weight=st.floats(0, 1))
def test_between_the_ends_every_number_is_the_weighted_mean(place: Place, seed, dtypes, weight):
    """To the rounding of the tuned model's data type."""
    generator = torch.Generator().manual_seed(seed)
    base, tuned = (
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()} for dtype in dtypes
    )
    interpolate_models(place.save(base), place.save(tuned), weight, output := place.name_folder())
    for name, found in load_file(output / "model.safetensors").items():
        old, new = base[name].double(), tuned[name].double()
        assert found.dtype == dtypes[1]
        tolerance = torch.finfo(dtypes[1]).eps * torch.maximum(old.abs(), new.abs())
        assert ((found.double() - ((1 - weight) * old + weight * new)).abs() <= tolerance).all()
