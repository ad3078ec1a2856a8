"""Every field of the trainers' arguments has one decider: hft, the recipe, or nobody, who is told so."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig

from hftcli.errors import RecipeError
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.section import list_kinds
from hftcli.recipe.sections import LossType, Schedule
from hftcli.recipe.trainer_keys import (
    DPO_ONLY,
    OPTIMIZER_ARGUMENTS,
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REFUSED_TRACKERS,
    SFT_ONLY,
    SHARED,
    TRACKERS,
    Ours,
    Passed,
    Refused,
)

BASE = ("model.path=m", "data.path=d.jsonl")
TABLES = {"train": {**SHARED, **SFT_ONLY}, "dpo": DPO_ONLY}
KEYS = [(section, key, fate) for section, fates in TABLES.items() for key, fate in fates.items()]


def list_fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def pick(kind: type) -> list[tuple[str, str, Any]]:
    return [pytest.param(*entry, id=f"{entry[0]}.{entry[1]}") for entry in KEYS if isinstance(entry[2], kind)]


def load(section: str, key: str, value: str, *more: str) -> Any:
    recipe = load_recipe(None, [*BASE, f"{section}.{key}={value}", *more], "dpo" if section == "dpo" else "sft")
    return getattr(recipe, section).model_extra[key]


def test_the_tables_are_the_fields_of_the_installed_versions():
    shared = list_fields(TrainingArguments)
    assert SHARED.keys() == shared, "transformers has other fields: say in recipe/trainer_keys.py what hft does with them"
    assert SFT_ONLY.keys() == list_fields(SFTConfig) - shared, "TRL's SFTConfig has other fields"
    assert DPO_ONLY.keys() == list_fields(DPOConfig) - shared, "TRL's DPOConfig has other fields"


def test_the_names_of_optimizers_schedules_and_losses_are_the_installed_ones():
    assert OPTIMIZERS.keys() | REFUSED_OPTIMIZERS.keys() == {name.value for name in OptimizerNames}
    assert OPTIMIZERS.keys() == OPTIMIZER_ARGUMENTS.keys()
    assert {*typing.get_args(Schedule), "reduce_lr_on_plateau", "greedy"} == {name.value for name in SchedulerType}
    losses = next(field for field in dataclasses.fields(DPOConfig) if field.name == "loss_type").metadata["help"]
    assert all(f"'{name}'" in losses for name in typing.get_args(LossType))


def test_the_trackers_are_the_installed_ones():
    code = "from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as known; print(*sorted(known))"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {*TRACKERS, *REFUSED_TRACKERS} - {"all"} == set(known)


@pytest.mark.parametrize(("section", "key", "fate"), pick(Refused))
def test_what_is_refused_says_why(section, key, fate):
    with pytest.raises(RecipeError) as caught:
        load(section, key, "1")
    message = caught.value.message
    if "secret" in fate.reason:
        assert f"{section}.{key} holds a secret" in message
    assert f"--set {section}.{key}=" in message
    assert f"{section}.{key} is not taken: {fate.reason}" in message
    assert fate.instead in message


@pytest.mark.parametrize(("section", "key", "fate"), pick(Ours))
def test_what_hft_sets_names_the_key_that_it_comes_from(section, key, fate):
    if fate.key == f"{section}.{key}":
        assert load_recipe(None, BASE, "dpo" if section == "dpo" else "sft").model_dump()[section].keys() >= {key}
        return
    with pytest.raises(RecipeError, match=r"is not a key of hft: use") as caught:
        load(section, key, "1")
    assert f"use {fate.key}" in caught.value.message


# A value of every field that is passed on, as it is written, as it must arrive, and what it takes to have an effect.
PASSED: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "train.lr_scheduler_kwargs": ("{min_lr: 1e-7}", {"min_lr": 1e-7}, ("train.lr_scheduler_type=cosine_with_min_lr",)),
    "train.optim": ("adafactor", "adafactor", ()),
    "train.optim_args": ("momentum=0.9", "momentum=0.9", ("train.optim=sgd",)),
    "train.adam_beta1": (".8", 0.8, ()),
    "train.adam_beta2": ("9e-1", 0.9, ()),
    "train.adam_epsilon": ("1e-6", 1e-6, ()),
    "train.max_grad_norm": ("1", 1.0, ()),
    "train.label_smoothing_factor": ("1E-1", 0.1, ()),
    "train.tf32": ("false", False, ()),
    "train.activation_checkpointing_kwargs": (
        "{every_n_layers: 2}", {"every_n_layers": 2}, ("train.activation_checkpointing=true",),
    ),
    "train.neftune_noise_alpha": ("5", 5.0, ()),
    "train.torch_empty_cache_steps": ("3", 3, ()),
    "train.logging_first_step": ("yes", True, ()),
    "train.log_level": ("error", "error", ()),
    "train.log_level_replica": ("error", "error", ()),
    "train.report_to": ("[tensorboard, wandb]", ["tensorboard", "wandb"], ()),
    "train.run_name": ("no", "no", ("train.report_to=wandb",)),
    "train.project": ("p", "p", ("train.report_to=trackio",)),
    "train.trackio_space_id": ("a/b", "a/b", ("train.report_to=trackio",)),
    "train.trackio_bucket_id": ("a/b", "a/b", ("train.report_to=trackio",)),
    "train.trackio_static_space_id": ("a/b", "a/b", ("train.report_to=trackio",)),
    "train.full_determinism": ("true", True, ()),
    "train.data_seed": ("010", 10, ()),
    "train.dataloader_num_workers": ("2", 2, ()),
    "train.dataloader_persistent_workers": ("true", True, ("train.dataloader_num_workers=1",)),
    "train.dataloader_prefetch_factor": ("4", 4, ("train.dataloader_num_workers=1",)),
    "train.dataloader_multiprocessing_context": ("spawn", "spawn", ("train.dataloader_num_workers=1",)),
    "train.dataloader_in_order": ("false", False, ("train.dataloader_num_workers=1",)),
    "train.train_sampling_strategy": ("sequential", "sequential", ()),
    "train.ddp_timeout": ("60", 60, ()),
    "train.router_aux_loss_coef": ("1e-3", 1e-3, ()),
    "train.pad_to_multiple_of": ("8", 8, ()),
    "train.loss_type": ("dft", "dft", ()),
    "train.activation_offloading": ("true", True, ()),
    "dpo.router_aux_loss_coef": ("1e-3", 1e-3, ()),
    "dpo.pad_to_multiple_of": ("8", 8, ()),
    "dpo.activation_offloading": ("true", True, ()),
    "dpo.disable_dropout": ("false", False, ()),
    "dpo.ld_alpha": ("5e-1", 0.5, ()),
    "dpo.f_divergence_type": ("forward_kl", "forward_kl", ()),
    "dpo.f_alpha_divergence_coef": ("5e-1", 0.5, ("dpo.f_divergence_type=alpha_divergence",)),
    "dpo.use_weighting": ("true", True, ()),
    "dpo.discopop_tau": ("1e-1", 0.1, ("dpo.loss_type=discopop",)),
    "dpo.sync_ref_model": ("true", True, ("reference=full", "checkpoint.save_every_minutes=null")),
    "dpo.ref_model_mixup_alpha": (
        "5e-1", 0.5, ("dpo.sync_ref_model=true", "reference=full", "checkpoint.save_every_minutes=null"),
    ),
    "dpo.ref_model_sync_steps": (
        "5", 5, ("dpo.sync_ref_model=true", "reference=full", "checkpoint.save_every_minutes=null"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("section", "key", "fate"), pick(Passed))
def test_what_is_passed_on_has_the_type_that_the_trainer_takes(section, key, fate, tmp_path: Path):
    text, expected, needed = PASSED[f"{section}.{key}"]
    found = load(section, key, text, *needed)
    assert (found, type(found)) == (expected, type(expected))
    hint = typing.get_type_hints(DPOConfig if section == "dpo" else SFTConfig)[key]
    kinds = {typing.get_origin(kind) or kind for kind in list_kinds(hint)} - {typing.Any} | {dict, list}
    assert isinstance(found, tuple(kinds)), f"{section}.{key} is {hint} in the installed version"
    recipe = load_recipe(None, [*BASE, f"{section}.{key}={text}", *needed], "dpo" if section == "dpo" else "sft")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(("section", "key", "fate"), pick(Passed))
def test_what_is_of_another_type_is_a_fault_with_its_place(section, key, fate):
    with pytest.raises(RecipeError) as caught:
        load(section, key, "{a: [1]}" if "kwargs" not in key else "7", *PASSED[f"{section}.{key}"][2])
    assert f"--set {section}.{key}=" in caught.value.message
    assert f": {section}.{key}: input should be" in caught.value.message


@pytest.mark.parametrize("key", ["train.learning_rate", "train.max_grad_norm", "data.max_length", "dpo.beta", "dpo.ld_alpha"])
def test_true_is_no_number(key):
    with pytest.raises(RecipeError, match=f"--set {key}=true: {key}: input should be a number, got True"):
        load_recipe(None, [*BASE, f"{key}=true"], "dpo")


def test_nothing_is_offered_that_is_refused():
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [*BASE, "train.push_to_hubs=1", "train.adam_beta_1=0.5"])
    assert "unknown key 'adam_beta_1' under train (did you mean 'adam_beta1'?)" in caught.value.message
    assert "'push_to_hub'" not in caught.value.message


def test_keys_of_the_other_section_and_of_the_other_objective():
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            None, [*BASE, "train.beta=0.2", "dpo.adam_beta2=0.9", "train.loss_type=dft", "train.eos_token=<|im_end|>"], "dpo"
        )
    assert "train.beta is not a key of hft: use dpo.beta" in caught.value.message
    assert "dpo.adam_beta2 is not a key of hft: use train.adam_beta2" in caught.value.message
    assert "train.loss_type is not a key of hft: use dpo.loss_type" in caught.value.message
    assert "train.eos_token is not taken" in caught.value.message


@pytest.mark.parametrize(
    ("overrides", "name", "secret"),
    [
        (["train.hub_token=hf_abcdefghijklmnopqrst"], "train.hub_token", "hf_abcdefghijklmnopqrst"),
        (["train.wandb_api_key=0123456789"], "train.wandb_api_key", "0123456789"),
        (["train.report_to=wandb", "train.run_name=hf_abcdefghijklmnopqrst"], "train.run_name", "hf_abcdefghijklmnopqrst"),
        (["launch.slurm.options=['--export=HF_TOKEN=abc']"], "launch.slurm.options", "=abc"),
    ],
)
def test_secrets_are_refused_and_not_even_shown(overrides, name, secret):
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [*BASE, *overrides])
    assert f"--set {name}=...: {name} holds a secret" in caught.value.message
    assert secret not in caught.value.message
