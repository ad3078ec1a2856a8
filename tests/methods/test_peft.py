"""Adapters of PEFT's: each type trains, merges into what it said, is proved, and is laid over the start by PEFT alone."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training.quiet_rounds import SUITED, go_back, make_pairs_spec, make_spec, make_start, run
from transformers import AutoModelForCausalLM

from hftcli.errors import InputError, ModelError, RecipeError
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.methods import peft_config
from hftcli.methods.adalora import SUMS
from hftcli.methods.peft import choose_targets
from hftcli.methods.peft_config import build_config
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.models.proof import verify_round
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.methods import MethodSection, PeftKind
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.training.reading import read_assignment
from hftcli.training.round import run_round

WHOLE = {"trainable_fraction": 1.0}
QUICK = ("LORA", "OFT", "SHIRA")


def make_method(kind: str, **values: object) -> MethodSection:
    return MethodSection.model_validate({"peft": {"type": kind, **SUITED.get(kind, {}), **values}})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_start(tmp_path_factory.mktemp("peft") / "start")
    weights = load_file(folder / "model.safetensors")
    biases = {name: torch.randn_like(values) / 10 for name, values in weights.items() if name.endswith("bias")}
    save_file(weights | biases, folder / "model.safetensors", {"format": "pt"})  # transformers begins them at 0
    return folder


def list_kinds() -> list[object]:
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in get_args(PeftKind)]


@pytest.mark.parametrize("kind", list_kinds())
def test_what_is_merged_is_what_the_adapter_says(start: Path, tmp_path: Path, kind: str):
    round_ = run(tmp_path / "00", make_spec(start, WHOLE, method=make_method(kind)))
    result, plan = round_.read_result(), round_.read_plan()
    assert result.verification.passed
    assert verify_round(round_).passed
    assert {name.split(".")[-2] for name in plan.trained} <= {
        "LN_TUNING": {"input_layernorm", "post_attention_layernorm", "norm"},
        "TRAINABLE_TOKENS": {"embed_tokens"},
    }.get(kind, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    assert result.adapter.name == kind.lower()
    assert result.adapter.num_bytes == (round_.adapter / "adapter_model.safetensors").stat().st_size
    assert json.loads(round_.outlook_path.read_text())["num_adapter_weights"] == result.adapter.num_weights > 0
    ids = torch.tensor([[1, 32, 39, 75, 93]])
    with torch.no_grad(), warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):  # PEFT's, of kernels, of norms as layers, of ranks that moved
            warnings.simplefilter("ignore", category)
        untouched = AutoModelForCausalLM.from_pretrained(start)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(round_.checkpoint)(ids).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), round_.adapter).eval()(ids).logits
    torch.testing.assert_close(loaded, merged, rtol=1e-4, atol=1e-4)
    assert (merged - untouched).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ADALORA", "SHIRA", "VERA"])
def test_a_round_that_was_killed_ends_in_the_same_bits(start: Path, tmp_path: Path, kind: str):
    spec = make_spec(start, WHOLE, method=make_method(kind))
    spec = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"save_steps": 2, "keep": 3})})
    done = run(tmp_path / "00", spec)
    round_ = go_back(done, 2, tmp_path / "01")
    shutil.rmtree(round_.adapter)
    run_round(round_, StopRequest(round_))
    assert round_.read_result().resumed_from == 2
    for path in ("checkpoint/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (round_.folder / path).read_bytes() == (done.folder / path).read_bytes(), path


def test_adalora_goes_on_where_the_model_trains(start: Path):
    """What a step checkpoint gives lies on the CPU; the device here is one that no tensor of the CPU goes with."""
    spec = make_spec(start, WHOLE, method=make_method("ADALORA"))
    task, device = read_assignment(spec), torch.device("meta")
    (method,) = task.methods
    model = load_model(spec.model, start, task.plan, mixed=False, sharded=False)
    method.prepare_model(model, task.plan, start, mixed=False, sharded=False)
    for value in model.parameters():
        value.grad = torch.ones_like(value) if value.requires_grad else None
    allocator = method.tuner.rankallocator
    allocator.update_ipt(model)
    recalled = method.recall()
    allocator.reset_ipt()
    model.to(device)
    method.restore(recalled)
    method.start(SimpleNamespace(args=SimpleNamespace(device=device), state=SimpleNamespace(max_steps=100)))
    held = [values for name in SUMS for values in vars(allocator)[name].values()]
    assert len(held) == 3 * len(recalled["ipt"]) > 0
    assert {values.device for values in held} == {device}
    allocator.update_ipt(model)


@pytest.mark.slow
def test_what_is_untouched_is_the_bare_model(start: Path, tmp_path: Path):
    """FOURIERFT begins at random: the scores before, and the reference of preferences, are of the model without it."""
    losses = []
    for kind in ("FOURIERFT", "LORA"):  # LoRA begins where the model is
        spec = make_pairs_spec(start, WHOLE, "precompute")
        round_ = run(tmp_path / kind, spec.model_copy(update={"method": make_method(kind)}))
        losses.append(round_.read_metrics()[0]["loss"])
    assert losses[1] == pytest.approx(0.693, abs=1e-3)
    assert abs(losses[0] - 0.693) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LORA", "OFT", "SHIRA", "VERA", "LN_TUNING", "LOHA"])
def test_two_ranks_end_where_one_process_does(start: Path, tmp_path: Path, kind: str):
    rounds = []
    for num_processes in (1, 2):
        launch = LaunchSection(num_processes=num_processes, zero_stage=2)
        train = {"per_device_train_batch_size": 8 // num_processes}
        round_ = Round(tmp_path / f"{num_processes}")
        round_.folder.mkdir()
        write_model(round_.spec_path, make_spec(start, WHOLE, method=make_method(kind), launch=launch, train=train))
        launch_round(round_, launch, lambda progress: None)
        rounds.append(load_file(round_.checkpoint / "model.safetensors"))
        assert round_.read_result().verification.passed
    for name, values in rounds[0].items():
        assert torch.allclose(values, rounds[1][name], rtol=0, atol=1e-5), name


def test_a_next_round_begins_new_adapters(start: Path, tmp_path: Path):
    first = run(tmp_path / "00", make_spec(start, {}, method=make_method("SHIRA")))
    second = run(tmp_path / "01", make_spec(first.checkpoint, {}, 1, (first.folder,), method=make_method("SHIRA")))
    assert second.read_result().verification.passed
    assert second.read_plan().trained != first.read_plan().trained


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"type": "LORA", "rank": 4}, "PEFT's LoraConfig has no such key"),
        ({"type": "LORA", "lora_alhpa": 4}, "did you mean 'lora_alpha'"),
        ({"type": "LORA", "r": "four"}, "method.peft.r: input should be a valid integer"),
        ({"type": "LORA", "bias": "all"}, "trains biases besides"),
        ({"type": "LORA", "init_lora_weights": "pissa"}, "changes the weights below"),
        ({"type": "LORA", "modules_to_save": ["lm_head"]}, "an adapter is all that trains"),
        ({"type": "ADALORA", "total_step": 10}, "the number of the round's steps"),
        ({"type": "LORA", "kasa_config": {}}, "changes the weights below"),
        ({"type": "LORA", "use_qalora": True}, "held in 4 bits"),
        ({"type": "LORA", "qalora_group_size": 8}, "held in 4 bits"),
        ({"type": "LORA", "lora_bias": True}, "trains biases besides"),
        ({"type": "LORA", "monteclora_config": {}}, "term of the loss"),
        ({"type": "LORA", "alora_invocation_tokens": [1]}, "does not merge"),
        ({"type": "LORA", "arrow_config": {}}, "trained before"),
        ({"type": "ADALORA", "r": 4}, "method.peft.r would have no effect with type ADALORA"),
        ({"type": "ADALORA", "alpha_pattern": {"q_proj": 4}}, "method.peft.alpha_pattern would have no effect"),
        (
            {"type": "LORA", "target_modules": ".*_proj", "layers_to_transform": [0]},
            "cannot be used when `target_modules` is a",
        ),
        (
            {"type": "LORA", "target_modules": ".*_proj", "layers_pattern": "layers"},
            "cannot be used when `target_modules` is a",
        ),
        ({"type": "LORA", "layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_keys_that_peft_does_not_take_are_named(given: dict, said: str):
    section = MethodSection.model_validate({"peft": given}).peft
    with pytest.raises(InputError, match=said):
        build_config(section.type, section.extra, ["x"])


def test_adapters_that_change_the_weights_below_do_not_train(start: Path, monkeypatch: pytest.MonkeyPatch):
    """KaSA does; whatever of PEFT's does so under a key that is not refused is found by the weights themselves."""
    monkeypatch.delitem(peft_config.REFUSED, "kasa_config")
    spec = make_spec(start, WHOLE, method=make_method("LORA", r=2, use_dora=False, kasa_config={}))
    task = read_assignment(spec)
    (method,) = task.methods
    model = load_model(spec.model, start, task.plan, mixed=False, sharded=False)
    with pytest.raises(InputError, match=r"change the weights below, such as .*\.weight"):
        method.prepare_model(model, task.plan, start, mixed=False, sharded=False)


def test_a_pattern_names_layers_that_take_adapters(start: Path):
    described = describe_model(str(start))
    units = assign_roles(described.model_type, described.parameters)
    plan = make_plan(units, FreezeRule(trainable_fraction=0.25), 0)
    for kind, key, pattern in (
        ("LORA", "rank_pattern", "q_proj|layers.0.mlp.up_proj"),
        ("LORA", "alpha_pattern", "model.layers.1.self_attn.k_proj"),
        ("OSF", "rank_pattern", "k_pr"),
        ("C3A", "block_size_pattern", "v_proj"),
    ):
        assert choose_targets(kind, {key: {pattern: 4}}, plan, units)
    for kind, given, said in (
        ("LORA", {"rank_pattern": {"q_porj": 4}}, "method.peft.rank_pattern names q_porj, and no layer"),
        ("LORA", {"rank_pattern": {"proj": 4}}, "names proj"),
        ("LORA", {"alpha_pattern": {"k_proj": 4}, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}, "names k_proj"),
        ("C3A", {"block_size_pattern": {"model.layers.1.self_attn.k_proj": 4}}, "names model.layers.1.self_attn.k_proj"),
        ("OSF", {"rank_pattern": {"k_porj": 4}}, "names k_porj"),
    ):
        with pytest.raises(ModelError, match=said):
            choose_targets(kind, given, plan, units)
    with pytest.raises(InputError, match="is no pattern of layers"):
        choose_targets("LORA", {"rank_pattern": {"(q_proj": 4}}, plan, units)


def test_the_layers_of_which_ia3_scales_the_inputs_may_be_named_alone():
    config = build_config("IA3", {"feedforward_modules": ["up_proj"]}, ["a.up_proj", "a.down_proj"])
    assert config.feedforward_modules == {"a.up_proj"}
    config = build_config("IA3", {"feedforward_modules": "mlp.up_proj"}, ["0.mlp.up_proj", "0.mlp.down_proj"])
    assert config.feedforward_modules == {"0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("given", "said", "fix"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            "method.peft.target_modules names v_porj, and no layer",
            "did you mean v_proj?",
        ),
        ({"target_modules": ["layers.0.mlp.q_proj", "q_proj"]}, "names layers.0.mlp.q_proj", "did you mean q_proj?"),
        ({"target_modules": ["q_proj", "lm_head"]}, "names lm_head", "drop it"),
        ({"exclude_modules": ["donw_proj"]}, "method.peft.exclude_modules names donw_proj", "did you mean down_proj?"),
        ({"feedforward_modules": ["up_porj"]}, "method.peft.feedforward_modules names up_porj", "did you mean up_proj?"),
        ({"feedforward_modules": "lm_head"}, "method.peft.feedforward_modules names lm_head", "drop it"),
    ],
)
def test_every_name_is_that_of_a_layer_that_takes_adapters(start: Path, given: dict, said: str, fix: str):
    described = describe_model(str(start))
    units = assign_roles(described.model_type, described.parameters)
    plan = make_plan(units, FreezeRule(trainable_fraction=0.25), 0)
    for name in ("q_proj", "layers.1.mlp.up_proj"):  # whether or not this round's plan trains it
        choose_targets("LORA", {"target_modules": [name, "k_proj", "v_proj", "o_proj", "down_proj"]}, plan, units)
    with pytest.raises(ModelError, match=said) as caught:
        choose_targets("IA3" if "feedforward_modules" in given else "LORA", given, plan, units)
    assert caught.value.fix == fix


def test_rows_in_a_tied_head_are_not_trained_by_a_kernel_that_goes_round_it():
    tokens = "method.peft={type: TRAINABLE_TOKENS, token_indices: [5]}"
    assert load_recipe(None, [tokens, "train.loss_kernel=plain"]).method.needs_logits
    with pytest.raises(RecipeError, match="train.loss_kernel chunked goes round: set plain"):
        load_recipe(None, [tokens, "train.loss_kernel=chunked"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{type: LORRA}", "did you mean LORA"),
        ("{type: prompt-tuning}", "PROMPT_TUNING adds tokens or states, which no weights can hold.*: take LORA"),
        ("{type: LILY}", "does not merge in PEFT: take LORA"),
        ("{type: QLORA}", "QLORA holds the weights in 4 bits.*: take LORA"),
        ("{}", "method.peft.type is missing"),
        ("{type: LORA}', 'method.ia3={}", "each trains something of its own"),
    ],
)
def test_types_that_are_not_carried_are_refused(given: str, said: str):
    overrides = [f"method.peft={given}"] if "ia3" not in given else ["method.peft={type: LORA}", "method.ia3={}"]
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, overrides)
