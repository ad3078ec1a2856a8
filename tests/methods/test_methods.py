"""The methods on problems with two parameters, against numbers computed by hand; then in rounds of the embedded model."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PretrainedConfig, Qwen2Config

from hftcli import PACKAGE
from hftcli.data.tokens import TOKEN_FEATURES
from hftcli.errors import InputError, ModelError
from hftcli.freezing.roles import Parameter, assign_roles
from hftcli.freezing.selection import FreezeRule, make_plan, narrow_plan
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.methods import make_methods
from hftcli.methods.agem import project_on_plane
from hftcli.methods.ewc import Ewc, QuadraticPenalty, sum_squared_gradients
from hftcli.methods.gem import project_on_cone, solve_dual
from hftcli.methods.ia3 import Ia3
from hftcli.methods.l2sp import L2sp
from hftcli.methods.lora import ADAPTER, read_adapter, write_adapter
from hftcli.methods.method import draw_rows
from hftcli.methods.olora import measure_overlap
from hftcli.methods.replay import order_passes
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.models.proof import verify_checkpoint
from hftcli.recipe.methods import EwcSection, L2spSection, MethodSection
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runners import check_method
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import EarlierRound, RoundSpec
from hftcli.training.round import run_round
from hftcli.training.trainers import TaskTrainer, make_training_arguments

START = PACKAGE / "tinyworld" / "model"


def make_spec(method: dict, earlier: tuple[tuple[str, Path], ...] = (), share: float = 0.5, **train: object) -> RoundSpec:
    settings = {"bf16": False, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    return RoundSpec(
        objective="sft", index=len(earlier), model=ModelSection(path=str(START)), data=DataSection(max_length=32), task="new",
        freeze=FreezeRule(trainable_fraction=share), train=TrainSection(**settings | train),
        launch=LaunchSection(num_processes=1), method=MethodSection.model_validate(method),
        earlier=tuple(EarlierRound(task=task, folder=str(folder)) for task, folder in earlier),
    )  # fmt: skip


def make_rows(*firsts: int) -> Dataset:
    """Rows of four tokens, the last two of which are trained; the first tells them apart."""
    rows = [{"input_ids": [first, 5, 6 + first % 40, 7], "labels": [-100, -100, 6 + first % 40, 7]} for first in firsts]
    return Dataset.from_list(rows, features=TOKEN_FEATURES)


def list_firsts(rows: Dataset) -> list[int]:
    return [ids[0] for ids in rows["input_ids"]]


def vectors(*rows: tuple[float, ...]) -> list[list[torch.Tensor]]:
    """Gradients of two parameters, each of them a tensor of one number."""
    return [[torch.tensor([float(value)]) for value in row] for row in rows]


def numbers(gradient: list[torch.Tensor]) -> list[float]:
    return torch.cat(gradient).tolist()


# Replay


def replay(dataset: Dataset, rows: dict[str, Dataset], earlier: tuple[str, ...], **settings: object) -> Dataset:
    train = settings.pop("train", {})
    spec = make_spec({"replay": settings}, tuple((task, Path()) for task in earlier), **train)
    (method,) = make_methods(spec)
    assert set(method.needed_tasks) == rows.keys() - {"new"}
    return method.prepare_rows(dataset, rows)


def test_replay_mixes_in_a_share_of_each_earlier_task():
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140)), "b": make_rows(*range(200, 220))}
    firsts = list_firsts(replay(rows["new"], rows, ("a", "b"), fraction=0.25))
    from_a, from_b = firsts[10:20], firsts[20:]
    assert firsts[:10] == list(range(10))
    assert len(set(from_a) & set(range(100, 140))) == 10  # a quarter of 40, each once
    assert len(set(from_b) & set(range(200, 220))) == 5
    assert from_a != list(range(100, 110))  # at random, not the first ones


def test_replay_draws_the_same_rows_of_a_task_in_every_round():
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140)), "b": make_rows(*range(200, 240))}
    second = list_firsts(replay(rows["new"], {"new": rows["new"], "a": rows["a"]}, ("a",), fraction=0.1))
    third = list_firsts(replay(rows["new"], rows, ("a", "b"), fraction=0.1))
    assert second[10:] == third[10:14]
    assert [first - 100 for first in third[10:14]] != [first - 200 for first in third[14:]]  # each task has a draw of its own


def test_replay_after_the_task_is_one_pass_behind_all_epochs(tmp_path):
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 140)), "lima": make_rows(*range(300, 307))}
    settings = {"fraction": 0.1, "when": "after", "extra": "lima", "train": {"num_train_epochs": 2.5}}
    firsts = list_firsts(replay(rows["new"], rows, ("a",), **settings))
    assert len(firsts) == 25 + 4 + 7
    assert sorted(firsts[:10]) == sorted(firsts[10:20]) == list(range(10))
    assert firsts[:10] != firsts[10:20]
    assert len(set(firsts[20:25]) & set(range(10))) == 5
    assert set(firsts[25:]) > set(range(300, 307))
    assert firsts[25:] != sorted(firsts[25:])


def test_the_trainer_takes_the_rows_after_the_task_in_their_order(tmp_path):
    spec = make_spec({"replay": {"when": "after", "fraction": 1.0}}, (("a", Path()),), num_train_epochs=2, global_batch_size=4)
    rows = {"new": make_rows(*range(10)), "a": make_rows(*range(100, 104))}
    trainer = make_trainer(spec, rows, tmp_path)
    seen = [first for batch in trainer.get_train_dataloader() for first in batch["input_ids"][:, 0].tolist()]
    assert sorted(seen[:20]) == sorted([*range(10), *range(10)])
    assert sorted(seen[20:]) == list(range(100, 104))


def test_steps_that_are_given_are_steps_on_the_task():
    order = order_passes(10, TrainSection(max_steps=6, global_batch_size=4, num_train_epochs=99), seed=0)
    assert len(order) == 24
    assert np.bincount(order[:20]).tolist() == [2] * 10


def test_without_earlier_tasks_replay_leaves_the_rows_alone():
    rows = {"new": make_rows(*range(10))}
    assert replay(rows["new"], rows, ()) is rows["new"]


def test_more_rows_than_there_are_is_all_of_them():
    assert list_firsts(draw_rows(make_rows(1, 2, 3), 9, "a", 0)) == [1, 2, 3]


# EWC


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


# L2-SP


def test_the_distance_from_the_start_and_its_gradient_are_those_computed_by_hand():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    method = L2sp(make_spec({"l2sp": {"strength": 3}}), L2spSection(strength=3))
    method.prepare_model(model, None, START, mixed=False, sharded=False)
    method.start(SimpleNamespace(model=model))
    assert method.compute_penalty().item() == 0
    model.weight.data = torch.tensor([[3.0, -2.0]])
    penalty = method.compute_penalty()
    penalty.backward()
    assert penalty.item() == 3 / 2 * (2**2 + 3**2)
    assert model.weight.grad.tolist() == [[3 * 2, 3 * -3]]


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


# GEM and A-GEM


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


# O-LoRA


def test_the_overlap_of_two_adapters_is_that_computed_by_hand():
    old = torch.tensor([[1.0, 0.0, 2.0]])
    new = torch.tensor([[3.0, 1.0, -1.0], [0.0, 5.0, 0.0]], requires_grad=True)
    overlap = measure_overlap(old, new)
    overlap.backward()
    assert overlap.item() == (3 - 2) ** 2 + 0**2
    assert new.grad.tolist() == [[2.0, 0.0, 4.0], [0.0, 0.0, 0.0]]  # 2 (a_old . a_new) a_old


# What goes together, and what a launch can carry


@pytest.mark.parametrize(
    "names",
    [
        ("gem", "agem"),
        *(("lora", "olora"), ("lora", "ia3"), ("olora", "ia3")),
        *(("ewc", "lora"), ("ewc", "olora"), ("ewc", "ia3"), ("l2sp", "lora"), ("l2sp", "olora"), ("l2sp", "ia3")),
    ],
)
def test_methods_that_contradict_each_other_are_refused(names):
    with pytest.raises(ValidationError, match=f"{names[0]} and {names[1]} do not go together: .*: drop one"):
        MethodSection.model_validate({name: {"strength": 1} if name == "l2sp" else {} for name in names})


def test_the_other_methods_go_together():
    names = [method.__class__.__name__ for method in make_methods(make_spec({"gem": {}, "replay": {}, "ewc": {}}))]
    assert names == ["Replay", "Ewc", "Gem"]


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("gem", 1, "with 2 processes ZeRO has taken it apart"),
        ("agem", 2, "with 2 processes ZeRO has taken it apart"),
        ("ewc", 3, "measures every weight on its own, and under launch.zero_stage 3"),
        ("lora", 3, "merged into whole weights, and under launch.zero_stage 3"),
        ("olora", 3, "merged into whole weights, and under launch.zero_stage 3"),
        ("ia3", 3, "merged into whole weights, and under launch.zero_stage 3"),
        ("l2sp", 3, "compares every weight with its start, and under launch.zero_stage 3"),
    ],
)
def test_a_launch_that_cannot_carry_a_method_is_refused(name, stage, message):
    spec = make_spec({name: {"strength": 1} if name == "l2sp" else {}})
    with pytest.raises(InputError, match=message):
        check_method(spec.model_copy(update={"launch": LaunchSection(num_processes=2, zero_stage=stage)}))
    check_method(spec)  # one process


def test_replay_goes_with_every_launch():
    spec = make_spec({"replay": {}})
    check_method(spec.model_copy(update={"launch": LaunchSection(num_processes=8, zero_stage=3)}))


def test_adapters_train_the_matrices_of_the_layers_that_the_plan_trains():
    described = describe_model(str(START))
    units = assign_roles(described.model_type, described.parameters)
    plan = make_plan(units, FreezeRule(), 0)
    narrowed = narrow_plan(plan, units, None)
    assert set(narrowed.trained) == {name for name in plan.trained if "_proj" in name}
    assert set(narrowed.trained) | set(narrowed.frozen) == set(plan.trained) | set(plan.frozen)
    assert narrowed.num_trainable == sum(plan.roles[role].num_trainable for role in ("attention", "mlp"))
    assert narrowed.num_trainable_units == len(narrowed.trained)
    assert narrowed.roles["head"].num_trainable_units == 0
    assert narrowed.fingerprint != plan.fingerprint
    assert {name.split(".")[-2] for name in narrow_plan(plan, units, ("q_proj", "v_proj")).trained} <= {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match="no adapter would train: target_modules is query, .*q_proj"):
        narrow_plan(plan, units, ("query",))


def test_adapters_sit_on_every_linear_layer_but_the_head_where_nothing_is_frozen():
    described = describe_model(str(START))
    units = assign_roles(described.model_type, described.parameters)
    (method,) = make_methods(make_spec({"lora": {}}))
    plan = method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=1.0), 0), units)
    modules = AutoModelForCausalLM.from_pretrained(START).named_modules()
    linear = {f"{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}
    assert set(plan.trained) == linear - {"lm_head.weight"}


# IA3


def list_scaled(model_type: str, parameters: list[Parameter], share: float = 1.0) -> list[str]:
    units = assign_roles(model_type, parameters)
    (method,) = make_methods(make_spec({"ia3": {}}))
    return list(method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=share), 0), units).trained)


def test_keys_values_and_inner_activations_are_scaled():
    described = describe_model(str(START))
    scaled = list_scaled(described.model_type, described.parameters)
    assert {name.split(".")[-2] for name in scaled} == {"k_proj", "v_proj", "down_proj"}
    half = list_scaled(described.model_type, described.parameters, share=0.5)
    assert 0 < len(half) < len(scaled)
    gpt2 = [
        Parameter(f"transformer.h.0.{name}.{kind}", shape)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for kind, shape in (("weight", (4, 4)), ("bias", (4,)))
    ]
    names = ("attn.c_attn.weight", "attn.c_attn.bias", "mlp.c_proj.weight")
    assert list_scaled("gpt2", gpt2) == [f"transformer.h.0.{name}" for name in names]
    with pytest.raises(ModelError, match="ia3 scales c_attn, c_proj, and the freeze plan trains none"):
        list_scaled("gpt2", [*gpt2, Parameter("transformer.ln_f.weight", (4,))], share=0.01)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),  # with biases on keys and values
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2),  # matrices the other way round
    ],
    ids=lambda config: config.model_type,
)
def test_merged_vectors_say_what_they_said_before(tmp_path, config: PretrainedConfig):
    torch.manual_seed(0)
    start = tmp_path / "start"
    model = AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data.normal_(std=0.3)
    model.save_pretrained(start)
    described = describe_model(str(start))
    units = assign_roles(described.model_type, described.parameters)
    (method,) = make_methods(make_spec({"ia3": {}}))
    assert isinstance(method, Ia3)
    plan = method.narrow_plan(make_plan(units, FreezeRule(trainable_fraction=1.0), 0), units)
    section = ModelSection(path=str(start))
    model = load_model(section, start, plan, mixed=False, sharded=False)
    ids = torch.tensor([[1, 5, 6, 7]])
    untouched = model(ids).logits
    method.prepare_model(model, plan, start, mixed=False, sharded=False)
    assert {name.split(".")[-2] for name, value in model.named_parameters() if value.requires_grad} == {"ia3_l"}
    torch.testing.assert_close(model(ids).logits, untouched)  # the vectors begin at one
    for layer in method.layers.values():
        layer.ia3_l[ADAPTER].data.uniform_(0.5, 1.5)
    scaled = model(ids).logits
    assert (scaled - untouched).abs().max() > 0.01
    round_ = Round(tmp_path / "round")
    round_.folder.mkdir()
    args = SimpleNamespace(process_index=0)
    method.finish(SimpleNamespace(model=model, is_deepspeed_enabled=False, args=args), round_)
    torch.testing.assert_close(model(ids).logits, scaled, rtol=1e-4, atol=1e-5)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), round_.adapter)
    torch.testing.assert_close(loaded(ids).logits, scaled, rtol=1e-4, atol=1e-5)
    # What the plan says, and nothing else, has moved.
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(plan.trained)


def halve(folder: Path) -> Path:
    """The embedded model in bfloat16."""
    AutoModelForCausalLM.from_pretrained(START, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(START).save_pretrained(folder)
    return folder


def test_an_adapter_goes_on_in_float32_beside_weights_in_bfloat16(tmp_path):
    start, earlier = halve(tmp_path / "start"), Round(tmp_path / "00-a")
    spec = make_spec({"lora": {}}, (("a", earlier.folder),)).model_copy(update={"model": ModelSection(path=str(start))})
    described = describe_model(str(start))
    units = assign_roles(described.model_type, described.parameters)
    (method,) = make_methods(spec)
    plan = method.narrow_plan(make_plan(units, spec.freeze, 1), units)
    name = plan.trained[0].removesuffix(".weight")
    num_outputs, num_inputs = next(one.shape for unit in units for one in unit.parameters if one.name == plan.trained[0])
    adapter = {name: (torch.randn(8, num_inputs), torch.randn(num_outputs, 8))}
    earlier.folder.mkdir()
    write_model(earlier.spec_path, spec)
    write_adapter(adapter, LoraConfig(r=8), start, earlier.adapter)
    model = load_model(spec.model, start, plan, mixed=True, sharded=False)
    method.prepare_model(model, plan, start, mixed=True, sharded=False)
    layer = method.layers[name]
    assert layer.base_layer.weight.dtype == torch.bfloat16
    for part, expected in zip((layer.lora_A, layer.lora_B), adapter[name], strict=True):
        assert torch.equal(part["default"].weight, expected)
        assert part["default"].weight.requires_grad
    adapted = {f"{name}.weight" for name in method.layers}
    assert adapted == set(plan.trained)
    assert {".".join(name.split(".")[-3:]) for name, value in model.named_parameters() if value.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


# In the trainer


def make_trainer(spec: RoundSpec, rows: dict[str, Dataset], folder: Path) -> TaskTrainer:
    described = describe_model(str(START))
    units = assign_roles(described.model_type, described.parameters)
    plan = make_plan(units, spec.freeze, spec.index)
    methods = make_methods(spec)
    dataset = rows["new"]
    for method in methods:
        plan = method.narrow_plan(plan, units)
        dataset = method.prepare_rows(dataset, rows)
    model = load_model(spec.model, START, plan, mixed=False, sharded=False)
    for method in methods:
        method.prepare_model(model, plan, START, mixed=False, sharded=False)
    args = make_training_arguments(spec, folder)
    return TaskTrainer(model, args, dataset, AutoTokenizer.from_pretrained(START), [], methods, "plain")


def train(spec: RoundSpec, rows: dict[str, Dataset], folder: Path) -> dict[str, torch.Tensor]:
    """How far each parameter moved."""
    trainer = make_trainer(spec, rows, folder)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}


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


# In rounds


def run_rounds(folder: Path, method: dict, start: Path = START, **launch: object) -> list[Round]:
    """Two short rounds on the embedded sequence, one from the other."""
    tasks = ["tinyworld/newcomers", "tinyworld/topic"]
    rounds = [Round(folder / f"{place:02d}") for place in range(2)]
    for place, round_ in enumerate(rounds):
        spec = RoundSpec(
            objective="sft", index=place, data=DataSection(max_length=64, max_examples=64), task=tasks[place],
            model=ModelSection(path=str(rounds[place - 1].checkpoint if place else start)), freeze=FreezeRule(),
            train=TrainSection(bf16=False, max_steps=4, learning_rate=1e-3, global_batch_size=8),
            launch=LaunchSection(**{"num_processes": 1} | launch), method=MethodSection.model_validate(method),
            earlier=tuple(EarlierRound(task=tasks[before], folder=str(rounds[before].folder)) for before in range(place)),
        )  # fmt: skip
        round_.folder.mkdir(parents=True)
        write_model(round_.spec_path, spec)
        if spec.launch.num_processes == 1:
            run_round(round_, StopRequest(round_))
        else:
            launch_round(round_, spec.launch, lambda progress: None)
        assert round_.read_result().verification.passed
    return rounds


def read_weights(round_: Round) -> dict[str, torch.Tensor]:
    return load_file(round_.checkpoint / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ewc_adds_up_what_the_rounds_measure(tmp_path, processes):
    first, second = run_rounds(tmp_path, {"ewc": {"num_examples": 16}}, num_processes=processes, zero_stage=2)
    before, after = load_file(first.fisher_path), load_file(second.fisher_path)
    assert before.keys() == after.keys() == read_weights(first).keys()  # the frozen half too
    assert all((after[name] >= before[name]).all() for name in before)
    assert all(values.sum() > 0 for values in before.values())
    assert [any("penalty" in row for row in round_.read_metrics()) for round_ in (first, second)] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"gem": {}},
        {"agem": {}},
        {"replay": {"when": "after"}},
        {"lora": {}, "gem": {}},
        {"ia3": {}},
        {"l2sp": {"strength": 0.1}},
    ],
)
def test_rounds_with_a_method_are_verified(tmp_path, method):
    rounds = run_rounds(tmp_path, method)
    assert all(round_.read_result().num_steps >= 4 for round_ in rounds)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_one_adapter_goes_through_all_rounds(tmp_path, processes):
    """In bfloat16: what trains is the first start plus one product, what is frozen keeps its bytes, adapters and all."""
    start = halve(tmp_path / "start")
    rounds = run_rounds(tmp_path, {"lora": {}}, start, num_processes=processes, zero_stage=2)
    base = load_file(start / "model.safetensors")
    seen = set()
    for place, round_ in enumerate(rounds):
        seen |= {name.removesuffix(".weight") for name in round_.read_plan().trained}
        adapter, weights = read_adapter(round_.adapter), read_weights(round_)
        assert adapter.keys() == seen
        for name, (weight_A_RI, weight_B_OR) in adapter.items():
            merged = base[f"{name}.weight"].float() + 32 / 8 * weight_B_OR @ weight_A_RI
            assert torch.equal(weights[f"{name}.weight"], merged.bfloat16())
        previous = rounds[place - 1].checkpoint if place else start
        assert verify_checkpoint(previous, round_.checkpoint, round_.read_plan(), {}).violations == ()
    # An adapter that is met again went on from where it was.
    before, last = (read_adapter(round_.adapter) for round_ in rounds)
    again = {name.removesuffix(".weight") for name in rounds[1].read_plan().trained} & before.keys()
    assert again
    for name in again:
        assert (last[name][0] - before[name][0]).norm() < 0.5 * before[name][0].norm()


@pytest.mark.slow
def test_peft_makes_the_same_model_of_the_adapter(tmp_path):
    *_, last = run_rounds(tmp_path, {"lora": {"target_modules": ["q_proj", "down_proj"]}})
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(last.checkpoint)(ids).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(START), last.adapter)(ids).logits
    torch.testing.assert_close(merged, loaded, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ia3", "l2sp"])
def test_two_ranks_agree_with_one_process_under_a_method(tmp_path, name):
    """In bfloat16 with float32 masters on one side, whose weights DeepSpeed takes apart on the other."""
    method = {name: {"strength": 1.0} if name == "l2sp" else {}}
    one, two = (
        [read_weights(round_) for round_ in run_rounds(tmp_path / str(num), method, num_processes=num, zero_stage=2)]
        for num in (1, 2)
    )
    for single, pair in zip(one, two, strict=True):
        assert all((single[key] - pair[key]).abs().max() < 2e-3 for key in single)


@pytest.mark.slow
def test_new_adapters_turn_away_from_the_earlier_ones(tmp_path):
    def measure(strength: float) -> float:
        first, second = run_rounds(tmp_path / str(strength), {"olora": {"orthogonality": strength}})
        old, new = read_adapter(first.adapter), read_adapter(second.adapter)
        both = old.keys() & new.keys()
        assert both
        assert new.keys() == {name.removesuffix(".weight") for name in second.read_plan().trained}
        return sum(measure_overlap(old[name][0], new[name][0]).item() for name in both)

    assert measure(10.0) < 0.9 * measure(0.0)
