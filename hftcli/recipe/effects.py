"""Settings of the trainers that act only beside others, and losses of preferences that do not go together.

A setting that would have no effect is refused: its user would take the result for what it is not.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.sections import QUICK_START, LossType, Schedule
from hftcli.recipe.source import RecipeFile
from hftcli.recipe.trainer_keys import ADAMS, LIONS, OPTIMIZER_ARGUMENTS, OPTIMIZERS

SWITCHES = ("nesterov", "centered", "bf16_stochastic_round")  # of `train.optim_args`; the others are numbers
# What a trainer's field is where it is not given; of the others no condition asks.
DEFAULTS = {
    "train.optim": "adamw_torch_fused", "train.loss_type": "nll", "train.report_to": "none",
    "train.dataloader_num_workers": 0, "train.train_sampling_strategy": "random", "dpo.f_divergence_type": "reverse_kl",
    "dpo.sync_ref_model": False, "dpo.use_weighting": False, "dpo.disable_dropout": True,
}  # fmt: skip
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
# The losses on the difference of two rewards: the others have no other divergence (TRL's DPOTrainer).
DIVERGING = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SORTING = ("aot", "aot_unpaired")
UNREWARDED = "sft"  # the loss that takes no rewards
# Dropouts of PEFT's that are no `torch.nn.Dropout`, which alone TRL puts out; with DELORA, module_dropout is one.
OTHER_DROPOUTS = ("boft_dropout", "rank_dropout", "module_dropout")


@dataclass(frozen=True)
class Condition:
    """A setting that acts beside certain values of another only.

    Attributes:
        values: of the other; where it is a list, one of them must be among it.
    """

    key: str
    other: str
    values: tuple[Any, ...]


CONDITIONS = (
    Condition(
        "train.warmup_steps", "train.lr_scheduler_type", tuple(name for name in get_args(Schedule) if name != "constant")
    ),
    Condition(
        "train.lr_scheduler_kwargs",
        "train.lr_scheduler_type",
        tuple(name for name in get_args(Schedule) if name not in ("linear", "constant", "constant_with_warmup")),
    ),
    Condition("train.optim_args", "train.optim", tuple(name for name in OPTIMIZERS if OPTIMIZER_ARGUMENTS[name])),
    Condition("train.adam_beta1", "train.optim", (*ADAMS, *LIONS)),
    Condition("train.adam_beta2", "train.optim", (*ADAMS, *LIONS)),
    Condition("train.adam_epsilon", "train.optim", tuple(ADAMS)),
    Condition("train.label_smoothing_factor", "train.loss_type", ("nll",)),
    Condition("train.run_name", "train.report_to", ("wandb", "mlflow", "comet_ml", "trackio", "swanlab")),
    Condition("train.project", "train.report_to", ("wandb", "mlflow", "trackio")),
    *(
        Condition(f"train.{key}", "train.report_to", ("trackio",))
        for key in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    ),
    Condition("train.data_seed", "train.train_sampling_strategy", ("random", "group_by_length")),
    *(
        Condition(f"dpo.{key}", "dpo.loss_type", tuple(name for name in get_args(LossType) if name != UNREWARDED))
        for key in ("beta", "f_divergence_type", "ld_alpha")
    ),
    Condition("dpo.label_smoothing", "dpo.loss_type", SMOOTHED),
    Condition("dpo.f_alpha_divergence_coef", "dpo.f_divergence_type", ("alpha_divergence",)),
    Condition("dpo.discopop_tau", "dpo.loss_type", ("discopop",)),
    Condition("dpo.ref_model_mixup_alpha", "dpo.sync_ref_model", (True,)),
    Condition("dpo.ref_model_sync_steps", "dpo.sync_ref_model", (True,)),
)
ROOTED = ("standard", "trace")  # the benchmarks whose rows lie under `data.root`
# Settings of the processes that make batches beside the training.
OF_WORKERS = tuple(
    f"train.dataloader_{name}" for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")
)


def check_effects(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Settings of the trainers that would have no effect beside others."""
    for condition in CONDITIONS:
        if not is_given(recipe, condition.key):
            continue
        found = find_value(recipe, condition.other)
        if not set(condition.values) & set(found if isinstance(found, tuple | list) else [found]):
            allowed = " or ".join("true" if value is True else str(value) for value in condition.values)
            yield (
                f"{_place(condition.key, source)}: {condition.key} would have no effect beside {condition.other} "
                f"{_show(found)}: drop it, or set {condition.other} to {allowed}"
            )
    for key in OF_WORKERS:
        if is_given(recipe, key) and not find_value(recipe, "train.dataloader_num_workers"):
            yield (
                f"{_place(key, source)}: {key} would have no effect without processes that make the batches: drop it, or set "
                "train.dataloader_num_workers to 1 or more"
            )
    if is_given(recipe, "data.seed") and len(recipe.data.sources) < 2:
        yield f"{_place('data.seed', source)}: data.seed would have no effect without several data.sources: drop it"
    if len(recipe.data.sources) == 1 and recipe.data.sources[0].weight is not None:
        place = source.place(("data", "sources", "0", "weight"))
        yield f"{place}: data.sources.0.weight would have no effect: it is a share beside other sources, so drop it"
    yield from _check_length(recipe, source)
    yield from _check_places(recipe, source)
    yield from _check_root(recipe, objective, source)
    yield from _check_optimizer_arguments(recipe, source)
    yield from _check_checkpointing(recipe, source)
    yield from _check_sections(recipe, source)
    yield from _check_decay(recipe, source)
    optimizer = find_value(recipe, "train.optim")
    if recipe.launch.offload == "optimizer" and optimizer not in ("adamw_torch", "adamw_torch_fused"):
        place = _place("launch.offload", source)
        yield f"{place}: launch.offload keeps AdamW's state on the host, and train.optim is {optimizer}: drop one of the two"
    if objective == "dpo":
        yield from _check_losses(recipe, source)
        yield from _check_dropout(recipe, source)
        if is_given(recipe, "train.label_smoothing_factor"):
            place = _place("train.label_smoothing_factor", source)
            yield f"{place}: train.label_smoothing_factor would have no effect under `hft dpo`: use dpo.label_smoothing"
        if find_value(recipe, "train.train_sampling_strategy") == "group_by_length":
            place = _place("train.train_sampling_strategy", source)
            yield f"{place}: train.train_sampling_strategy: group_by_length looks for the rows' input_ids, and pairs have none"


def is_given(recipe: Recipe, key: str) -> bool:
    """Whether a setting asks for something that would not be where nothing is said; a number of 0 asks for nothing."""
    section_name, _, name = key.partition(".")
    section: Any = getattr(recipe, section_name)
    if section is None:
        return False
    field = type(section).model_fields.get(name)
    value = getattr(section, name) if field else section.extra.get(name)
    is_zero = value == 0 and not isinstance(value, bool)
    return not is_zero and value != (field.default if field else None)


def find_value(recipe: Recipe, key: str) -> Any:
    """A setting's value, or what it is where it is not given."""
    section_name, _, name = key.partition(".")
    section: Any = getattr(recipe, section_name)
    values = section.model_dump() if section else {}
    return values[name] if name in values else DEFAULTS.get(key)


def _check_length(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Steps, epochs, and the epochs of a protocol: of two that are asked for, one would have no effect."""
    steps, epochs, max_steps = "train.max_steps", "train.num_train_epochs", recipe.train.max_steps
    protocol = recipe.continual.protocol if recipe.continual else None
    is_set = source.origins.get(tuple(epochs.split(".")), "").startswith("--set ")  # be it to the default
    asks_for_epochs = is_set or is_given(recipe, epochs)
    if asks_for_epochs and max_steps > 0:
        yield (
            f"{_place(epochs, source)}: {epochs} would have no effect beside {steps} {max_steps}: drop it, or set {steps} to -1"
        )
    for key, is_asked in ((epochs, asks_for_epochs), (steps, max_steps > 0)):
        if is_asked and protocol is not None:
            yield (
                f"{_place(key, source)}: {key} and the epochs of continual.protocol {protocol} are two lengths of a round: "
                "drop it, or set continual.protocol to null"
            )


def _check_places(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Revisions and splits of what has none."""
    model = recipe.model
    if model.revision is not None and (model.path == QUICK_START or Path(model.path).is_dir()):
        yield f"{_place('model.revision', source)}: model.revision would have no effect: {model.path} is a folder, so drop it"
    sections: dict[str, tuple[Any, ...]] = {
        "data": (recipe.data,),
        "data.sources": recipe.data.sources,
        "eval.held_out": (recipe.eval.held_out,),
    }
    for key, parts in sections.items():
        for part in parts:
            is_named = part.split != type(part).model_fields["split"].default
            if is_named and part.path and (kind := _name_whole(Path(os.path.expanduser(part.path)))):
                yield f"{_place(f'{key}.split', source)}: {key}.split would have no effect: {part.path} is {kind}, so drop it"


def _name_whole(path: Path) -> str | None:
    """What a place with no splits is; None where it may have some."""
    if path.is_file():
        return "a file"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # `datasets` writes of which split rows are that it saved, where it knows it.
    return "one dataset, saved without a split's name" if "_split" in state and state["_split"] is None else None


def _check_root(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """A folder of tasks where no task that is named lies in one."""
    tasks, rule, replay = list(recipe.eval.tasks), recipe.freeze, recipe.method.replay
    if objective == "continual":
        given = recipe.continual.tasks if recipe.continual else QUICK_START
        tasks += [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        tasks += [replay.extra] if replay and replay.extra else []
    rows = [part.path for part in (rule.keep, rule.importance) if part is not None and part.path is not None]
    # What is no file and does not ship with hft lies there; of rows, only a benchmark's tasks may.
    lie_there = [not name.endswith(".jsonl") and name.partition("/")[0] != QUICK_START for name in tasks]
    lie_there += [path.partition("/")[0] in ROOTED for path in rows]
    if recipe.data.root is not None and not any(lie_there):
        keys = ("eval.tasks", "freeze.keep", "freeze.importance")
        named = ", ".join(("continual.tasks", *keys) if objective == "continual" else keys)
        yield f"{_place('data.root', source)}: data.root would have no effect: no task of {named} lies there, so drop it"


def _check_optimizer_arguments(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Arguments that the optimizer does not take, which transformers passes over."""
    optimizer, key = find_value(recipe, "train.optim"), "train.optim_args"
    known = OPTIMIZER_ARGUMENTS[optimizer]
    text = (recipe.train.extra.get("optim_args") or "").replace(" ", "")
    for given in text.split(",") if known and text else ():
        name, equals, value = given.partition("=")
        if name == "weight_decay":
            yield f"{_place(key, source)}: {key}: {given!r} would have no effect: give it as train.weight_decay"
        elif not equals or name not in known:
            yield f"{_place(key, source)}: {key}: {given!r} is none of {optimizer}'s: give NAME=VALUE of {', '.join(known)}"
        elif not (value.lower() in ("true", "false") if name in SWITCHES else _is_finite(value)):
            kind = "true or false" if name in SWITCHES else "a finite number"
            yield f"{_place(key, source)}: {key}: {given!r}: give {kind}"


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_checkpointing(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    key, train = "train.activation_checkpointing_kwargs", recipe.train
    if is_given(recipe, key) and not train.activation_checkpointing and train.fit is None:
        yield (
            f"{_place(key, source)}: {key} would have no effect beside train.activation_checkpointing false: drop it, or set "
            "train.activation_checkpointing to true"
        )
    given = train.extra.get("activation_checkpointing_kwargs") or {}
    if train.fit == "auto" and "every_n_layers" in given:
        yield f"{_place(f'{key}.every_n_layers', source)}: {key}.every_n_layers is what train.fit chooses: drop one of the two"
    if given.get("use_reentrant"):
        yield (
            f"{_place(key, source)}: {key}.use_reentrant is true: reentrant checkpoints leave layers above frozen ones without "
            "a gradient: drop it"
        )


def _check_sections(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Settings of the sections that are hft's own, and the loss kernel."""
    if recipe.train.loss_kernel == "chunked" and find_value(recipe, "train.label_smoothing_factor"):
        yield (
            f"{_place('train.loss_kernel', source)}: train.loss_kernel chunked would have no effect beside "
            "train.label_smoothing_factor, which reads all logits of a token: set plain, or drop one of the two"
        )
    if is_given(recipe, "checkpoint.keep") and not recipe.checkpoint.is_on:
        yield (
            f"{_place('checkpoint.keep', source)}: checkpoint.keep would have no effect without step checkpoints: drop it, or "
            "set checkpoint.save_steps or checkpoint.save_every_minutes"
        )
    redraw, weighing = recipe.freeze.redraw, recipe.method.token_weights
    if redraw is not None and redraw.order != "random" and recipe.freeze.balance == "weights":
        yield (
            f"{_place('freeze.balance', source)}: freeze.balance weights would have no effect beside freeze.redraw.order "
            f"{redraw.order}, whose blocks are whole layers: drop it, or set freeze.redraw.order: random"
        )
    if recipe.freeze.splits_each and recipe.freeze.balance == "weights":
        yield (
            f"{_place('freeze.balance', source)}: freeze.balance weights would have no effect beside freeze.grain "
            f"{recipe.freeze.grain_name}, with which the share is one of each matrix: drop it, or set freeze.grain: matrices"
        )
    if weighing is not None and weighing.kind == "stm" and weighing.strength not in (0, 1):
        yield (
            f"{_place('method.token_weights.strength', source)}: method.token_weights.strength {weighing.strength:g} would "
            "have no effect beside kind stm, with which a token counts wholly or not: drop it, or set 0 for plain training"
        )


def _check_decay(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Weight decay where nothing trains but what transformers does not decay: biases, and whatever is called a norm."""
    rule, peft = recipe.freeze, recipe.method.peft
    beside = trained = ""
    if peft is not None and peft.type == "LN_TUNING":
        beside, trained = "method.peft.type LN_TUNING", "norms train"
    elif rule.grain == "biases" and rule.embeddings == rule.head == "freeze":
        beside, trained = "freeze.grain biases with frozen embeddings and head", "biases train"
    if beside and is_given(recipe, "train.weight_decay"):
        yield (
            f"{_place('train.weight_decay', source)}: train.weight_decay would have no effect beside {beside}: only {trained}, "
            "and transformers does not decay these: drop it"
        )


def _check_dropout(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Dropout of adapters, which TRL puts out before it trains on pairs."""
    lora, peft, found = recipe.method.lora, recipe.method.peft, []
    if lora is not None and lora.lora_dropout not in (0, type(lora).model_fields["lora_dropout"].default):
        found.append("method.lora.lora_dropout")
    if peft is not None:
        kept = OTHER_DROPOUTS[: 2 if peft.type == "DELORA" else 3]
        given = {key: value for key, value in peft.extra.items() if key.endswith("_dropout") and key not in kept}
        found += [f"method.peft.{key}" for key, value in given.items() if value]
    for key in found if find_value(recipe, "dpo.disable_dropout") else ():
        yield f"{_place(key, source)}: {key} would have no effect beside dpo.disable_dropout true: drop it, or set that false"


def _check_losses(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Losses of pairs that do not go together: TRL says so only when the model is there."""
    losses = find_value(recipe, "dpo.loss_type") or "sigmoid"
    losses = (losses,) if isinstance(losses, str) else losses
    weights, divergence = find_value(recipe, "dpo.loss_weights"), find_value(recipe, "dpo.f_divergence_type")
    if weights is not None and len(weights) != len(losses):
        yield (
            f"{_place('dpo.loss_weights', source)}: dpo.loss_weights has {len(weights)} values for {len(losses)} losses: give "
            "one for each"
        )
    if "exo_pair" in losses and not find_value(recipe, "dpo.label_smoothing"):
        yield (
            f"{_place('dpo.loss_type', source)}: dpo.loss_type exo_pair is not defined at dpo.label_smoothing 0: set it, as "
            "its paper does, to 1e-3"
        )
    if find_value(recipe, "dpo.use_weighting") and set(losses) & set(SORTING):
        yield f"{_place('dpo.use_weighting', source)}: dpo.use_weighting weighs pairs, and {' and '.join(SORTING)} part them"
    if divergence != "reverse_kl" and (others := set(losses) - set(DIVERGING)):
        yield (
            f"{_place('dpo.f_divergence_type', source)}: dpo.f_divergence_type {divergence} is not defined for the loss "
            f"{', '.join(sorted(others))}: take losses of {', '.join(name for name in DIVERGING if name != UNREWARDED)}"
        )
    if find_value(recipe, "dpo.sync_ref_model"):
        place = _place("dpo.sync_ref_model", source)
        if recipe.reference != "full":
            yield f"{place}: dpo.sync_ref_model moves a second model: set reference: full"
        if recipe.freeze.divides or recipe.method.adapter:
            other = f"method.{recipe.method.adapter}" if recipe.method.adapter else f"freeze.grain {recipe.freeze.grain_name}"
            yield f"{place}: dpo.sync_ref_model lays whole weights into the second model, and {other} trains no such: drop one"
        if recipe.checkpoint.is_on:
            yield (
                f"{place}: dpo.sync_ref_model moves a second model, which step checkpoints do not hold: set "
                "checkpoint.save_every_minutes: null and no checkpoint.save_steps"
            )


def _place(key: str, source: RecipeFile) -> str:
    return source.place(tuple(key.split(".")))


def _show(found: Any) -> str:
    return ", ".join(map(str, found)) if isinstance(found, tuple | list) else str(found).lower()
