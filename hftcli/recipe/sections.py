"""The sections of a recipe: model, data, train, dpo, launch, checkpoint, eval, continual."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from hftcli.freezing.activations import LossKernel
from hftcli.recipe.pattern import PatternSection
from hftcli.recipe.section import HomePath, Section
from hftcli.recipe.slurm import SlurmSection
from hftcli.recipe.trainer_keys import Seed

QUICK_START = "tinyworld"  # the model and data that ship with the package
SpecialTokenPolicy = Literal["keep", "escape", "refuse"]
ROW_KEYS = ("bad_rows", "special_tokens_in_text", "ignore_columns")  # of `data`: what holds for rows of other places too

# transformers' names, but for those that follow an evaluation within the training.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


class ModelSection(Section):
    """The start: which model, and how it is loaded."""

    path: HomePath
    """A folder with a Hugging Face checkpoint, the folder of a finished run, a hub id, or `tinyworld`."""

    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes the newest when the run begins."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type that the start's weights are converted to, once, and in which the checkpoint is written; null keeps that of
    each tensor. What trains has float32 masters in any case."""

    chat_template: HomePath | None = None
    """A Jinja file, or one that ships with hft (`chatml`, `tulu`); null takes the tokenizer's own. Saved with the model.
    One that prints today's date prints 26 July 2024 on every day, so that the same rows are trained and asked tomorrow."""

    attn_implementation: str | None = None
    """Attention kernel, as transformers names it; null lets transformers choose, which is `sdpa`. Packed rows on a GPU are
    faster with one that knows where a document ends: `flash_attention_2`, or `flex_attention`, which ships with torch."""

    @property
    def place(self) -> str:
        """The path, with the revision behind it."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


class SourceSection(Section):
    """One of several places that rows come from."""

    path: HomePath
    """As `data.path`."""

    name: str | None = None
    """Configuration of a hub dataset."""

    split: str = "train"
    """As `data.split`."""

    revision: str | None = None
    """As `data.revision`."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the mixture's rows, beside the weights of the other sources: all of them have one, or none. As many rows are
    drawn as the shares allow without a row standing twice, each source's at random, by `data.seed`; a text longer than
    `data.max_length` counts as its pieces. Null takes all rows."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows, and no more than `data.max_examples`; null uses all."""


class DataSection(Section):
    """Where rows come from and what becomes of them. A list in place of the section is one of `sources`."""

    path: HomePath | None = None
    """A file (JSON, JSONL, CSV or TSV, each also as .gz, .bz2 or .zst, Parquet, Arrow), a folder of them, one that `datasets`
    saved, a snapshot of a hub dataset, a hub id, or `tinyworld/skill`."""

    sources: tuple[SourceSection, ...] = ()
    """Several places instead of `path`, whose rows are mixed: each with `path`, and where needed `name`, `split`, `revision`,
    `weight` and `max_examples`. Each may have a format of its own."""

    root: HomePath | None = None
    """The folder with one folder for each task, `<task>/{train,eval,test}.json`: of the tasks to learn one after another, and
    of those under `eval.tasks`, `freeze.keep` and `freeze.importance`; tinyworld needs none."""

    name: str | None = None
    """Configuration of a hub dataset."""

    split: str = "train"
    """Split of a hub dataset, or of a folder with files for several."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; null takes the newest."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens in one sequence. Longer rows are cut at the end; rows that lose every trained token are dropped and counted. With
    DPO, a prompt with one of its answers is a sequence. Rows of the format `text` are not cut but divided."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows, of each task or source, and read no further; null uses all."""

    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What becomes of rows that cannot be trained on: `refuse` counts them and names the first ten; `drop` leaves them out."""

    special_tokens_in_text: SpecialTokenPolicy = "keep"
    """What becomes of a special token, such as the one that ends a turn, that is written out in a row's text: `keep` makes it
    that token, and so a border, which is counted and said; `escape` makes it plain text, as a user's text should be; `refuse`
    makes it a bad row. In a task's question that is trained on or kept, and in a held-out one, the last two refuse it."""

    ignore_columns: tuple[str, ...] = ()
    """Columns, or keys of a message, that are left out whatever they mean, such as `images`."""

    pattern: PatternSection | None = None
    """Rows with a label become questions with an answer, in plain text; `eval.held_out` then is multiple choice between the
    words of all labels. Null takes rows of a known format."""

    seed: Seed = 42
    """Which rows of a source with a `weight` are drawn, and the order in which sources are mixed."""

    drop_identical: bool = False
    """DPO: drop the pairs whose answers the cut to `data.max_length` makes the same. Otherwise they are counted, warned of, and
    kept: they teach nothing."""

    @model_validator(mode="before")
    @classmethod
    def _take_list(cls, value: Any) -> Any:
        return {"sources": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_sources(self) -> "DataSection":
        """What a source says for itself cannot be said for all."""
        if not self.sources:
            return self
        fields = type(self).model_fields
        for key in ("path", "name", "split", "revision"):
            if getattr(self, key) != fields[key].default:
                raise PydanticCustomError("two_places", f"{key} and sources are both given: write it into one of the sources")
        num_weighted = sum(source.weight is not None for source in self.sources)
        if num_weighted not in (0, len(self.sources)):
            raise PydanticCustomError("weights", "give every one of the sources a weight, or none")
        return self

    def relocate(self, move: Callable[[str], str]) -> "DataSection":
        """The same rows at the places that `move` gives for their paths."""
        sources = tuple(source.model_copy(update={"path": move(source.path)}) for source in self.sources)
        moved = {"path": self.path and move(self.path), "root": self.root and move(self.root)}
        return self.model_copy(update={**moved, "sources": sources})

    @property
    def parts(self) -> tuple[SourceSection, ...]:
        """The sources, or the only one."""
        if not self.sources:
            places = {"path": self.path, "name": self.name, "split": self.split, "revision": self.revision}
            return (SourceSection(**places, max_examples=self.max_examples),)
        if self.max_examples is None:
            return self.sources
        limits = [min(source.max_examples or self.max_examples, self.max_examples) for source in self.sources]
        pairs = zip(self.sources, limits, strict=True)
        return tuple(source.model_copy(update={"max_examples": limit}) for source, limit in pairs)


def _refuse_no_steps(value: int) -> int:
    if value == 0 or value < -1:
        raise PydanticCustomError("no_steps", "give the number of steps, or -1 for as many as train.num_train_epochs makes")
    return value


def _refuse_feedback(value: Any) -> Any:
    """These schedules follow a loss on other rows, which hft does not measure while it trains."""
    if value in ("reduce_lr_on_plateau", "greedy"):
        raise PydanticCustomError(
            "feedback", f"{value} follows an evaluation within the training, and hft evaluates before and after it"
        )
    return value


class OpenSection(Section):
    """A section that takes more than the fields it names: those of a trainer's settings."""

    model_config = ConfigDict(extra="allow")

    @property
    def extra(self) -> dict[str, Any]:
        """What is given besides the fields that are named here."""
        return self.model_extra or {}


class TrainSection(OpenSection):
    """Names are those of transformers' TrainingArguments and TRL's SFTConfig; any other field of theirs may be given too.

    With DPO, those of TRL's DPOConfig are given under `dpo`.
    """

    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data; with `max_steps` there are as many as these take."""

    max_steps: Annotated[int, AfterValidator(_refuse_no_steps)] = -1
    """Optimizer steps; -1 takes as many as `num_train_epochs` makes. Both together are refused, where a 1 in a file counts
    as not given; `--set` of one takes the place of a file's other."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW."""

    lr_scheduler_type: Annotated[Schedule, BeforeValidator(_refuse_feedback)] = "linear"
    """Schedule after warm-up, by transformers' names."""

    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Steps of linear warm-up; below 1, a share of all steps, which never takes the only one."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on what trains only."""

    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences, or pairs, per optimizer step over all processes. Gradient accumulation is derived from it, so that a recipe
    means the same on 1 and on 64 GPUs."""

    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 4
    """Sequences, or pairs, per forward pass of one process, and no more than its share of the global batch; with `fit: auto`,
    the most that it may choose."""

    fit: Literal["auto"] | None = None
    """`auto` chooses what computes least again of what the device's memory carries by the budget of `hft plan`: the activation
    checkpointing (none, every so many layers, all), the loss kernel, and with them the largest micro-batch that divides the
    global batch. Null takes `per_device_train_batch_size` and `activation_checkpointing` as they are given."""

    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """With `fit: auto`: bytes that one device may use; null takes the GPU's memory, and must be given where there is no GPU."""

    packing: bool = False
    """Lay several conversations into one sequence of `data.max_length` tokens; attention never crosses their borders."""

    assistant_only_loss: bool = True
    """Conversations: train on the assistant's turns and their end tokens only. False is refused where no row is one."""

    completion_only_loss: bool = True
    """Prompt and completion: train on the completion and its end token only. False is refused where no row has a prompt of its
    own that it would train."""

    activation_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory, about a third more compute."""

    loss_kernel: LossKernel | None = None
    """`chunked` computes the logits tile by tile, and once more in the backward pass; `plain` keeps those of trained tokens.
    The losses are the same up to rounding. Null is `chunked` on a GPU, and elsewhere `plain`, which is faster there, unless
    the logits of a micro-batch may come to more than a gibibyte."""

    bf16: bool | None = None
    """Compute in bfloat16, with float32 masters for what trains (true), or in float32 (false). Null takes bfloat16 where it is
    faster: on an NVIDIA GPU that has it, or without one on a processor with matrix units for it (AMX). True acts everywhere,
    and elsewhere takes longer: on a processor with AVX-512 alone, float32 took 0.67 of its time."""

    seed: Seed = 42
    """Order of the data, dropout. The halves have a seed of their own, `freeze.seed`."""

    logging_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between rows of metrics.jsonl."""


class DpoSection(OpenSection):
    """Names are those of TRL's DPOConfig; any other field of it may be given too."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held to the reference: the reward of an answer is beta times the logarithm of how much likelier
    the model finds it than the reference does."""

    loss_type: LossType | Annotated[tuple[LossType, ...], Field(min_length=1)] = "sigmoid"
    """The loss on a pair's rewards, or several that are added; `sigmoid` is that of the DPO paper (arXiv 2305.18290, equation
    7). `aot` and `aot_unpaired` sort within a micro-batch: `train.per_device_train_batch_size` changes what they are."""

    loss_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """The weight of each of several losses; null weighs each 1."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs whose answers are taken to be the wrong way round; counts for the losses `robust`, `exo_pair`, `aot`
    and `aot_unpaired`."""


class LaunchSection(Section):
    """Where the ranks run, how many they are, and what of the model each holds."""

    num_processes: Annotated[int, Field(ge=1)] | None = None
    """Processes on each machine: one per GPU, or CPU ranks where there is none; null takes the hostfile's slots, or every
    visible GPU, or one process."""

    num_nodes: Annotated[int, Field(ge=1)] | None = None
    """Machines: those that Slurm gives, or on which `torchrun` starts a prepared round by hand; null takes the hostfile's, or
    one."""

    hostfile: HomePath | None = None
    """The machines, in DeepSpeed's format (`host slots=8`), each reached over ssh from this one; null runs on this machine."""

    slurm: SlurmSection | None = None
    """Launch with Slurm's srun. `--slurm` fills it in where it is not given, and writes the batch script."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed's ZeRO stage with two processes or more: 1 shards the optimizer, 2 also gradients, 3 also weights. 0
    shards nothing, and is for float32 only. At every stage, gradients are summed over micro-batches and ranks in float32."""

    offload: Literal["optimizer", "none"] = "none"
    """`optimizer` keeps float32 masters, moments and summed gradients of what trains in host memory, and updates them there, so
    that the device holds the weights and what a micro-batch takes. One process does it by itself, several at `zero_stage` 2 and
    3 by DeepSpeed's means. `hft plan` says what the host then holds, and how long it takes."""

    timeout_minutes: Annotated[float, Field(gt=0)] | None = 60.0
    """Minutes without any progress of the worker after which it counts as hung and is ended; null waits for ever. A download of
    the model does not count."""

    @property
    def shape(self) -> tuple[int, int]:
        """Machines, and processes on each of them, once they are resolved."""
        return self.num_nodes or 1, self.num_processes or 1

    @property
    def num_ranks(self) -> int:
        """Processes on all machines, once they are resolved."""
        return math.prod(self.shape)

    @property
    def is_elsewhere(self) -> bool:
        """Whether ranks may run on other machines, of whose devices this one says nothing."""
        return bool(self.hostfile or self.slurm) or (self.num_nodes or 1) > 1

    @property
    def split(self) -> dict[str, int | str | None]:
        """How a resolved launch splits the work.

        Nothing else of it changes the result: not where the ranks are, nor how they are reached.
        """
        stage = self.zero_stage if self.num_ranks > 1 else None
        found: dict[str, int | str | None] = {
            "launch.num_processes x launch.num_nodes": self.num_ranks, "launch.zero_stage": stage,
        }  # fmt: skip
        return found | ({"launch.offload": self.offload} if self.offload != "none" else {})


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

    best: Literal["learning", "within_budget"] | None = None
    """Which of the steps that are measured within the round (`eval.every_steps`) is kept: `learning`, the one that learned
    most; `within_budget`, the one that learned most of those that forgot no more than `stop.max_forgetting`, as measured, or
    where nothing measures learning the last of them. Null keeps the last step, and with `stop.max_forgetting` is
    `within_budget`. Until the round ends, a copy of what trains is held in host memory."""

    @property
    def is_on(self) -> bool:
        """Whether step checkpoints are written."""
        return self.save_steps is not None or self.save_every_minutes is not None


class ContinualSection(Section):
    """The tasks to learn one after another."""

    tasks: str | tuple[str, ...] = QUICK_START
    """A benchmark (`tinyworld`, `trace`, `standard`), or a list of tasks: folders under `data.root`, or tasks of a benchmark
    such as `trace/FOMC`."""

    order: Annotated[str, Field(coerce_numbers_to_str=True)] | None = None
    """Which of the benchmark's orders; null takes its first, or that of the list."""

    protocol: Literal["paper", "scripts"] | None = None
    """Whose epochs for each task and whose decoding: those of the benchmark's paper, or of its scripts where they differ. Null
    takes `train.num_train_epochs` for each task, and the likeliest token at every place. To give `train.num_train_epochs` or
    `train.max_steps` beside it is refused, where a 1 in a file counts as not given."""
