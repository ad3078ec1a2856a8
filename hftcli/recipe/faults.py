"""What is wrong with a recipe, a line for each fault: where it stands, what was got, and the key that was probably meant."""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from hftcli.recipe.levers import check_levers
from hftcli.recipe.methods import ADAPTERS, GRAINLESS_METHODS, ROW_METHODS, SEQUENCE_METHODS
from hftcli.recipe.recipe import Objective, Recipe
from hftcli.recipe.section import list_kinds, open_section
from hftcli.recipe.sections import DpoSection, TrainSection
from hftcli.recipe.source import Keys, RecipeFile, holds_secret
from hftcli.recipe.trainer_keys import DPO_ONLY, GONE, SFT_ONLY, SHARED, Fate, Ours, Passed, Refused

# Sections that also take fields of the trainers, each with hft's own fields and the trainers'.
OPEN_SECTIONS: dict[str, tuple[type[BaseModel], dict[str, Fate]]] = {
    "train": (TrainSection, {**SHARED, **SFT_ONLY}),
    "dpo": (DpoSection, DPO_ONLY),
}
# Names of other tools for what a recipe has by another.
OTHER_NAMES = {"track": "train.report_to", "trackers": "train.report_to"}
STEP_COUNTS = ("num_decay_steps", "num_stable_steps", "timescale")  # of `train.lr_scheduler_kwargs`
# Keys of the one objective that would have no effect under the other.
FOREIGN_KEYS = {
    "sft": ("dpo", "reference", "data.drop_identical", "continual"),
    "dpo": (
        "train.packing",
        "train.assistant_only_loss",
        "train.completion_only_loss",
        "data.pattern",
        "continual",
    ),
    "continual": (
        "dpo",
        "reference",
        "data.path",
        "data.sources",
        "data.name",
        "data.split",
        "data.revision",
        "data.bad_rows",
        "data.special_tokens_in_text",
        "data.ignore_columns",
        "data.pattern",
        "data.seed",
        "data.drop_identical",
        "eval.held_out",
        "train.packing",
        "train.assistant_only_loss",
        "train.completion_only_loss",
    ),
}


def describe_faults(faults: Sequence[ErrorDetails], source: RecipeFile) -> Iterator[str]:
    """What pydantic refuses, a line for each with the place where the key was given.

    Of a key that takes one value or several, a text that is none of the values is one fault.
    """
    found = [_find_key(fault["loc"]) for fault in faults]
    for keys, fault in zip(found, faults, strict=True):
        if fault["type"] != "tuple_type" or not isinstance(fault["input"], str) or found.count(keys) == 1:
            yield _describe_fault(fault, keys, source)


def _find_key(parts: Sequence[int | str]) -> Keys:
    """The key of a fault, without the names by which pydantic tells apart the types that it may have."""
    keys: list[str] = []
    model: type[BaseModel] | None = Recipe
    for part in parts:
        if isinstance(part, int) or model is not None:
            keys.append(str(part))
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            model = open_section(field.annotation) if field else None
    return tuple(keys)


def _describe_fault(fault: ErrorDetails, keys: Keys, source: RecipeFile) -> str:
    place, name = source.place(keys, is_given=fault["type"] != "missing"), ".".join(keys)
    if fault["type"] == "extra_forbidden":
        return _describe_unknown_key(place, keys, _section_fields(keys[:-1]))
    if fault["type"] == "missing":
        return f"{place}: {name} is missing"
    return f"{place}: {name}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _describe_unknown_key(place: str, keys: Keys, known: Iterable[str]) -> str:
    guess = difflib.get_close_matches(keys[-1], list(known), n=1)
    section = f" under {'.'.join(keys[:-1])}" if len(keys) > 1 else ""
    if keys[-1] in OTHER_NAMES:
        return f"{place}: unknown key '{keys[-1]}'{section}: use {OTHER_NAMES[keys[-1]]}"
    hint = f" (did you mean '{guess[0]}'?)" if guess else f" (known: {', '.join(known) or 'none'})"
    return f"{place}: unknown key '{keys[-1]}'{section}{hint}"


def _section_fields(keys: Keys) -> list[str]:
    model: Any = Recipe
    for key in keys:
        if key.isdigit():  # the place in a list of sections
            continue
        model = open_section(model.model_fields[key].annotation)
    return list(model.model_fields)


def list_keys(keys: Keys = ()) -> Iterator[str]:
    """Every key that a recipe may have, those that are passed on to the trainers too, with their sections."""
    section: Any = Recipe
    for key in keys:
        section = open_section(section.model_fields[key].annotation)
    for name, field in section.model_fields.items():
        if open_section(field.annotation) is not None:
            yield from list_keys((*keys, name))
        else:
            yield ".".join((*keys, name))
    if len(keys) == 1 and keys[0] in OPEN_SECTIONS:
        yield from (f"{keys[0]}.{name}" for name, fate in OPEN_SECTIONS[keys[0]][1].items() if isinstance(fate, Passed))


def check_secrets(values: dict[str, Any], source: RecipeFile, keys: Keys = ()) -> Iterator[str]:
    """What nobody else may read: a recipe is written into its run."""
    for given, value in values.items():
        key = str(given)  # YAML reads a label of 0 as a number
        place, name = source.place((*keys, key)), ".".join((*keys, key))
        items = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            yield from check_secrets(value, source, (*keys, key))
        elif value is not None and any(holds_secret(key, item) for item in items):
            yield (
                f"{place}: {name} holds a secret, and a recipe is written into its run: put it into the environment (HF_TOKEN, "
                "WANDB_API_KEY, ...), or log in with the service's own command"
            )


def check_booleans(
    values: dict[str, Any], source: RecipeFile, model: type[BaseModel] = Recipe, keys: Keys = ()
) -> Iterator[str]:
    """Pydantic reads `true` as the number 1."""
    for key, value in values.items():
        if key not in model.model_fields:
            continue
        annotation = model.model_fields[key].annotation
        section, place = open_section(annotation), (*keys, key)
        if section and isinstance(value, dict):
            yield from check_booleans(value, source, section, place)
            continue
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if section and isinstance(item, dict):
                yield from check_booleans(item, source, section, (*place, str(index)))
            elif is_misplaced_boolean(item, annotation):
                yield f"{source.place(place)}: {'.'.join(place)}: input should be a number, got {item}"


def is_misplaced_boolean(value: Any, annotation: Any) -> bool:
    """Whether a value is true or false where a number is asked for."""
    kinds = list_kinds(annotation)
    return isinstance(value, bool) and bool({int, float} & kinds) and bool not in kinds


def type_trainer_keys(values: dict[str, Any], source: RecipeFile) -> Iterator[str]:
    """Give the trainers' fields the types that the trainers take, in place; what does not fit is a fault."""
    for section, (model, fates) in OPEN_SECTIONS.items():
        given = values.get(section)
        if not isinstance(given, dict):
            continue
        for key, value in given.items():
            fate = fates.get(key)
            if key in model.model_fields or not isinstance(fate, Passed):
                continue
            name, place = f"{section}.{key}", source.place((section, key))
            if is_misplaced_boolean(value, fate.kind):
                yield f"{place}: {name}: input should be a number, got {value}"
                continue
            try:
                given[key] = TypeAdapter(fate.kind).validate_python(value)
            except ValidationError as error:
                reasons = " or ".join(dict.fromkeys(fault["msg"][0].lower() + fault["msg"][1:] for fault in error.errors()))
                yield f"{place}: {name}: {reasons}, got {value!r}"


def check_finite(values: Any, source: RecipeFile, keys: Keys = ()) -> Iterator[str]:
    """Numbers without end, and what is none: JSON, in which a round is written, has neither."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from check_finite(value, source, (*keys, str(key)))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from check_finite(value, source, keys)
    elif isinstance(values, float) and not math.isfinite(values):
        yield f"{source.place(keys)}: {'.'.join(keys)}: input should be a finite number, got {values}"


def check_trainer_keys(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Keys that are not hft's own must be fields of the objective's trainer that hft passes on, each in its section."""
    fates = {"train": {**SHARED, **SFT_ONLY}} if objective != "dpo" else {"train": SHARED, "dpo": DPO_ONLY}
    for section, known in fates.items():
        given = getattr(recipe, section)
        for key in given.extra if given else ():
            home = next((place for place in (section, *fates) if key in fates[place]), None)
            fate = fates[home][key] if home else SFT_ONLY.get(key)
            place, name = source.place((section, key)), f"{section}.{key}"
            if isinstance(fate, Refused):
                yield f"{place}: {name} is not taken: {fate.reason}" + (f": use {fate.instead}" if fate.instead else "")
            elif key in GONE:
                yield f"{place}: {name} is not a key of hft: use {GONE[key]}"
            elif isinstance(fate, Ours):
                yield f"{place}: {name} is not a key of hft: use {fate.key}"
            elif fate is None:
                taken = [field for field, found in known.items() if isinstance(found, Passed)]
                yield _describe_unknown_key(place, (section, key), [*OPEN_SECTIONS[section][0].model_fields, *taken])
            elif home is None:
                yield f"{place}: {name} would have no effect under `hft {objective}`: drop it"
            elif home != section:
                yield f"{place}: {name} is not a key of hft: use {home}.{key}"


def check_foreign_keys(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Settings of the other objective."""
    for key in FOREIGN_KEYS[objective]:
        section: Any = recipe
        *parents, name = key.split(".")
        for parent in parents:
            section = getattr(section, parent)
        if getattr(section, name) != type(section).model_fields[name].default:
            yield f"{source.place(tuple(key.split('.')))}: {key} would have no effect under `hft {objective}`: drop it"


def check_methods(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """Methods that would have no effect without earlier tasks, or that do not go with the grain."""
    for name in recipe.method.names:
        if name in SEQUENCE_METHODS and objective != "continual":
            yield (
                f"{source.place(('method', name))}: method.{name} defends earlier tasks, and `hft {objective}` has none: "
                "use `hft continual`, or drop it"
            )
        if name not in GRAINLESS_METHODS and recipe.freeze.divides:
            yield (
                f"{source.place(('method', name))}: method.{name} works on whole matrices, and of these freeze.grain: "
                f"{recipe.freeze.grain_name} trains a part: drop one of the two; {' and '.join(GRAINLESS_METHODS)} go with both"
                + (", and method.lora.quiet is LoRA in directions" if name == "lora" else "")
            )
        if name in ADAPTERS and recipe.freeze.grain == "biases":
            yield (
                f"{source.place(('method', name))}: method.{name} trains adapters of whole matrices, and freeze.grain: biases "
                "trains no matrix: drop one of the two"
            )
    yield from _check_holds(recipe, source)
    yield from _check_redraw(recipe, source)
    yield from check_levers(recipe, objective, source)
    for key in ("blocks", "keep", "part"):
        if getattr(recipe.freeze, key) is not None and not (recipe.freeze.divides or recipe.method.open_fraction):
            others, grain = "directions" if key == "blocks" else "directions or columns", recipe.freeze.grain_name
            yield (
                f"{source.place(('freeze', key))}: freeze.{key} would have no effect beside freeze.grain {grain}: drop it, or "
                f"set freeze.grain: {others}, or method.lora.quiet: true"
            )
    rule = recipe.freeze
    is_quiet_adapter = recipe.method.open_fraction is not None
    reads = (rule.reads_earlier or is_quiet_adapter) and rule.choice != "random"
    if rule.keep is not None and (rule.divides or is_quiet_adapter) and not reads:
        yield (
            f"{source.place(('freeze', 'keep'))}: freeze.keep would have no effect beside freeze.grain {rule.grain_name} and "
            f"freeze.part {rule.choice}, which read no inputs: drop it, or set freeze.part: quiet"
        )


def _check_holds(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """What holds weights to the start, where other things train, or what trains is not the weights themselves."""
    rule, adapters = recipe.freeze, [name for name in recipe.method.names if name in ADAPTERS]
    given = {"pull": rule.pull is not None, "average": rule.average is not None, "interpolate": rule.interpolate < 1}
    for key in (key for key, is_on in given.items() if is_on):
        place = source.place(("freeze", key))
        if adapters:
            yield f"{place}: freeze.{key} holds the weights of the model, and {adapters[0]} trains others: drop one of the two"
        if key != "interpolate" and recipe.train.fit == "auto":
            yield f"{place}: train.fit does not count the copy that freeze.{key} holds: drop one of the two"
        if key != "pull" and rule.divides:
            yield (
                f"{place}: freeze.{key} goes by whole matrices, and freeze.grain is {rule.grain_name}: drop one of the two, or "
                "interpolate the finished model with `hft merge --interpolate`"
            )
    goes_back = {"checkpoint.best": recipe.checkpoint.best, "stop.max_forgetting": recipe.stop.max_forgetting}
    for key in (key for key, value in goes_back.items() if rule.average is not None and value is not None):
        place = source.place(("freeze", "average"))
        yield f"{place}: freeze.average leaves the mean of all steps, and {key} goes back to one of them: drop one of the two"
    is_moving = recipe.method.peft is not None and recipe.method.peft.type == "ADALORA"
    for key in (key for key, value in goes_back.items() if is_moving and value is not None):
        place = source.place(tuple(key.split(".")))
        yield f"{place}: {key} goes back to an earlier step, and the ranks that ADALORA gave up since stay so: drop one"
    if rule.average is not None and recipe.launch.offload == "optimizer":
        place = source.place(("freeze", "average"))
        yield f"{place}: freeze.average keeps its copy on the device, and launch.offload what trains on the host: drop one"
    if rule.pull is not None and rule.pull.selective and recipe.launch.offload == "optimizer":
        yield (
            f"{source.place(('freeze', 'pull', 'selective'))}: freeze.pull.selective reads gradients before the step, and "
            "launch.offload takes them away: drop one of the two"
        )


def _check_redraw(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """What counts on one trained half for the whole round."""
    redraw, optim = recipe.freeze.redraw, recipe.train.extra.get("optim", "adamw_torch_fused")
    key = "redraw" if redraw is not None else "part"
    name, place = f"freeze.{key}" + (": spiel" if redraw is None else ""), source.place(("freeze", key))
    if redraw is None and recipe.freeze.part != "spiel":
        return
    if redraw is None and optim not in ("adamw_torch", "adamw_torch_fused"):
        yield f"{place}: freeze.part: spiel begins AdamW's moments anew, and train.optim is {optim}: drop one of the two"
    others = {
        f"method.{name}": True
        for name in recipe.method.names
        if name not in ROW_METHODS or name in recipe.method.start_readers
    } | {
        "launch.offload": recipe.launch.offload != "none",
        "reference: shared": recipe.reference == "shared",
        "eval.every_steps and eval.num_points": recipe.eval.measures_within,
        "stop.max_forgetting and stop.min_learning": (recipe.stop.max_forgetting, recipe.stop.min_learning) != (None, None),
        "checkpoint.best": recipe.checkpoint.best is not None,
    }  # fmt: skip
    for key in (key for key, is_on in others.items() if is_on):
        yield f"{place}: {name} does not go with {key}, which takes what trains to be the same in every step: drop one"
    if redraw is not None and redraw.schedule == "cycle":
        yield from _check_cycle(recipe, source)


def _check_cycle(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Settings of a schedule that are counted in steps, where it goes on once a cycle of them."""
    if recipe.train.warmup_steps and recipe.train.lr_scheduler_type != "constant":  # which has no warm-up
        yield (
            f"{source.place(('train', 'warmup_steps'))}: train.warmup_steps is {recipe.train.warmup_steps:g}, and with "
            "freeze.redraw.schedule cycle the whole first cycle would have a learning rate of 0: set train.warmup_steps: 0"
        )
    given = recipe.train.extra.get("lr_scheduler_kwargs") or {}
    for key in (key for key in STEP_COUNTS if key in given):
        yield (
            f"{source.place(('train', 'lr_scheduler_kwargs', key))}: train.lr_scheduler_kwargs.{key} counts steps, and with "
            "freeze.redraw.schedule cycle the learning rate goes on once a cycle, so that it would count cycles: take another "
            "train.lr_scheduler_type, or set freeze.redraw.schedule: step"
        )


def check_measuring(recipe: Recipe, objective: Objective, source: RecipeFile) -> Iterator[str]:
    """What is to happen by what is measured within a round, where nothing is measured that could decide it."""
    asked, stop, best = recipe.eval, recipe.stop, recipe.checkpoint.best
    if asked.measures_within and not (asked.tasks or asked.held_out.path or objective == "continual"):
        key = "every_steps" if asked.every_steps is not None else "num_points"
        yield f"{source.place(('eval', key))}: eval.{key} would have no effect: name what to measure under eval.tasks"
    has_choices = recipe.data.pattern is not None and asked.held_out.path is not None
    if not (asked.tasks or objective == "continual"):
        for key in ("chat", "shots", "max_new_tokens", "generate", "temperature", "max_examples", "strict", "allow_code"):
            acts = has_choices and key == "strict"
            if getattr(asked, key) != type(asked).model_fields[key].default and not acts:
                yield f"{source.place(('eval', key))}: eval.{key} would have no effect: name what to ask under eval.tasks"
    elif has_choices and asked.shots:
        yield (
            f"{source.place(('eval', 'shots'))}: eval.shots answers questions before those of eval.tasks, and none before "
            "those that data.pattern makes of eval.held_out: drop one of the two"
        )
    given = {
        ("stop", "max_forgetting"): stop.max_forgetting, ("stop", "min_learning"): stop.min_learning,
        ("checkpoint", "best"): best,
    }  # fmt: skip
    needed = [keys for keys, value in given.items() if value is not None]
    if stop.by != "score" and not needed:
        yield f"{source.place(('stop', 'by'))}: stop.by would have no effect: set stop.max_forgetting or stop.min_learning"
    for keys in needed:
        place, name = source.place(keys), ".".join(keys)
        if not asked.measures_within:
            yield f"{place}: {name} goes by what is measured within a round: set eval.every_steps or eval.num_points"
    if best == "within_budget" and stop.max_forgetting is None:
        yield f"{source.place(('checkpoint', 'best'))}: checkpoint.best within_budget needs a budget: set stop.max_forgetting"


def check_fit(recipe: Recipe, source: RecipeFile) -> Iterator[str]:
    """Settings of the fit that would have no effect."""
    if recipe.train.fit is None and recipe.train.memory_bytes is not None:
        yield f"{source.place(('train', 'memory_bytes'))}: train.memory_bytes would have no effect: set train.fit: auto"
    if recipe.train.fit == "auto" and recipe.train.activation_checkpointing:
        place = source.place(("train", "activation_checkpointing"))
        yield f"{place}: train.activation_checkpointing is what train.fit chooses: drop one of the two"
    for name in set(recipe.method.names) - {"replay"}:
        if recipe.train.fit == "auto":
            yield f"{source.place(('train', 'fit'))}: train.fit does not count what method.{name} holds: drop one of the two"
