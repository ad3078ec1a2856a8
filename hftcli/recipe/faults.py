"""What is wrong with a recipe, a line for each fault: where it stands, what was got, and the key that was probably meant."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from hftcli.recipe.methods import SEQUENCE_METHODS
from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.section import open_section
from hftcli.recipe.sections import DpoSection, TrainSection
from hftcli.recipe.source import RecipeFile

# Names that are gone from transformers or TRL, or that hft derives, with what to use instead.
REPLACED_KEYS = {
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_length",
    "warmup_ratio": "train.warmup_steps (below 1 it is a share of all steps)",
    "gradient_accumulation_steps": "train.global_batch_size (accumulation is derived from it)",
    "gradient_checkpointing": "train.activation_checkpointing",
    "gradient_checkpointing_kwargs": "train.activation_checkpointing_kwargs",
    "output_dir": "output",
    "overwrite_output_dir": "another output",
    "deepspeed": "launch.zero_stage",
    "model_init_kwargs": "the keys of model",
    "fp16": "train.bf16",
    "precompute_ref_log_probs": "reference: precompute",
    "save_steps": "checkpoint.save_steps",
    "save_total_limit": "checkpoint.keep",
}
# Fields of the trainers that would have no effect, because hft does that work or sets them itself.
OWN_KEYS = {
    "dataset_kwargs", "dataset_num_proc", "ddp_backend", "disable_tqdm", "eval_packing", "eval_steps", "eval_strategy",
    "load_best_model_at_end", "logging_nan_inf_filter", "pad_token", "padding_free", "precompute_ref_batch_size", "push_to_hub",
    "resume_from_checkpoint", "save_strategy", "truncation_mode", "trust_remote_code", "use_cpu",
}  # fmt: skip
# Keys of the one objective that would have no effect under the other.
FOREIGN_KEYS = {
    "sft": ("dpo", "reference", "data.drop_identical", "data.root", "continual"),
    "dpo": (
        "train.packing",
        "train.assistant_only_loss",
        "train.completion_only_loss",
        "data.root",
        "continual",
    ),
    "continual": (
        "dpo",
        "reference",
        "data.path",
        "data.name",
        "data.split",
        "data.drop_identical",
        "eval.held_out",
        "train.packing",
        "train.assistant_only_loss",
        "train.completion_only_loss",
    ),
}


def describe_fault(fault: dict, source: RecipeFile) -> str:
    keys = tuple(str(part) for part in fault["loc"])
    place, name = source.place(keys), ".".join(keys)
    if fault["type"] == "extra_forbidden":
        return _describe_unknown_key(place, keys, _section_fields(keys[:-1]))
    if fault["type"] == "missing":
        return f"{place}: {name} is missing"
    return f"{place}: {name}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _describe_unknown_key(place: str, keys: tuple, known: Iterable[str]) -> str:
    guess = difflib.get_close_matches(keys[-1], list(known), n=1)
    section = f" under {'.'.join(keys[:-1])}" if len(keys) > 1 else ""
    hint = f" (did you mean '{guess[0]}'?)" if guess else f" (known: {', '.join(known) or 'none'})"
    return f"{place}: unknown key '{keys[-1]}'{section}{hint}"


def _section_fields(keys: tuple) -> list[str]:
    model: Any = Recipe
    for key in keys:
        model = open_section(model.model_fields[key].annotation)
    return list(model.model_fields)


def check_foreign_keys(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterable[str]:
    """Settings of the other objective."""
    for key in FOREIGN_KEYS[objective]:
        section: Any = recipe
        *parents, name = key.split(".")
        for parent in parents:
            section = getattr(section, parent)
        if getattr(section, name) != type(section).model_fields[name].default:
            yield f"{source.place(tuple(key.split('.')))}: {key} would have no effect under `hft {objective}`: drop it"


def check_trainer_keys(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterable[str]:
    """Keys that are not hft's own must be fields of the trainer's arguments, each in its section."""
    known = _find_trainer_keys(objective)
    for section, fields in known.items():
        given = getattr(recipe, section)
        for key in given.model_extra if given else ():
            place, name = source.place((section, key)), f"{section}.{key}"
            elsewhere = [other for other in known if key in known[other]]
            if key in REPLACED_KEYS:
                yield f"{place}: {name} is not a key of hft: use {REPLACED_KEYS[key]}"
            elif key in OWN_KEYS:
                yield f"{place}: {name} would have no effect: hft sets it itself or does that work"
            elif not elsewhere:
                yield _describe_unknown_key(place, (section, key), fields)
            elif key not in fields:
                yield f"{place}: {name} is not a key of hft: use {elsewhere[0]}.{key}"
    if recipe.dpo and recipe.dpo.extra.get("sync_ref_model") and recipe.reference != "full":
        yield f"{source.place(('dpo', 'sync_ref_model'))}: dpo.sync_ref_model moves a second model: set reference: full"
    if recipe.dpo and recipe.dpo.extra.get("sync_ref_model") and recipe.checkpoint.is_on:
        yield (
            f"{source.place(('dpo', 'sync_ref_model'))}: dpo.sync_ref_model moves a second model, which step checkpoints do "
            "not hold: set checkpoint.save_every_minutes: null and no checkpoint.save_steps"
        )


def check_methods(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterable[str]:
    """Methods that would have no effect without earlier tasks."""
    for name in recipe.method.names:
        if name in SEQUENCE_METHODS and objective != "continual":
            yield (
                f"{source.place(('method', name))}: method.{name} defends earlier tasks, and `hft {objective}` has none: "
                "use `hft continual`, or drop it"
            )


def check_fit(recipe: Recipe, source: RecipeFile) -> Iterable[str]:
    """Settings of the fit that would have no effect."""
    if recipe.train.fit is None and recipe.train.memory_bytes is not None:
        yield f"{source.place(('train', 'memory_bytes'))}: train.memory_bytes would have no effect: set train.fit: auto"
    if recipe.train.fit == "auto" and recipe.train.activation_checkpointing:
        place = source.place(("train", "activation_checkpointing"))
        yield f"{place}: train.activation_checkpointing is what train.fit chooses: drop one of the two"
    for name in set(recipe.method.names) - {"replay"}:
        if recipe.train.fit == "auto":
            yield f"{source.place(('train', 'fit'))}: train.fit does not count what method.{name} holds: drop one of the two"


def _find_trainer_keys(objective: Objective) -> dict[str, list[str]]:
    """By section, hft's keys and then the trainer's."""
    train = [*TrainSection.model_fields, *read_fields(*SHARED_ARGUMENTS)]
    if objective != "dpo":
        return {"train": [*train, *read_fields(SFT_ARGUMENTS)]}
    return {"train": train, "dpo": [*DpoSection.model_fields, *(read_fields(DPO_ARGUMENTS) - set(train))]}


SHARED_ARGUMENTS = ("transformers/training_args.py", "trl/trainer/base_config.py")
SFT_ARGUMENTS, DPO_ARGUMENTS = "trl/trainer/sft_config.py", "trl/trainer/dpo_config.py"


@cache
def read_fields(*files: str) -> frozenset[str]:
    """The fields of a trainer's arguments, read from the installed sources: importing them would import torch."""
    fields = set()
    for file in files:
        package, _, path = file.partition("/")
        source = Path(importlib.util.find_spec(package).origin).parent / path
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return frozenset(fields) - REPLACED_KEYS.keys()
