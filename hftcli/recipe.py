"""The recipe: what the user asks for, checked whole before anything is loaded.

`load_recipe` reads one YAML file, lays `--set key=value` over it, and either returns a `Recipe` or raises one `RecipeError`
that lists every fault with its file, line and key. The docstring under a field is that field's only documentation.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hftcli.errors import RecipeError
from hftcli.freezing.selection import FreezeRule

PACKAGE = Path(__file__).parent
QUICK_START = "tinyworld"  # the recipe, model and data that ship with the package


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelSection(Section):
    path: str
    """A folder with a Hugging Face checkpoint, the folder of a finished run, a hub id, or `tinyworld`."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type in which the start is loaded and the checkpoint is written; null keeps the start's own. What trains has float32
    masters in any case."""

    chat_template: str | None = None
    """A Jinja file, or a template that ships with hft (`chatml`, `tulu`); null takes the tokenizer's own. Saved with the
    model."""

    attn_implementation: str | None = None
    """Attention kernel, as transformers names it (`sdpa`, `flash_attention_2`, ...); null lets transformers choose."""


class DataSection(Section):
    path: str
    """A JSON, JSONL or Parquet file, a folder of them, a hub dataset, or `tinyworld/skill`."""

    name: str | None = None
    """Configuration of a hub dataset."""

    split: str = "train"
    """Split of a hub dataset, or of a folder with one file per split."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens in one sequence. Longer rows are cut at the end; rows that lose every trained token are dropped and counted."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows; null uses all."""


class TrainSection(Section):
    """Names are those of transformers' TrainingArguments and TRL's SFTConfig; any other field of theirs may be given too."""

    model_config = ConfigDict(extra="allow")

    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""

    max_steps: int = -1
    """Optimizer steps; overrides `num_train_epochs` when positive."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""

    lr_scheduler_type: str = "linear"
    """Schedule after warm-up, by transformers' names."""

    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Steps of linear warm-up; below 1, a share of all steps."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on what trains only."""

    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step over all processes. Gradient accumulation is derived from it, so that a recipe means the
    same on 1 and on 64 GPUs."""

    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward pass of one process."""

    packing: bool = False
    """Lay several conversations into one sequence of `data.max_length` tokens; attention never crosses their borders."""

    assistant_only_loss: bool = True
    """Conversations: train on the assistant's turns and their end tokens only."""

    completion_only_loss: bool = True
    """Prompt and completion: train on the completion and its end token only."""

    activation_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory, about a third more compute."""

    bf16: bool = True
    """Compute in bfloat16 on GPUs that have it, with float32 masters for what trains. Processes without a GPU compute in
    float32."""

    seed: int = 42
    """Order of the data, dropout. The halves have a seed of their own, `freeze.seed`."""

    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between rows of metrics.jsonl."""


class LaunchSection(Section):
    num_processes: Annotated[int, Field(ge=1)] | None = None
    """Processes on this machine: one per GPU, or CPU ranks where there is none; null takes every visible GPU, or one
    process."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed's ZeRO stage with two processes or more: 1 shards the optimizer, 2 also gradients, 3 also weights. 0
    shards nothing, and is for float32 only."""


class EvalSection(Section):
    tasks: tuple[str, ...] = ()
    """Tasks to score before and after each round, such as `tinyworld/facts`."""


class Recipe(Section):
    """One YAML file, resolved."""

    model: ModelSection
    data: DataSection
    freeze: FreezeRule = FreezeRule()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    eval: EvalSection = EvalSection()
    output: str | None = None
    """Folder of the run; null gives `runs/<name of the recipe>`."""


# Names that are gone from transformers or TRL, or that hft derives, with what to use instead.
REPLACED_TRAIN_KEYS = {
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
}
# Fields of the trainer that would have no effect, because hft does that work or sets them itself.
OWN_TRAIN_KEYS = {
    "dataset_kwargs", "dataset_num_proc", "ddp_backend", "disable_tqdm", "eval_packing", "eval_steps", "eval_strategy",
    "load_best_model_at_end", "logging_nan_inf_filter", "push_to_hub", "resume_from_checkpoint", "save_steps",
    "save_strategy", "save_total_limit", "use_cpu",
}  # fmt: skip


def load_recipe(path: Path | str | None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, the name of a recipe that ships with hft, or None for the quick start.
        overrides: `key.path=value` strings; the value is YAML.

    Raises:
        RecipeError: naming every fault at once.
    """
    path = find_recipe(path)
    source = _Source(path)
    values = source.values
    for override in overrides:
        _apply_override(values, override, source)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_describe_fault(fault, source) for fault in error.errors())) from None
    faults = list(_check_train_keys(recipe, source))
    if faults:
        raise RecipeError("\n".join(faults))
    if recipe.output is None:
        recipe = recipe.model_copy(update={"output": f"runs/{path.stem}"})
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def list_recipes() -> list[Path]:
    """The recipes that ship with hft: in the package when installed, at the top of a checkout."""
    folders = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
    return sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.yaml"))


def find_recipe(path: Path | str | None) -> Path:
    shipped = {file.stem: file for file in list_recipes()}
    if path is None:
        return shipped[QUICK_START]
    if Path(path).is_file():
        return Path(path)
    if str(path) in shipped:
        return shipped[str(path)]
    raise RecipeError(f"{path}: no such recipe", "give a YAML file, or one of: " + ", ".join(shipped))


class _Source:
    """A YAML file with the line of every key, so that a fault can name its place."""

    def __init__(self, path: Path):
        self.path = path
        self.origins: dict[tuple, str] = {}
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}"
            raise RecipeError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path}:1: a recipe is a mapping of sections, got a {node.tag.rpartition(':')[2]}")
        self.values: dict[str, Any] = self._read_node(node, ()) if node else {}

    def _read_node(self, node: yaml.Node, keys: tuple) -> Any:
        if isinstance(node, yaml.MappingNode):
            values = {}
            for key_node, value_node in node.value:
                key = (*keys, key_node.value)
                if key_node.value in values:
                    place = f"{self.path}:{key_node.start_mark.line + 1}"
                    raise RecipeError(f"{place}: key '{'.'.join(key)}' is given twice, first at {self.origins[key]}")
                self.origins[key] = f"{self.path}:{key_node.start_mark.line + 1}"
                values[key_node.value] = self._read_node(value_node, key)
            return values
        return yaml.SafeLoader("").construct_object(node, deep=True)

    def place(self, keys: tuple) -> str:
        """Where a key was given: the longest part of its path that stands somewhere."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.origins:
                return self.origins[keys[:length]]
        return str(self.path)


def _apply_override(values: dict, override: str, source: _Source) -> None:
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{place}: expected key=value, such as train.learning_rate=1e-5")
    keys = tuple(key.split("."))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{place}: the value is not YAML: {getattr(error, 'problem', None) or error}") from None
    for depth, part in enumerate(keys[:-1], start=1):
        if not isinstance(values.setdefault(part, {}), dict):
            raise RecipeError(f"{place}: {'.'.join(keys[:depth])} is a value, not a section")
        values = values[part]
    values[keys[-1]] = value
    source.origins[keys] = place


def _describe_fault(fault: dict, source: _Source) -> str:
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
    hint = f" (did you mean '{guess[0]}'?)" if guess else f" (known: {', '.join(known)})"
    return f"{place}: unknown key '{keys[-1]}'{section}{hint}"


def _section_fields(keys: tuple) -> list[str]:
    model: Any = Recipe
    for key in keys:
        model = model.model_fields[key].annotation
    return list(model.model_fields)


def _check_train_keys(recipe: Recipe, source: _Source) -> Iterable[str]:
    """Keys under `train` that are not hft's own must be fields of TRL's SFTConfig."""
    for key in recipe.train.model_extra:
        keys = ("train", key)
        if key in REPLACED_TRAIN_KEYS:
            yield f"{source.place(keys)}: train.{key} is not a key of hft: use {REPLACED_TRAIN_KEYS[key]}"
        elif key in OWN_TRAIN_KEYS:
            yield f"{source.place(keys)}: train.{key} would have no effect: hft sets it itself or does that work"
        elif key not in (known := read_training_fields()):
            yield _describe_unknown_key(source.place(keys), keys, [*TrainSection.model_fields, *known])


@cache
def read_training_fields() -> frozenset[str]:
    """The fields of TRL's SFTConfig, read from the installed sources: importing them would import torch."""
    fields = set()
    for package, file in (("transformers", "training_args.py"), ("trl", "trainer/base_config.py"),
                          ("trl", "trainer/sft_config.py")):  # fmt: skip
        source = Path(importlib.util.find_spec(package).origin).parent / file
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
    return frozenset(fields) - REPLACED_TRAIN_KEYS.keys()
