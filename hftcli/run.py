"""A run on disk: every path and file name of it, and what the files hold, in one place.

    runs/<name>/            Run
      recipe.yaml             the recipe, resolved
      manifest.json           Manifest: what a stranger needs to repeat the run
      forgetting.json         ForgettingMatrix: scores after every round of a continual run
      job.sh                  the batch script of `--slurm`
      report.html             the run on one page
      rounds/00-sft/          Round
        round.json              RoundSpec: everything the worker needs, written by the runner
        freeze_plan.json        FreezePlan: which parameters train
        progress.json           Progress: where the worker is
        metrics.jsonl           a row per logging step, with the trainer's own keys
        worker.log              all that the processes print
        checkpoint/             a plain Hugging Face folder, or a delta: what changed, and delta.json (DeltaRecord)
        adapter/                the low-rank adapters, in PEFT's form, where a method trains them
        method/                 what a method leaves to the rounds that follow
        checksums.json          Checksums: size and sha256 of the checkpoint's files
        steps/40/               a step checkpoint: what a stopped round goes on from; gone when the round is done
          step.json               StepManifest: written last
        stop                    there while the front asks its ranks to stop
        scores.json             Scores: the round's tasks before and after
        predictions/            a Prediction per question and line: before/trace--FOMC.jsonl, after/trace--FOMC.jsonl
        failure.json            Failure: why the worker stopped, if it did
        result.json             RoundResult: written last; it means done

Files are written under a temporary name and renamed, so that a reader never meets half of one.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from hftcli.errors import InputError
from hftcli.freezing.activations import LossKernel
from hftcli.freezing.budget import ReferenceMode
from hftcli.freezing.selection import FreezePlan, FreezeRule
from hftcli.recipe import (
    CheckpointSection,
    DataSection,
    DpoSection,
    LaunchSection,
    MethodSection,
    ModelSection,
    Objective,
    Recipe,
    Section,
    TrainSection,
    dump_recipe,
)
from hftcli.seals import FileSeal, find_damage
from hftcli.tasks.check import SequenceReport

Model = TypeVar("Model", bound=BaseModel)
Moment = Literal["before", "after"]  # of a round

DELTA_NAME = "delta.json"  # its presence tells a delta checkpoint from a full one
MERGE_NAME = "merge.json"
HELD_OUT = "held-out rows"  # among the tasks of `Scores`, by likelihood alone
# How the names begin that a run's folder may hold while it is claimed, those of files being written among them.
CLAIM_NAMES = (".lock", ".holder", "..holder.", ".recipe.yaml.", ".manifest.json.")


class EarlierRound(Section):
    """What a method may need of a round before."""

    task: str
    """What it trained on."""
    folder: str
    """Where it is."""


class Scoring(Section):
    """What a round measures of a model's answers."""

    before: tuple[str, ...] = ()
    """Tasks scored before the round."""
    after: tuple[str, ...] = ()
    """Tasks scored after it."""
    likelihood: tuple[str, ...] = ()
    """Tasks of which only the likelihood of the answers is measured after it."""
    max_examples: int | None = None
    """The first so many questions of each task; null asks all."""
    temperature: float = 0.0
    """Temperature at which answers are drawn; 0 takes the likeliest token at every place."""


class RoundSpec(Section):
    """One training pass: one objective, one dataset, one starting checkpoint, one freeze rule."""

    objective: Objective
    """What is optimized."""
    index: int
    """Place of the round in the history of the model, from 0: every round draws another half."""
    model: ModelSection
    """The start; `path` is a folder or a hub id."""
    data: DataSection
    """The rows to train on."""
    freeze: FreezeRule
    """How the half is drawn."""
    train: TrainSection
    """The trainer's settings."""
    launch: LaunchSection
    """Processes and sharding, `num_processes` and `num_nodes` resolved."""
    checkpoint: CheckpointSection = CheckpointSection()
    """How the outcome is kept, and when step checkpoints are written."""
    scoring: Scoring = Scoring()
    """Tasks to score before and after."""
    task: str | None = None
    """The task whose training rows are the data, under `data.root`; null where `data.path` names the rows."""
    method: MethodSection = MethodSection()
    """How old knowledge is defended besides freezing."""
    earlier: tuple[EarlierRound, ...] = ()
    """The rounds of the same run before this one, in order."""
    dpo: DpoSection | None = None
    """Settings of preference optimization; null with another objective."""
    reference: ReferenceMode | None = None
    """Where the reference of preference optimization comes from; null with another objective."""
    held_out: DataSection | None = None
    """Held-out rows, or preference pairs, to measure on before and after; null measures none."""

    @property
    def num_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step and process.

        Raises:
            InputError: the global batch does not divide.
        """
        if self.train.fit == "auto" and self.train.global_batch_size % self.launch.num_ranks == 0:
            return self.train.global_batch_size // self.launch.num_ranks  # the most: the worker chooses the micro-batch
        batch = self.train.per_device_train_batch_size * self.launch.num_ranks
        if self.train.global_batch_size % batch:
            raise InputError(
                f"train.global_batch_size is {self.train.global_batch_size}, not a multiple of "
                f"train.per_device_train_batch_size x processes = {self.train.per_device_train_batch_size} x "
                f"{self.launch.num_ranks} = {batch}",
                "change one of the three so that it divides",
            )
        return self.train.global_batch_size // batch


class Progress(Section):
    phase: Literal["starting", "tokenizing", "loading", "scoring", "referencing", "training", "saving", "verifying"]
    """What the worker does now."""
    done: int = 0
    """Units of the phase that are done: steps, rows, batches."""
    total: int = 0
    """Units of the phase in all; 0 where it is not known."""
    loss: float | None = None
    """Last training loss."""


class Failure(Section):
    message: str
    """What went wrong and where."""
    fix: str = ""
    """What to do about it."""
    exit_code: int
    """The exit code that the front ends with."""
    traceback: str = ""
    """Where in the code, for `--traceback`."""


class Verification(Section):
    """What a comparison of a round's checkpoint with its start found, tensor by tensor, byte by byte."""

    num_frozen: int
    """Frozen parameters compared."""
    num_trained: int
    """Trained parameters compared."""
    violations: tuple[str, ...]
    """Frozen parameters whose bytes differ: must be none."""
    unmoved: tuple[str, ...]
    """Trained parameters whose bytes are the same: must be none."""
    below_resolution: tuple[str, ...] = ()
    """Trained parameters that moved in float32 by less than the checkpoint's data type can hold."""
    damaged: tuple[str, ...] = ()
    """Files of the checkpoint that are not what the round wrote, and how: must be none."""

    @property
    def passed(self) -> bool:
        return not self.violations and not self.unmoved and not self.damaged


class Score(Section):
    """What a model scores on one task."""

    score: float | None
    """By the task's own metric, in [0, 1]; null where only the likelihood was measured."""
    lenient: float | None
    """By a metric that overlooks the form of the answer, in [0, 1]; null where there is none."""
    nll: float | None
    """Negative log-likelihood of the answers, nats per token; null where another program scored the task."""
    num_examples: int
    """Questions asked."""
    others: dict[str, float] = Field(default_factory=dict)
    """By further metrics of the task, by name. Of multiple choice, the accuracy when the choices are compared by log-likelihood
    per character (`acc_norm`) and by how much the question raises it (`acc_content`)."""


class Prediction(Section):
    """What became of one question of a task."""

    index: int
    """Its place in the task, from 0."""
    prediction: str | None
    """What the model answered; of multiple choice, the likeliest choice; null where the answer is only judged by likelihood."""
    score: float | None
    """By the task's own metric, in [0, 1]; null where only the likelihood was measured."""
    lenient: float | None
    """By a metric that overlooks the form of the answer, in [0, 1]; null where nothing is generated."""
    nll: float | None
    """Negative log-likelihood of the right answer, nats per token; null where another program scored the task."""
    num_tokens: int | None
    """Tokens of the right answer, its end included where it is learned with one; null where `nll` is."""
    others: dict[str, float] = Field(default_factory=dict)
    """By further metrics of the task, by name."""
    log_likelihoods: tuple[float, ...] | None = None
    """Of each choice, or of each right answer where there are several, in nats; null for tasks that have neither."""
    bare_log_likelihoods: tuple[float, ...] | None = None
    """Of each choice after a prompt that asks nothing, in nats; null where there are no choices."""

    @property
    def num_choices(self) -> int | None:
        """Choices of the question; None where there are none."""
        return None if self.bare_log_likelihoods is None else len(self.bare_log_likelihoods)


class PairScore(Section):
    """What a model makes of preference pairs, beside the reference: the model as it was before the round."""

    reward_accuracy: float
    """Share of pairs whose chosen answer has the higher implicit reward, beta (log p - log p of the reference), in [0, 1];
    equal rewards count one half, so that the reference itself has 0.5."""
    reward_accuracy_error: float
    """Standard error of `reward_accuracy` over the pairs."""
    reward_margin: float
    """Mean reward of the chosen answer over the rejected one."""
    likelihood_accuracy: float
    """Share of pairs whose chosen answer is the likelier one as a whole, with no reference."""
    kl: float
    """KL(reference || model), nats per answer token, estimated from tokens that the reference draws at every place."""
    num_pairs: int
    """Pairs measured."""


class PairScores(Section):
    before: PairScore
    """Before the round, where the model is the reference."""
    after: PairScore
    """After it."""


class ReferenceReport(Section):
    """What the reference of preference optimization was."""

    mode: ReferenceMode
    """Where it came from."""
    key: str | None
    """Name of the precomputed log-probabilities in the cache: a hash of the start's weights, the tokens, the precision and the
    options; null with another mode."""
    is_reused: bool
    """Whether they were there already."""
    num_bytes: int
    """Bytes that the reference takes on rank 0 while training."""


class Scores(Section):
    before: dict[str, Score]
    """Score on each task before the round."""
    after: dict[str, Score] | None = None
    """Score on each task after it; null until it is trained."""


class Source(Section):
    """Where rows came from."""

    path: str
    """The file, the hub id, or the task."""
    fingerprint: str
    """sha256 of the file's bytes or the task's examples; of a hub dataset, the fingerprint that `datasets` gives it."""
    num_bytes: int | None
    """Size of the file; null for a hub dataset and a task."""


class DataReport(Section):
    """What became of the rows."""

    format: str
    """Format of the rows, as detected."""
    num_rows: int
    """Rows read."""
    num_used: int
    """Rows trained on."""
    num_dropped: int
    """Rows left out because the cut to `data.max_length` took all of their trained tokens; of a task, those that do not fit
    without their body either."""
    num_truncated: int
    """Rows trained on without their end, which the cut took; of a task, without a part of their body."""
    num_identical: int = 0
    """Preference pairs whose answers the cut made the same."""
    num_sequences: int
    """Sequences: rows, or packs of rows."""
    num_tokens: int
    """Tokens in all sequences."""
    num_trained_tokens: int
    """Tokens that count in the loss."""
    length_percentiles: dict[str, int]
    """Tokens of a row before the cut: `p50`, `p90`, `p99`, `max`."""
    sources: tuple[Source, ...]
    """Where the rows came from."""
    key: str
    """Name of the entry in the cache: a hash of all that shapes the tokens."""


class Hardware(Section):
    device: str
    """The GPU's name, or the processor's."""
    num_processes: int
    """Ranks of the round."""
    num_cores: int
    """Processor cores of the machine."""
    num_threads: int
    """Threads of each rank."""
    memory_bytes: int
    """Memory of the machine."""


class FitReport(Section):
    """What `train.fit: auto` chose."""

    per_device_train_batch_size: int
    """Sequences, or pairs, per forward pass of one process."""
    checkpoint_every: int | None
    """Every so many layers keep their input alone and are computed again; 1 is all of them, null none."""
    loss_kernel: LossKernel = "chunked"
    """Whether the logits are kept (`plain`) or computed again."""
    needed_bytes: int
    """What the budget says that this takes on one device, with all that it counts as possible."""
    memory_bytes: int
    """What there is."""


class StepSaves(Section):
    """What the step checkpoints of one start cost."""

    num_saves: int = 0
    """Step checkpoints written."""
    seconds: float = 0.0
    """Wall-clock seconds for which training stood still for them, in all."""
    num_bytes: int = 0
    """Size of the last one."""


class RoundResult(Section):
    """What a finished round leaves to the next one and to the report."""

    fingerprint: str
    """Of the freeze plan."""
    rank_fingerprints: tuple[str, ...]
    """The plan's fingerprint as each rank computed it."""
    precision: Literal["float32", "bfloat16"]
    """What the round computed in; bfloat16 only where `train.bf16` asks for it and the device has it."""
    loss_kernel: LossKernel = "chunked"
    """Whether the logits were kept (`plain`) or computed again."""
    num_steps: int
    """Optimizer steps taken."""
    train_loss: float
    """Mean training loss over the round."""
    num_tokens: int
    """Tokens seen in training, over all ranks."""
    seconds: dict[str, float]
    """Wall-clock seconds of each phase, in the start that finished the round."""
    resumed_from: int | None = None
    """Step of the checkpoint that this start went on from; null where it began the round."""
    step_saves: StepSaves = StepSaves()
    """Step checkpoints that this start wrote, their size, and how long they held training up."""
    peak_memory_bytes: int
    """Peak memory of rank 0: of the GPU's allocator, or the process's resident set where there is none."""
    gradient_bytes: int
    """Bytes of gradients on rank 0 in a step; 0 where DeepSpeed keeps them to itself."""
    optimizer_bytes: int
    """Bytes of optimizer state on rank 0."""
    updates: dict[str, float]
    """Largest absolute change of each trained parameter, in float32."""
    verification: Verification
    """Frozen parts identical, trained parts moved."""
    data: DataReport
    """What the data were: format, counts, hashes."""
    reference: ReferenceReport | None = None
    """What the reference of preference optimization was; null with another objective."""
    pairs: PairScores | None = None
    """Held-out preference pairs before and after; null where there are none."""
    fit: FitReport | None = None
    """What `train.fit: auto` chose; null where it is off."""
    hardware: Hardware
    """What the worker ran on."""


class CheckpointIdentity(Section):
    """Which checkpoint it was, to the byte."""

    path: str
    """Its folder, where it was seen."""
    files: dict[str, str]
    """SHA-256 of its config, of its weight files, and of delta.json where it is a delta itself."""


class DeltaRecord(Section):
    """What a delta checkpoint lacks, and where that is."""

    version: Literal[1] = 1
    """Version of this form."""
    base: CheckpointIdentity
    """The round's start, which holds all that this checkpoint does not; may be a delta itself."""
    fingerprint: str
    """Of the round's freeze plan."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Data type of the checkpoint; what comes from the base is rounded to it."""
    tensors: tuple[str, ...]
    """Names of the parameters stored here: those whose bytes are not the base's, frozen ones too."""
    rows: tuple[str, ...] = ()
    """Names of those of which only the rows that are not the base's are stored."""


class MergeManifest(Section):
    """How a model was made out of the weights of others."""

    kind: Literal["delta", "interpolation", "reset"]
    """A delta laid over its base, the mean of two models, or a tuned model with one half back at its base."""
    command: tuple[str, ...]
    """The command line."""
    created: str
    """UTC time."""
    version: str
    """Version of hft."""
    inputs: dict[str, CheckpointIdentity]
    """What it was made of: `base`, and `delta` or `tuned`."""
    weight: float | None = None
    """Of an interpolation: the share A of the tuned model in (1 - A) base + A tuned, in [0, 1]."""
    plan: FreezePlan | None = None
    """Of a reset: the frozen parameters are back at the base, the trained ones are the tuned model's."""
    files: dict[str, str]
    """SHA-256 of the config and the weight files that were written."""


class Checksums(Section):
    """What a checkpoint's files were when they were written."""

    files: dict[str, FileSeal]
    """Size and hash of each."""


class StepManifest(Section):
    """A step checkpoint: what it holds, and what it may be resumed with. Written last; a folder without it is no checkpoint."""

    step: int
    """Optimizer steps taken."""
    spec: RoundSpec
    """The round."""
    fingerprint: str
    """Of the freeze plan: an optimizer restores its state by position, so another half would be corrupted without a word."""
    data_key: str
    """Of the tokens trained on, the round's own and those that methods add."""
    start_key: str
    """Hash of the start's weights, of which the frozen half is not stored again."""
    files: dict[str, FileSeal]
    """Size and hash of every other file."""
    digest: str = ""
    """Hash of this file, with this field empty."""


class Manifest(Section):
    """What a stranger needs to repeat the run."""

    command: tuple[str, ...]
    """The command line."""
    created: str
    """UTC time of the first start."""
    versions: dict[str, str]
    """Installed versions of what computes."""
    python: str
    """Python's version."""
    platform: str
    """Operating system and machine."""
    parent: str | None
    """Folder of the run that this one starts from."""
    sequence: SequenceReport | None = None
    """What the data of a sequence of tasks are; null without one."""
    rounds: dict[str, RoundResult] = Field(default_factory=dict)
    """Results of the finished rounds, by name."""


@dataclass(frozen=True)
class Round:
    """One round's folder."""

    folder: Path

    spec_path = property(lambda self: self.folder / "round.json")
    plan_path = property(lambda self: self.folder / "freeze_plan.json")
    progress_path = property(lambda self: self.folder / "progress.json")
    metrics_path = property(lambda self: self.folder / "metrics.jsonl")
    log_path = property(lambda self: self.folder / "worker.log")
    checkpoint = property(lambda self: self.folder / "checkpoint")
    adapter = property(lambda self: self.folder / "adapter")
    fisher_path = property(lambda self: self.folder / "method" / "ewc.safetensors")
    checksums_path = property(lambda self: self.folder / "checksums.json")
    steps = property(lambda self: self.folder / "steps")
    stop_path = property(lambda self: self.folder / "stop")
    lock_path = property(lambda self: self.folder / ".ranks.lock")  # held by every rank while it lives
    scores_path = property(lambda self: self.folder / "scores.json")
    predictions = property(lambda self: self.folder / "predictions")
    failure_path = property(lambda self: self.folder / "failure.json")
    result_path = property(lambda self: self.folder / "result.json")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def saved_steps(self) -> list[int]:
        """Steps with a checkpoint, the last one first."""
        if not self.steps.is_dir():
            return []
        return sorted((int(path.name) for path in self.steps.iterdir() if path.name.isdigit()), reverse=True)

    def describe_kept(self) -> str:
        """What a stop of this round leaves, for a message."""
        if steps := self.saved_steps:
            return f"{self.name} goes on from its checkpoint at step {steps[0]}; finished rounds are untouched"
        return f"{self.name} has no step checkpoint yet and starts again; finished rounds are untouched"

    def read_spec(self) -> RoundSpec:
        return read_model(self.spec_path, RoundSpec)

    def read_plan(self) -> FreezePlan:
        return read_model(self.plan_path, FreezePlan)

    def read_result(self) -> RoundResult | None:
        """The result, or None while the round is not done."""
        return read_model(self.result_path, RoundResult) if self.result_path.exists() else None

    def read_scores(self) -> Scores | None:
        return read_model(self.scores_path, Scores) if self.scores_path.exists() else None

    def predictions_path(self, moment: Moment, task: str) -> Path:
        return self.predictions / moment / f"{task.replace('/', '--')}.jsonl"

    def write_predictions(self, moment: Moment, task: str, predictions: Sequence[Prediction]) -> None:
        path = self.predictions_path(moment, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(prediction.model_dump_json() + "\n" for prediction in predictions))

    def read_predictions(self, moment: Moment, task: str) -> list[Prediction]:
        """Raises: FileNotFoundError: the task was not scored at that moment."""
        lines = self.predictions_path(moment, task).read_text(encoding="utf-8").splitlines()
        return [Prediction.model_validate_json(line) for line in lines]

    def read_metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    recipe_path = property(lambda self: self.folder / "recipe.yaml")
    manifest_path = property(lambda self: self.folder / "manifest.json")
    matrix_path = property(lambda self: self.folder / "forgetting.json")
    page_path = property(lambda self: self.folder / "report.html")
    figures = property(lambda self: self.folder / "figures")
    script_path = property(lambda self: self.folder / "job.sh")
    holder_path = property(lambda self: self.folder / ".holder")

    @cached_property
    def lock(self) -> FileLock:
        """Held from `claim` for as long as this object lives, or the process."""
        return FileLock(self.folder / ".lock")

    @property
    def rounds(self) -> list[Round]:
        """The rounds that were started, in order."""
        return [Round(path.parent) for path in sorted(self.folder.glob("rounds/*/round.json"))]

    @property
    def last_finished(self) -> Round | None:
        return next((round_ for round_ in reversed(self.rounds) if round_.result_path.exists()), None)

    def read_manifest(self) -> Manifest:
        return read_model(self.manifest_path, Manifest)

    def round(self, name: str) -> Round:
        return Round(self.folder / "rounds" / name)

    def claim(self, recipe: Recipe, launch: LaunchSection, manifest: Manifest) -> None:
        """Make the folder this recipe's run, or find that it already is, and hold it.

        A run of another recipe that has trained anything is never written over.

        Args:
            launch: the recipe's, resolved.

        Raises:
            InputError: the folder holds something else, or another `hft` is at work in it.
        """
        text = dump_recipe(recipe)
        held = self.folder.iterdir() if self.folder.exists() and not self.recipe_path.exists() else ()
        if any(not path.name.startswith(CLAIM_NAMES) for path in held):
            raise InputError(f"{self.folder} is not empty and holds no run", "give another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        is_trained = any(round_.metrics_path.exists() or round_.result_path.exists() for round_ in self.rounds)
        held = self.recipe_path.read_text(encoding="utf-8") if self.recipe_path.exists() else ""
        if is_trained and held != text and (differences := self._find_differences(held, text, launch)):
            raise InputError(
                f"{self.folder} holds the run of another recipe (differs in {', '.join(differences)})",
                "give another --output, or remove the folder",
            )
        if held != text:
            write_text(self.recipe_path, text)
        if not self.manifest_path.exists() or (held != text and not is_trained):
            write_model(self.manifest_path, manifest)

    def _find_differences(self, held: str, text: str, launch: LaunchSection) -> list[str]:
        """What of two recipes gives another result; of `launch` that is only how it splits the work."""
        import yaml

        keys = find_differences(yaml.safe_load(held), yaml.safe_load(text))
        # The output is this folder, by whatever name.
        differences = [key for key in keys if key != "output" and not key.startswith("launch.")]
        return differences + find_differences(self.rounds[0].read_spec().launch.split, launch.split)

    def _hold(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            holder = self.holder_path.read_text(encoding="utf-8") if self.holder_path.exists() else "unknown"
            raise InputError(
                f"{self.folder} is in use by another hft, process {holder}", "wait for it or stop it, or give another --output"
            ) from None
        write_text(self.holder_path, f"{os.getpid()} on {socket.gethostname()}")

    def record(self, round_: Round, result: RoundResult) -> None:
        """Take a finished round into the manifest."""
        manifest = self.read_manifest()
        rounds = {**manifest.rounds, round_.name: result}
        write_model(self.manifest_path, manifest.model_copy(update={"rounds": rounds}))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_model(path: Path, model: BaseModel) -> None:
    write_text(path, model.model_dump_json(indent=2) + "\n")


def read_model(path: Path, kind: type[Model]) -> Model:
    """Read one of the files above.

    Raises:
        InputError: the file is missing, damaged or of another version.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValidationError, UnicodeDecodeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{path} is damaged or of another version of hft: {reason}") from None


def find_checkpoint_damage(checkpoint: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, a line for each; of one that no round of hft wrote, nothing is known."""
    round_ = Round(checkpoint.parent)
    if checkpoint.name != round_.checkpoint.name or not round_.checksums_path.exists():
        return []
    return find_damage(checkpoint, read_model(round_.checksums_path, Checksums).files)


def find_differences(held: Any, given: Any) -> list[str]:
    """Keys whose values differ between two nested mappings, with dots."""

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}".lstrip(".")).items()}

    old, new = flatten(held), flatten(given)
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def find_rounds(path: Path) -> list[Round]:
    """The finished rounds that a path means: a round's folder, or a run's.

    Raises:
        InputError: neither, or none is finished.
    """
    if Round(path).spec_path.exists():
        rounds = [Round(path)]
    elif Run(path).recipe_path.exists():
        rounds = Run(path).rounds
    else:
        raise InputError(f"{path} is neither a run nor a round", "give a folder with a recipe.yaml or a round.json")
    finished = [round_ for round_ in rounds if round_.result_path.exists()]
    if not finished:
        raise InputError(f"{path} has no finished round", "run its recipe again: it goes on where it stopped")
    return finished
