"""What a round in one process in bfloat16 holds of starts in every data type, against what is planned for it."""

import json
from pathlib import Path

import pytest
import torch
from methods.rounds import make_spec
from models.small_models import SIZES
from raw_weights import mix_types
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hftcli import runners
from hftcli.freezing.budget import Budget
from hftcli.freezing.held import Held
from hftcli.freezing.redrawing import hold_waiting
from hftcli.freezing.rule import FreezeRule
from hftcli.methods import make_methods
from hftcli.methods.census import count_adapters
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.models.division import draw_choices
from hftcli.models.reader import Start, foresee_held
from hftcli.models.tensors import StoredTensor
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import ModelSection
from hftcli.training.probe import check_budget

TYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama by the data type of its files, one of several, and configs without weights."""
    found = {name: tmp_path_factory.mktemp(name) for name in (*TYPES, "mixed")}
    torch.manual_seed(0)
    for name, folder in found.items():
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
        model.to(getattr(torch, name) if name in TYPES else torch.float32).save_pretrained(folder)
    mix_types(found["mixed"])
    for name in TYPES:
        found[f"{name} config"] = tmp_path_factory.mktemp("config")
        (found[f"{name} config"] / "config.json").write_bytes((found[name] / "config.json").read_bytes())
    return found


def plan(folder: Path, *given: str) -> Budget:
    recipe = load_recipe(None, [f"model.path={folder}", "train.bf16=true", "launch.num_processes=1", *given], needs_rows=False)
    described = describe_model(str(folder))
    held = foresee_held(recipe.model, str(folder), [parameter.name for parameter in described.parameters])
    shape = described.model_type, described.parameters, described.num_heads
    return runners.plan_recipe(recipe, runners.Start(str(folder)), *shape, held=held)


def count_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [None, *TYPES])
@pytest.mark.parametrize("stored", [*TYPES, "mixed"])
def test_the_planned_weights_are_those_that_a_round_holds(starts, stored: str, dtype: str | None):
    budget = plan(starts[stored], *([] if dtype is None else [f"model.dtype={dtype}"]))
    section = ModelSection(path=str(starts[stored]), dtype=dtype)
    model = load_model(section, starts[stored], budget.plan, mixed=True, sharded=False)
    assert budget.half.weights_bytes == count_bytes(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    num_trained = sum(sizes[name] for name in budget.plan.trained)
    num_frozen = sum(sizes.values()) - num_trained
    if "bfloat16" in (dtype or stored):
        assert count_bytes(model) == 4 * num_trained + 2 * num_frozen
    elif dtype is not None or stored != "mixed":
        assert count_bytes(model) == 4 * num_trained + 4 * num_frozen
    assert budget.full.weights_bytes == 4 * sum(sizes.values())


def test_other_processes_and_other_arithmetic_hold_all_alike(starts):
    """DeepSpeed in bfloat16 2 bytes, float32 4; a config alone says what its files are, and `model.dtype` counts first."""
    number = plan(starts["float16"]).plan.num_parameters
    assert plan(starts["float16"], "launch.num_processes=2").half.weights_bytes == 2 * number
    assert plan(starts["float16"], "train.bf16=false").half.weights_bytes == 4 * number
    for name in TYPES:
        whole, bare = plan(starts[name]), plan(starts[f"{name} config"])
        assert bare.half.weights_bytes == whole.half.weights_bytes
        converted = [plan(starts[name], "model.dtype=bfloat16"), plan(starts[f"{name} config"], "model.dtype=bfloat16")]
        assert {one.half.weights_bytes for one in converted} == {plan(starts["bfloat16"]).half.weights_bytes}


@pytest.mark.parametrize("stored", [*TYPES, "mixed"])
@pytest.mark.parametrize("given", ["{lora: {r: 4}}", "{peft: {type: LORA, r: 4}}"])
def test_weights_below_adapters_keep_their_files_type(starts, stored: str, given: str):
    recipe = load_recipe(None, [f"method={given}"], needs_rows=False)
    budget = plan(starts[stored], f"method={given}")
    budget = count_adapters(budget, recipe.method, str(starts[stored]))
    section = ModelSection(path=str(starts[stored]))
    (method,) = make_methods(make_spec(recipe.method.model_dump(exclude_none=True)).model_copy(update={"model": section}))
    method.narrow_plan(budget.plan, budget.network.units)
    model = load_model(section, starts[stored], budget.plan, mixed=True, sharded=False)
    method.prepare_model(model, budget.plan, starts[stored], mixed=True, sharded=False)
    assert budget.half.weights_bytes == count_bytes(model)


@pytest.mark.parametrize("stored", [*TYPES, "mixed"])
@pytest.mark.parametrize(
    "given", ["{grain: columns}", "{grain: entries}", "{grain: entries, part: spiel}", "{grain: directions, part: random}"]
)
def test_matrices_of_which_a_part_trains_are_held_as_planned(starts, stored: str, given: str):
    budget, section = plan(starts[stored], f"freeze={given}"), ModelSection(path=str(starts[stored]))
    spec = make_spec({}).model_copy(update={"model": section, "freeze": budget.plan.rule})
    quiet = next(method for method in make_methods(spec) if hasattr(method, "take_bases"))
    model = load_model(section, starts[stored], budget.plan, mixed=True, sharded=False)
    quiet.take_bases(draw_choices(budget.plan.parts, torch.bfloat16))
    quiet.prepare_model(model, budget.plan, starts[stored], mixed=True, sharded=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None])
    added = sum(layer.num_added_bytes for layer in quiet.layers.values())
    assert budget.half.weights_bytes == count_bytes(model) + added


@pytest.mark.parametrize("stored", [*TYPES, "mixed"])
def test_what_autograd_keeps_of_a_step_is_what_was_planned(starts, stored: str):
    """Autocast copies a frozen matrix for each product, and the graph keeps the copy: its cache is for what trains."""
    budget = plan(starts[stored], "data.max_length=64", "train.per_device_train_batch_size=2")
    recipe = load_recipe(None, ["train.bf16=true"], needs_rows=False)
    _, (here, measured) = check_budget(recipe, str(starts[stored]), budget)
    activations, _ = here.half_step
    assert measured.weights_bytes == budget.half.weights_bytes
    assert measured.activations_bytes == pytest.approx(activations.saved_bytes + activations.cast_bytes, rel=0.005)
    narrow, _ = plan(starts["bfloat16"], "data.max_length=64", "train.per_device_train_batch_size=2").half_step
    if stored in ("float32", "float16"):
        # By hand: every frozen matrix of the layers is read by a product whose input has a gradient.
        matrices = [name for name in budget.plan.frozen if "proj" in name]
        sizes = {parameter.name: parameter.num_elements for unit in budget.network.units for parameter in unit.parameters}
        assert activations.cast_bytes - narrow.cast_bytes == 2 * sum(sizes[name] for name in matrices)


def test_vectors_with_masters_are_wide_and_matrices_with_them_are_exact_below_adapters(starts):
    start = Start(ModelSection(path=str(starts["bfloat16"])), starts["bfloat16"], ())
    names = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    start.masters = {name: StoredTensor(name, "F32", start.layout.shapes[name], Path("masters"), 0, 0) for name in names}
    assert start.held == Held(wide=frozenset(names[:1]), exact=frozenset(names))


def test_what_waits_for_its_draw_is_rounded_but_for_vectors(starts):
    given = {"redraw": {"every": 5, "order": "ascending"}, "group": "layer", "trainable_fraction": 0.25}
    rule = FreezeRule.model_validate(given | {"embeddings": "freeze", "head": "freeze"})
    budget = plan(starts["float32"], f"freeze={json.dumps(rule.model_dump(exclude_defaults=True))}")
    names = {parameter.name: parameter for unit in budget.network.units for parameter in unit.parameters}
    layers = {name for name in names if "layers" in name}
    vectors = {name for name in layers if "norm" in name}
    assert hold_waiting(Held(frozenset(names)), budget.network.units, rule, 0).wide == (names.keys() - layers) | vectors
    trained = {name for name in layers if name in budget.plan.trained}
    assert 0 < len(trained) < len(layers)
    expected = {name: 4 if name in trained or name in vectors or name not in layers else 2 for name in names}
    assert budget.half.weights_bytes == sum(names[name].num_elements * size for name, size in expected.items())
