"""Every field that is passed on to the trainer arrives there, and is seen to act."""

import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from training.preferences import make_pairs
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.recipe.sections import DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.recipe.trainer_keys import DPO_ONLY, SFT_ONLY, SHARED, Passed
from hftcli.runs.spec import RoundSpec
from hftcli.training.reading import check_router
from hftcli.training.references import SharedReference
from hftcli.training.trainers import PairTrainer, TaskTrainer, build_arguments

START = PACKAGE / "tinyworld" / "model"
ROWS = [[(7 * row + 3 * place) % 200 + 5 for place in range(4 + row)] for row in range(8)]

Trainer = TaskTrainer | PairTrainer


def make_spec(objective: str = "sft", dpo: dict | None = None, reference: str | None = None, **train: Any) -> RoundSpec:
    plain = {"bf16": False, "global_batch_size": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_steps": 4}
    return RoundSpec(
        objective=objective, index=0, model=ModelSection(path=str(START)), data=DataSection(path="d", max_length=32),
        freeze=FreezeRule(), train=TrainSection(**plain | {"warmup_steps": 0} | train), launch=LaunchSection(num_processes=1),
        dpo=DpoSection(**dpo or {}) if objective == "dpo" else None,
        reference=(reference or "shared") if objective == "dpo" else None,
    )  # fmt: skip


def make_trainer(folder: Path, spec: RoundSpec, model: PreTrainedModel | None = None) -> Trainer:
    described = describe_model(str(START))
    plan = make_plan(assign_roles(described.model_type, described.parameters), spec.freeze, 0)

    def load() -> PreTrainedModel:
        return load_model(spec.model, START, plan, mixed=False, sharded=False)

    args, tokenizer = build_arguments(spec, folder), AutoTokenizer.from_pretrained(START)
    if spec.objective == "sft":
        rows = Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ROWS])
        return TaskTrainer(model or load(), args, rows, tokenizer, [], [], "plain")
    is_full = spec.reference == "full"
    trainer = PairTrainer(
        load(), args, make_pairs(), tokenizer, [], [], "plain", None if is_full else SharedReference(),
        load().requires_grad_(False) if is_full else None,
    )  # fmt: skip
    if not is_full:
        trainer.reference.remember(trainer.model)
        trainer.reference.prepare(trainer)
    return trainer


@pytest.fixture
def train(tmp_path) -> Callable[..., Trainer]:
    def run(**settings: Any) -> Trainer:
        trainer = make_trainer(tmp_path, make_spec(**settings))
        trainer.train()
        return trainer

    return run


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def rates(trainer: Trainer) -> list[float]:
    return [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]


def read_group(trainer: Trainer) -> dict[str, Any]:
    return trainer.optimizer.param_groups[0]


def differs(plain: Trainer, changed: Trainer) -> bool:
    return losses(plain) != pytest.approx(losses(changed), abs=1e-6)


def list_lengths(trainer: Trainer) -> list[int]:
    return [int(row.sum()) for batch in trainer.get_train_dataloader() for row in batch["attention_mask"]]


def loads_as_one(key: str, value: Any) -> Callable[[Trainer, Trainer], bool]:
    """The setting is the loader's, and changes no row."""

    def check(plain: Trainer, changed: Trainer) -> bool:
        return getattr(changed.get_train_dataloader(), key) == value and losses(changed) == losses(plain)

    return check


def steps_with(key: str, value: Any) -> Callable[[Trainer, Trainer], bool]:
    """The setting is the optimizer's, and leads elsewhere."""
    return lambda plain, changed: read_group(changed)[key] == value and differs(plain, changed)


# Settings, and what is seen of them in a trainer beside one without.
SFT: dict[str, tuple[dict[str, Any], Callable[[Trainer, Trainer], bool]]] = {
    "optim": ({"optim": "adafactor"}, lambda plain, changed: type(changed.optimizer.optimizer).__name__ == "Adafactor"),
    "optim_args": (
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        lambda plain, changed: read_group(changed)["momentum"] == 0.9,
    ),
    "adam_beta1": ({"adam_beta1": 0.5}, steps_with("betas", (0.5, 0.999))),
    "adam_beta2": ({"adam_beta2": 0.5}, steps_with("betas", (0.9, 0.5))),
    "adam_epsilon": ({"adam_epsilon": 0.1}, steps_with("eps", 0.1)),
    "max_grad_norm": ({"max_grad_norm": 1e-9}, differs),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.2}, differs),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
        lambda plain, changed: min(rates(changed)) > 5e-4 > min(rates(plain)),
    ),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 50.0}, differs),
    "loss_type": ({"loss_type": "dft"}, differs),
    "logging_first_step": (
        {"logging_first_step": True, "logging_steps": 3},
        lambda plain, changed: [row["step"] for row in changed.state.log_history if "loss" in row] == [1, 3],
    ),
    "log_level": ({"log_level": "critical"}, lambda plain, changed: transformers.logging.get_verbosity() == 50),
    "data_seed": ({"data_seed": 7}, lambda plain, changed: list_lengths(plain) != list_lengths(changed)),
    "train_sampling_strategy": (
        {"train_sampling_strategy": "sequential"},
        lambda plain, changed: list_lengths(changed) == list(map(len, ROWS)) != list_lengths(plain),
    ),
    "dataloader_num_workers": ({"dataloader_num_workers": 1}, loads_as_one("num_workers", 1)),
    "dataloader_persistent_workers": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        loads_as_one("persistent_workers", True),
    ),
    "dataloader_prefetch_factor": (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 5},
        loads_as_one("prefetch_factor", 5),
    ),
    "dataloader_in_order": (
        {"dataloader_num_workers": 1, "dataloader_in_order": False},
        loads_as_one("in_order", False),
    ),
    "pad_to_multiple_of": (
        {"pad_to_multiple_of": 7},
        lambda plain, changed: {batch["input_ids"].shape[1] % 7 for batch in changed.get_train_dataloader()} == {0},
    ),
    "activation_checkpointing_kwargs": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        lambda plain, changed: changed.args.activation_checkpointing_kwargs["every_n_layers"] == 2,
    ),
    "full_determinism": ({"full_determinism": True}, lambda plain, changed: torch.are_deterministic_algorithms_enabled()),
}  # fmt: skip
# Of DPO's losses, the first is that of equal models whatever the setting, the others tell.
DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ld_alpha": ({}, {"ld_alpha": 0.1}),
    "f_divergence_type": ({}, {"f_divergence_type": "forward_kl"}),
    "f_alpha_divergence_coef": (
        {"f_divergence_type": "alpha_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.1},
    ),
    "use_weighting": ({}, {"use_weighting": True}),
    "discopop_tau": ({"loss_type": "discopop"}, {"loss_type": "discopop", "discopop_tau": 5.0}),
    "sync_ref_model": ({}, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "ref_model_mixup_alpha": (
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.1},
    ),
    "ref_model_sync_steps": (
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
    ),
}  # fmt: skip
# Tests of their own below; and what acts on other machines only, or in services, of which no more is seen than that it arrives.
APART = {"activation_offloading", "report_to", "router_aux_loss_coef", "disable_dropout", "dataloader_multiprocessing_context"}
ARRIVING = {
    "tf32": False, "torch_empty_cache_steps": 2, "log_level_replica": "error", "run_name": "r", "project": "p",
    "trackio_space_id": "a/b", "trackio_bucket_id": "a/b", "trackio_static_space_id": "a/b", "ddp_timeout": 7,
}  # fmt: skip


def list_passed(fates: dict[str, object]) -> set[str]:
    return {key for key, fate in fates.items() if isinstance(fate, Passed)}


def test_every_field_that_is_passed_on_is_seen_here():
    assert SFT.keys() | APART | ARRIVING.keys() == list_passed(SHARED) | list_passed(SFT_ONLY) | {"disable_dropout"}
    assert DPO.keys() | {"disable_dropout"} == list_passed(DPO_ONLY) - list_passed(SFT_ONLY)


@pytest.fixture(autouse=True)
def _leave_as_it_was():
    level, variables = transformers.logging.get_verbosity(), dict(os.environ)
    yield
    transformers.logging.set_verbosity(level)
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("key", SFT)
def test_it_acts(train, key):
    settings, is_seen = SFT[key]
    assert is_seen(train(), train(**settings))


@pytest.mark.parametrize("key", DPO)
def test_it_acts_on_pairs(train, key):
    plain, changed = DPO[key]
    reference = "full" if "sync_ref_model" in {**plain, **changed} else "shared"
    found = [losses(train(objective="dpo", reference=reference, dpo=dpo)) for dpo in (plain, changed)]
    assert found[0] != pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("key", ARRIVING)
def test_it_arrives(tmp_path, key):
    args = build_arguments(make_spec(**{key: ARRIVING[key]}), tmp_path)
    assert vars(args)[key] == ARRIVING[key]


def test_workers_are_started_as_it_is_said(tmp_path):
    spec = make_spec(dataloader_num_workers=1, dataloader_multiprocessing_context="forkserver")
    loader = make_trainer(tmp_path, spec).get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="activations go from a GPU to the machine's memory")
def test_activations_are_offloaded(train):
    assert "Offload" in type(train(activation_offloading=True).maybe_activation_offload_context).__name__


def test_the_routers_loss_is_weighed(tmp_path):
    config = MixtralConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    found = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, make_spec(max_steps=1, router_aux_loss_coef=weight), MixtralForCausalLM(config))
        trainer.train()
        found.append((losses(trainer)[0], trainer.state.log_history[0].get("aux_loss", 0.0)))
    assert found[0][1] == 0.0
    assert found[1][0] - found[0][0] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.parametrize(
    ("own", "given", "is_refused"), [(0.001, {}, True), (0.0, {}, False), (0.0, {"router_aux_loss_coef": 1.0}, True),
                                     (0.001, {"router_aux_loss_coef": 0.0}, False)],
)  # fmt: skip
def test_the_routers_loss_is_not_lost_beside_smoothed_labels(tmp_path, own, given, is_refused):
    MixtralConfig(router_aux_loss_coef=own).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="leaves the loss of the model's router out") if is_refused else nullcontext():
        check_router(make_spec(label_smoothing_factor=0.1, **given), tmp_path)


def test_dropout_is_off_in_pairs_unless_it_is_asked_for(tmp_path):
    for is_off in (True, False):
        trainer = make_trainer(tmp_path, make_spec("dpo", {"disable_dropout": is_off}))
        assert trainer.args.disable_dropout is is_off


def test_tensorboard_keeps_what_it_is_told(train, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    trainer = train(report_to="tensorboard")
    (folder,) = {path.parent for path in tmp_path.parent.rglob("events.out.*")}
    assert folder == Path(trainer.args.output_dir).parent / "tensorboard"
    assert len(list(itertools.chain(folder.iterdir()))) == 1
