"""The recipe: what the user asks for, checked whole before anything is loaded.

`load_recipe` reads one YAML file, lays `--set key=value` over it, and either returns a `Recipe` or raises one `RecipeError`
that lists every fault with its file, line and key. The docstring under a field is that field's only documentation.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hftcli.errors import RecipeError
from hftcli.freezing.activations import LossKernel
from hftcli.freezing.budget import ReferenceMode
from hftcli.freezing.selection import FreezeRule

Objective = Literal["sft", "dpo", "continual"]
PACKAGE = Path(__file__).parent
QUICK_START = "tinyworld"  # the model and data that ship with the package
QUICK_START_RECIPES: dict[Objective, str] = {"sft": "tinyworld", "dpo": "tinyworld-dpo", "continual": "tinyworld-continual"}

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


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
    path: str | None = None
    """A JSON, JSONL or Parquet file, a folder of them, a hub dataset, or `tinyworld/skill`."""

    root: str | None = None
    """Continual learning: the folder with one folder for each task, `<task>/{train,eval,test}.json`; tinyworld needs none."""

    name: str | None = None
    """Configuration of a hub dataset."""

    split: str = "train"
    """Split of a hub dataset, or of a folder with one file per split."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens in one sequence. Longer rows are cut at the end; rows that lose every trained token are dropped and counted. With
    DPO, a prompt with one of its answers is a sequence."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows, of each task; null uses all."""

    drop_identical: bool = False
    """DPO: drop the pairs whose answers the cut to `data.max_length` makes the same. Otherwise they are counted, warned of, and
    kept: they teach nothing."""


class TrainSection(Section):
    """Names are those of transformers' TrainingArguments and TRL's SFTConfig; any other field of theirs may be given too. With
    DPO, those of TRL's DPOConfig are given under `dpo`."""

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
    """Sequences, or pairs, per optimizer step over all processes. Gradient accumulation is derived from it, so that a recipe
    means the same on 1 and on 64 GPUs."""

    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 4
    """Sequences, or pairs, per forward pass of one process; with `fit: auto`, the most that it may choose."""

    fit: Literal["auto"] | None = None
    """`auto` chooses what computes least again of what the device's memory carries by the budget of `hft plan`: the activation
    checkpointing (none, every so many layers, all), the loss kernel, and with them the largest micro-batch that divides the
    global batch. Null takes `per_device_train_batch_size` and `activation_checkpointing` as they are given."""

    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """With `fit: auto`: bytes that one device may use; null takes the GPU's memory, and must be given where there is no GPU."""

    packing: bool = False
    """Lay several conversations into one sequence of `data.max_length` tokens; attention never crosses their borders."""

    assistant_only_loss: bool = True
    """Conversations: train on the assistant's turns and their end tokens only."""

    completion_only_loss: bool = True
    """Prompt and completion: train on the completion and its end token only."""

    activation_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory, about a third more compute."""

    loss_kernel: LossKernel | None = None
    """`chunked` computes the logits tile by tile, and once more in the backward pass; `plain` keeps those of trained tokens.
    The losses are the same up to rounding. Null is `chunked` on a GPU, and elsewhere `plain`, which is faster there, unless
    the logits of a micro-batch may come to more than a gibibyte."""

    bf16: bool = True
    """Compute in bfloat16 where the GPU, or without one the processor, has it, with float32 masters for what trains; elsewhere
    in float32."""

    seed: int = 42
    """Order of the data, dropout. The halves have a seed of their own, `freeze.seed`."""

    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between rows of metrics.jsonl."""


class DpoSection(Section):
    """Names are those of TRL's DPOConfig; any other field of it may be given too."""

    model_config = ConfigDict(extra="allow")

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to the reference: the reward of an answer is beta times the logarithm of how much likelier
    the model finds it than the reference does."""

    loss_type: LossType | tuple[LossType, ...] = "sigmoid"
    """The loss on a pair's rewards, or several that are added; `sigmoid` is that of the DPO paper (arXiv 2305.18290, equation
    7)."""

    loss_weights: tuple[float, ...] | None = None
    """The weight of each of several losses; null weighs each 1."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs whose answers are taken to be the wrong way round; counts for the losses `robust`, `exo_pair`, `aot`
    and `aot_unpaired`."""


def _refuse_sexagesimal(value: Any) -> Any:
    """YAML 1.1 reads 8:00:00 as the number 28800, which sbatch would take for minutes."""
    if isinstance(value, int):
        raise ValueError("write it in quotes, such as '8:00:00', since YAML reads a time as a number")
    return value


SlurmWord = Annotated[str, Field(pattern=r"^\S+$")]


class SlurmSection(Section):
    """What the batch script of `--slurm` asks of Slurm. Nodes and processes are those of `launch`."""

    partition: SlurmWord | None = None
    """Partition to run in; null takes the site's own choice."""

    account: SlurmWord | None = None
    """Account to charge; null takes the user's own."""

    time: Annotated[SlurmWord | None, BeforeValidator(_refuse_sexagesimal)] = None
    """Time limit, as sbatch takes it (`8:00:00`, `2-00:00:00`); null takes the partition's."""

    gres: SlurmWord | None = None
    """Devices of each node, as sbatch's `--gres` takes them; null asks for `gpu:N`, one for each process, and `none` for CPU
    ranks."""

    signal_seconds: Annotated[int, Field(ge=10, le=65535)] = 300
    """Seconds before the time limit at which the run is told to write a checkpoint, stop and queue again: more than a step and
    a step checkpoint take."""

    options: tuple[Annotated[str, Field(pattern=r"^-.*$")], ...] = ()
    """Other options of sbatch, each as on its command line: `--qos=long`."""

    @model_validator(mode="after")
    def _leave_time_to_train(self) -> "SlurmSection":
        """Slurm would signal such a job when it begins, and the job would be queued again and again."""
        if self.time is not None and (limit := _count_seconds(self.time)) is not None and self.signal_seconds >= limit:
            raise PydanticCustomError(
                "no_time", f"signal_seconds is {self.signal_seconds}, and time gives {limit} seconds in all: lower it"
            )
        return self


def _count_seconds(time: str) -> int | None:
    """A time limit as sbatch reads it; None where it is not one of numbers."""
    days, _, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")) or len(parts) > 3:
        return None
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


class LaunchSection(Section):
    num_processes: Annotated[int, Field(ge=1)] | None = None
    """Processes on each machine: one per GPU, or CPU ranks where there is none; null takes the hostfile's slots, or every
    visible GPU, or one process."""

    num_nodes: Annotated[int, Field(ge=1)] | None = None
    """Machines: those that Slurm gives, or on which `torchrun` starts a prepared round by hand; null takes the hostfile's, or
    one."""

    hostfile: str | None = None
    """The machines, in DeepSpeed's format (`host slots=8`), each reached over ssh from this one; null runs on this machine."""

    slurm: SlurmSection | None = None
    """Launch with Slurm's srun. `--slurm` fills it in where it is not given, and writes the batch script."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed's ZeRO stage with two processes or more: 1 shards the optimizer, 2 also gradients, 3 also weights. 0
    shards nothing, and is for float32 only."""

    timeout_minutes: Annotated[float, Field(gt=0)] | None = 60.0
    """Minutes without any progress of the worker after which it counts as hung and is ended; null waits for ever. A download of
    the model does not count."""

    @property
    def num_ranks(self) -> int:
        """Processes on all machines, once `num_processes` and `num_nodes` are resolved."""
        return (self.num_processes or 1) * (self.num_nodes or 1)

    @property
    def split(self) -> dict[str, int | None]:
        """How a resolved launch splits the work. Nothing else of it changes the result: not where the ranks are, nor how they
        are reached."""
        stage = self.zero_stage if self.num_ranks > 1 else None
        return {"launch.num_processes x launch.num_nodes": self.num_ranks, "launch.zero_stage": stage}


class CheckpointSection(Section):
    """What a round leaves, and its step checkpoints, from which a stopped one goes on; with both intervals null it has none."""

    format: Literal["full", "delta"] = "full"
    """What a round leaves: `full`, a plain Hugging Face folder; `delta`, what changed and the identity of the start, about half
    as large. hft reads both alike, and `hft merge` makes the one out of the other. A step checkpoint leaves the frozen half out
    with either."""

    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between step checkpoints; null goes by the clock alone."""

    save_every_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    """Minutes between step checkpoints; null goes by steps alone. One is also written when a signal stops the run."""

    keep: Annotated[int, Field(ge=1)] = 2
    """Step checkpoints kept: an older one is removed when a newer one is complete, and all when the round is done. With two, a
    damaged one costs the steps since the one before."""

    @property
    def is_on(self) -> bool:
        return self.save_steps is not None or self.save_every_minutes is not None


class HeldOutSection(Section):
    path: str | None = None
    """Held-out rows, as under `data.path`, to measure before and after each round: by the likelihood of what would be trained;
    with DPO, by reward accuracy, margin and KL to the reference. Null measures none."""

    name: str | None = None
    """Configuration of a hub dataset."""

    split: str = "test"
    """Split of a hub dataset, or of a folder with one file per split."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows; null uses all."""


class EvalSection(Section):
    tasks: tuple[str, ...] = ()
    """Tasks to score before and after each round, such as `tinyworld/facts`. With continual learning they stand beside those of
    the sequence: what the model knew besides."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Ask the first so many questions of each task; null asks all."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Temperature at which answers are drawn; 0 takes the likeliest token at every place. Null is 0, or the protocol's."""

    held_out: HeldOutSection = HeldOutSection()


class ContinualSection(Section):
    tasks: str | tuple[str, ...] = QUICK_START
    """A benchmark (`tinyworld`, `trace`, `standard`), or a list of tasks: folders under `data.root`, or tasks of a benchmark
    such as `trace/FOMC`."""

    order: Annotated[str, Field(coerce_numbers_to_str=True)] | None = None
    """Which of the benchmark's orders; null takes its first, or that of the list."""

    protocol: Literal["paper", "scripts"] | None = None
    """Whose epochs for each task and whose decoding: those of the benchmark's paper, or of its scripts where they differ. Null
    takes `train.num_train_epochs` for each task, and the likeliest token at every place."""


class ReplaySection(Section):
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each earlier task's training rows that is trained on again."""

    when: Literal["mixed", "after"] = "mixed"
    """Mixed in among the rows of the task, in every epoch, or one pass after the task, as TRACE does."""

    extra: str | None = None
    """A task under `data.root` whose training rows all join the replayed ones in every round, as TRACE's `Lima`."""


class EwcSection(Section):
    strength: Annotated[float, Field(gt=0)] = 400.0
    """Lambda of arXiv 1612.00796, equation 3: the weight of the quadratic penalty."""

    num_examples: Annotated[int, Field(ge=1)] = 256
    """Training rows of a task on which its Fisher information is estimated, at the end of its round."""


class L2spSection(Section):
    strength: Annotated[float, Field(gt=0)]
    """Alpha of arXiv 1802.01483: the penalty is half of it times the squared distance of the weights from where the round
    starts."""


class GemSection(Section):
    num_examples: Annotated[int, Field(ge=1)] = 256
    """Training rows of each earlier task that are remembered."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Remembered rows of each earlier task whose gradient is taken in a step."""

    margin: Annotated[float, Field(ge=0)] = 0.5
    """Gamma of arXiv 1706.08840, section 3: how far the projection leans to the earlier tasks."""


class AgemSection(Section):
    num_examples: Annotated[int, Field(ge=1)] = 256
    """Training rows of each earlier task that are remembered."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Remembered rows, of all earlier tasks together, whose gradient is taken in a step."""


class LoraSection(Section):
    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the adapters."""

    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: an adapter adds `lora_alpha / r` times its product."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before an adapter; DPO has none, as long as TRL's `dpo.disable_dropout` is on."""

    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the linear layers that take adapters, such as `q_proj`; null takes all that the freeze plan
    trains in the layers."""


class OloraSection(LoraSection):
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Lambda 1 of arXiv 2310.14152, equation 8: the weight of the overlap with the adapters of the earlier tasks."""


class Ia3Section(Section):
    """Nothing to choose: the vectors stand where the paper has them."""


class MethodSection(Section):
    """How old knowledge is defended besides freezing. A method is on where its section stands, be it empty: `lora: {}`."""

    replay: ReplaySection | None = None
    """Train on rows of earlier tasks again."""

    ewc: EwcSection | None = None
    """Elastic weight consolidation (arXiv 1612.00796)."""

    l2sp: L2spSection | None = None
    """A penalty on the distance from the start (L2-SP, arXiv 1802.01483)."""

    gem: GemSection | None = None
    """Gradient episodic memory (arXiv 1706.08840)."""

    agem: AgemSection | None = None
    """Averaged gradient episodic memory (arXiv 1812.00420)."""

    lora: LoraSection | None = None
    """One low-rank adapter that is trained through all tasks."""

    olora: OloraSection | None = None
    """A low-rank adapter for each task, orthogonal to the earlier ones (arXiv 2310.14152)."""

    ia3: Ia3Section | None = None
    """Vectors that scale keys, values and the mlp's inner activations (arXiv 2205.05638)."""

    @property
    def names(self) -> tuple[str, ...]:
        """The methods that are on."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _check_together(self) -> "MethodSection":
        for first, second, reason in CLASHING_METHODS:
            if first in self.names and second in self.names:
                raise PydanticCustomError("clashing_methods", f"{first} and {second} do not go together: {reason}: drop one")
        return self


# Methods that train something else in place of the weights.
ADAPTERS = ("lora", "olora", "ia3")
# Methods that defend the tasks of earlier rounds, and do nothing in a run of one.
SEQUENCE_METHODS = ("replay", "ewc", "gem", "agem", "olora")
# Pairs of methods that contradict each other, and why.
CLASHING_METHODS = (
    ("gem", "agem", "agem is gem with one constraint in place of one for each task"),
    *(
        (first, second, "each trains something of its own in place of the weights")
        for first, second in combinations(ADAPTERS, 2)
    ),
    *(
        (holder, adapter, f"{holder} holds the weights of the model, and {adapter} leaves them and trains others")
        for holder in ("ewc", "l2sp")
        for adapter in ADAPTERS
    ),
)


class Recipe(Section):
    """One YAML file, resolved."""

    model: ModelSection
    data: DataSection = DataSection()
    freeze: FreezeRule = FreezeRule()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    dpo: DpoSection | None = None
    """Preference optimization. A recipe with this section is one for `hft dpo`, which fills it in where it is not given."""
    reference: ReferenceMode | None = None
    """Where DPO's reference comes from: `precompute` (the default) asks the untouched model once about all pairs and keeps its
    answers on disk, so that no second model exists in training; `shared` is the model with the trained half as it was, of which
    a copy is kept; `full` is a second model. All three give the same losses."""
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    continual: ContinualSection | None = None
    """Learning task after task. A recipe with this section is one for `hft continual`, which fills it in where it is not
    given."""
    method: MethodSection = MethodSection()
    output: str | None = None
    """Folder of the run; null gives `runs/<name of the recipe>`."""

    @property
    def objective(self) -> Objective:
        return "continual" if self.continual else "dpo" if self.dpo else "sft"


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


def load_recipe(path: Path | str | None, overrides: Iterable[str] = (), objective: Objective | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, the name of a recipe that ships with hft, or None for the quick start.
        overrides: `key.path=value` strings; the value is YAML.
        objective: what the recipe is for; None takes what its sections say.

    Raises:
        RecipeError: naming every fault at once.
    """
    path = find_recipe(path, objective or "sft")
    source = _Source(path)
    values = source.values
    for override in overrides:
        _apply_override(values, override, source)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_describe_fault(fault, source) for fault in error.errors())) from None
    objective = objective or recipe.objective
    faults = []
    if objective != "continual" and recipe.data.path is None:
        faults.append(f"{source.place(('data',))}: data.path is missing")
    faults += [*_check_foreign_keys(recipe, objective, source), *_check_trainer_keys(recipe, objective, source)]
    faults += [*_check_methods(recipe, objective, source), *_check_fit(recipe, source)]
    if faults:
        raise RecipeError("\n".join(faults))
    return _resolve(recipe, objective, path)


def _resolve(recipe: Recipe, objective: Objective, path: Path) -> Recipe:
    """Fill in what follows from the objective and the file."""
    found: dict[str, Any] = {"output": recipe.output or f"runs/{path.stem}"}
    if objective == "continual":
        found["continual"] = recipe.continual or ContinualSection()
    if objective == "dpo":
        found |= {"dpo": recipe.dpo or DpoSection(), "reference": recipe.reference or "precompute"}
    return recipe.model_copy(update=found)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def list_recipes() -> list[Path]:
    """The recipes that ship with hft: in the package when installed, at the top of a checkout."""
    folders = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
    return sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.yaml"))


def find_recipe(path: Path | str | None, objective: Objective = "sft") -> Path:
    """The file that a path or name means; None means the objective's quick start.

    Raises:
        RecipeError: there is none.
    """
    shipped = {file.stem: file for file in list_recipes()}
    if path is None:
        return shipped[QUICK_START_RECIPES[objective]]
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
    hint = f" (did you mean '{guess[0]}'?)" if guess else f" (known: {', '.join(known) or 'none'})"
    return f"{place}: unknown key '{keys[-1]}'{section}{hint}"


def open_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, be it an optional one; None where it holds a value."""
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _section_fields(keys: tuple) -> list[str]:
    model: Any = Recipe
    for key in keys:
        model = open_section(model.model_fields[key].annotation)
    return list(model.model_fields)


def _check_foreign_keys(recipe: Recipe, objective: Objective, source: _Source) -> Iterable[str]:
    """Settings of the other objective."""
    for key in FOREIGN_KEYS[objective]:
        section: Any = recipe
        *parents, name = key.split(".")
        for parent in parents:
            section = getattr(section, parent)
        if getattr(section, name) != type(section).model_fields[name].default:
            yield f"{source.place(tuple(key.split('.')))}: {key} would have no effect under `hft {objective}`: drop it"


def _check_trainer_keys(recipe: Recipe, objective: Objective, source: _Source) -> Iterable[str]:
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
    if recipe.dpo and recipe.dpo.model_extra.get("sync_ref_model") and recipe.reference != "full":
        yield f"{source.place(('dpo', 'sync_ref_model'))}: dpo.sync_ref_model moves a second model: set reference: full"
    if recipe.dpo and recipe.dpo.model_extra.get("sync_ref_model") and recipe.checkpoint.is_on:
        yield (
            f"{source.place(('dpo', 'sync_ref_model'))}: dpo.sync_ref_model moves a second model, which step checkpoints do "
            "not hold: set checkpoint.save_every_minutes: null and no checkpoint.save_steps"
        )


def _check_methods(recipe: Recipe, objective: Objective, source: _Source) -> Iterable[str]:
    """Methods that would have no effect without earlier tasks."""
    for name in recipe.method.names:
        if name in SEQUENCE_METHODS and objective != "continual":
            yield (
                f"{source.place(('method', name))}: method.{name} defends earlier tasks, and `hft {objective}` has none: "
                "use `hft continual`, or drop it"
            )


def _check_fit(recipe: Recipe, source: _Source) -> Iterable[str]:
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
