"""What the files of a run hold once there is something to tell: data, results, checkpoints, the manifest."""

from typing import Literal

from pydantic import Field

from hftcli.freezing.activations import LossKernel
from hftcli.freezing.budget import ReferenceMode
from hftcli.recipe.section import FileSection, Section, Version
from hftcli.runs.earlier import EarlierInputs
from hftcli.runs.masters import MastersReport, MastersState
from hftcli.runs.scores import PairScores
from hftcli.runs.seals import FileSeal
from hftcli.runs.spec import RoundSpec
from hftcli.runs.verification import Verification
from hftcli.tasks.check import SequenceReport

Precision = Literal["float32", "bfloat16"]


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


class Source(Section):
    """Where rows came from, and what became of them."""

    path: str
    """The file, the folder, the hub id, or the task."""
    files: tuple[str, ...] = ()
    """Of a folder with several files that are read: which ones, within it."""
    fingerprint: str
    """sha256 of the file's bytes, of those of several files, or of the task's examples; of a hub dataset, sha256 of its rows,
    or where `max_examples` streams it, of what the hub says that it is."""
    num_bytes: int | None
    """Size of the files; null for a hub dataset and a task."""
    format: str | None = None
    """Format of the rows, as detected."""
    weight: float | None = None
    """Share of the mixture, beside the weights of the others; null takes all rows."""
    num_rows: int | None = None
    """Rows read."""
    num_used: int | None = None
    """Rows with trained tokens."""
    num_sequences: int | None = None
    """Sequences, or pairs, that are trained on, before they are packed: in a mixture by weights those that were drawn."""
    num_tokens: int | None = None
    """Tokens in them."""
    num_trained_tokens: int | None = None
    """Tokens in them that count in the loss."""

    @property
    def is_divided(self) -> bool:
        """Whether a row may be several sequences: a text, which is divided at `data.max_length`."""
        return self.format == "text"


class DataReport(Section):
    """What became of the rows."""

    format: str
    """Format of the rows, as detected; several for a mixture of several."""
    num_rows: int
    """Rows read."""
    num_used: int
    """Rows trained on; of a mixture by weights, those that its rows are drawn from."""
    num_dropped: int
    """Rows left out because the cut to `data.max_length` took all of their trained tokens, or with `data.drop_identical` the
    difference between two answers; of a task, those that do not fit without their body either."""
    num_truncated: int
    """Rows trained on without their end, which the cut took; of a task, without a part of their body."""
    num_identical: int = 0
    """Preference pairs whose answers the cut made the same."""
    num_bad: int = 0
    """Rows left out by `data.bad_rows: drop` because they cannot be trained on as they stand."""
    bad_rows: tuple[str, ...] = ()
    """The first ten of them, and what is wrong with each."""
    doubled: dict[str, int] = Field(default_factory=dict)
    """Rows that brought what stands there anyway, and lost it, so that there is one: `beginning`, the beginning token; `end`,
    the end token of a turn or text; `prompt`, the prompt before both answers of a pair."""
    num_held_out: int = 0
    """Sequences, or pairs, of the rows under `eval.held_out`: without those that the cut to `data.max_length` leaves out, and
    as many of a longer text as it falls into; 0 where the rows' answers are asked for, as with `data.pattern`."""
    num_held_out_in_train: int = 0
    """Those of them that are also trained on, token for token."""
    num_asked_in_named: int = 0
    """Questions that are asked of tasks whose test rows `freeze.keep` or `freeze.importance` names."""
    num_special: int = 0
    """Rows in whose text special tokens are written out."""
    special_tokens: dict[str, int] = Field(default_factory=dict)
    """The rows for each of these tokens."""
    unused_columns: tuple[str, ...] = ()
    """Columns, and keys of messages (`messages[].id`), of which no use is made; in a mixture after the source's path."""
    num_sequences: int
    """Sequences: rows, or packs of rows."""
    num_tokens: int
    """Tokens in all sequences."""
    num_trained_tokens: int
    """Tokens that count in the loss."""
    max_token_id: int = 0
    """The largest token id, for which the model must have an embedding."""
    length_percentiles: dict[str, int]
    """Tokens of a row before the cut: `p50`, `p90`, `p99`, `max`."""
    sources: tuple[Source, ...]
    """Where the rows came from."""

    @property
    def mixed(self) -> str:
        """Of a mixture by weights, how many rows were drawn, or where texts fall into pieces sequences; otherwise nothing."""
        if all(source.weight is None for source in self.sources):
            return ""
        num_drawn = sum(source.num_sequences or 0 for source in self.sources)
        is_divided = any(source.is_divided for source in self.sources)
        return f", {num_drawn:,} sequences drawn from them" if is_divided else f", {num_drawn:,} of them drawn"

    key: str
    """Name of the entry in the cache: a hash of all that shapes the tokens, hft's own code among it."""
    tokens_digest: str = ""
    """Hash of the tokens themselves, whatever code made them; empty where it was not kept."""


class Hardware(Section):
    """What a round ran on, as rank 0 saw it."""

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


class Outlook(FileSection):
    """What a round is going to do, known before it has weights."""

    version: Version = 2
    """Version of the file's form. The first has no `masters`."""
    data: DataReport
    """What became of the rows."""
    num_sequences: int
    """Sequences, or pairs, that are gone through in an epoch, those that methods add among them."""
    num_steps: int
    """Optimizer steps."""
    num_warmup_steps: int
    """Steps of them in which the learning rate rises."""
    is_warmup_dropped: bool
    """Whether the warm-up would have taken the only step, so that there is none."""
    num_trainable: int
    """Weights that train."""
    num_parameters: int
    """Weights of the model."""
    fingerprint: str
    """The freeze plan's."""
    num_adapter_weights: int = 0
    """Weights of adapters, which then train in their place; 0 where there are none."""
    memory_bytes: int
    """What a device is expected to hold, by the budget of `hft plan`."""
    masters: MastersState = "none"
    """Whether the start's float32 masters are beside it, and taken: as `masters.start` of the result."""


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


class AnswerEnds(Section):
    """With which tokens an answer ends: what training settled, and where the checkpoint's generation stops."""

    trained: tuple[str, ...]
    """Tokens with which the trained answers end, the most frequent first; none where no answer was trained to its end, or where
    answers end in plain text."""
    trained_ids: tuple[int, ...]
    """Their ids."""
    added_ids: tuple[int, ...]
    """Those of them at which the start's generation did not stop."""
    eos_token_ids: tuple[int, ...]
    """`eos_token_id` of the checkpoint's generation_config.json: the trained ones and the start's own."""


class AdapterReport(Section):
    """What trained in place of the weights."""

    name: str
    """The method, or PEFT's type."""
    num_weights: int
    """Weights that trained."""
    num_bytes: int
    """Size of the adapter's file."""


class DrawReport(Section):
    """What trained for some steps of a round that redraws it."""

    first_step: int
    """The first of them, from 1."""
    last_step: int
    """The last of them."""
    trained: str
    """Its layers, where these train whole, or how many units; and what stands outside of the layers."""
    num_trainable: int
    """Weights that train."""


class RoundResult(FileSection):
    """What a finished round leaves to the next one and to the report."""

    version: Version = 4
    """Version of the file's form. The first has no `attention`, `host_bytes` and `ends`, and not all of `verification`; the
    first two have no `masters`, the first three no `versions`."""
    fingerprint: str
    """Of the freeze plan."""
    rank_fingerprints: tuple[str, ...]
    """The plan's fingerprint as each rank computed it."""
    precision: Precision
    """What the round computed in: what `train.bf16` asks for, or what it leaves to the device."""
    loss_kernel: LossKernel = "chunked"
    """Whether the logits were kept (`plain`) or computed again."""
    attention: str | None = None
    """The attention kernel, as transformers names it; null in a file of an earlier hft."""
    num_steps: int
    """Optimizer steps taken."""
    stopped_by: Literal["max_forgetting", "min_learning"] | None = None
    """The key of `stop` that ended the round before its last step; null where it came to its end."""
    kept_step: int | None = None
    """The step whose weights were kept, by `checkpoint.best`; null keeps the last."""
    reused_before: tuple[str, ...] = ()
    """Of what was measured before the round, what an earlier round of the same start had measured already: it was taken from
    the cache."""
    train_loss: float
    """Mean training loss over the round."""
    num_tokens: int
    """Tokens seen in training, over all ranks."""
    seconds: dict[str, float]
    """Wall-clock seconds of each phase, in the start that finished the round. `choosing` is what it takes to score units,
    and to take moments of earlier inputs and choose directions or columns by them."""
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
    host_bytes: int = 0
    """Bytes of masters, gradients, moments and copies that hft kept in host memory, with `launch.offload`, the optimizer state
    counted again; 0 where DeepSpeed keeps them."""
    updates: dict[str, float]
    """Largest absolute change of each trained parameter, in float32."""
    masters: MastersReport | None = None
    """The float32 masters, and what rounding them to the checkpoint dropped; null in a file of an earlier hft."""
    verification: Verification
    """Frozen parts identical, trained parts moved."""
    ends: AnswerEnds | None = None
    """With which tokens an answer ends; null in a round of the first version."""
    data: DataReport
    """What the data were: format, counts, hashes."""
    reference: ReferenceReport | None = None
    """What the reference of preference optimization was; null with another objective."""
    pairs: PairScores | None = None
    """Held-out preference pairs before and after; null where there are none."""
    fit: FitReport | None = None
    """What `train.fit: auto` chose; null where it is off."""
    adapter: AdapterReport | None = None
    """The adapter that trained in place of the weights; null where they trained themselves."""
    earlier: EarlierInputs | None = None
    """What was earlier, where the grain is `directions` or `columns`; null elsewhere."""
    entries: str | None = None
    """SHA-256 of the file with the entries that trained at the end, with `freeze.part: spiel`; null elsewhere."""
    redraws: tuple[DrawReport, ...] = ()
    """What trained when, with `freeze.redraw`; empty elsewhere."""
    hardware: Hardware
    """What the worker ran on."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Installed versions of what computes, in the start that finished the round; empty in a file of an earlier hft."""

    @property
    def ending(self) -> str:
        """What ended the round early, and the step whose weights were kept in place of the last one's; to follow a sentence."""
        ended = f"; ended by stop.{self.stopped_by}" if self.stopped_by else ""
        is_earlier = self.kept_step not in (None, self.num_steps)
        return ended + (f"; the weights are those of step {self.kept_step:,}" if is_earlier else "")


class Checksums(FileSection):
    """What a checkpoint's files were when they were written."""

    files: dict[str, FileSeal]
    """Size and hash of each."""


class StepManifest(FileSection):
    """A step checkpoint: what it holds, and what it may be resumed with. Written last; a folder without it is no checkpoint."""

    version: Version = 4
    """Version of the file's form. The first has `data_key`, and no `tokens_digest`; the first two have no `precision`, the
    first three no `versions`."""
    step: int
    """Optimizer steps taken."""
    spec: RoundSpec
    """The round."""
    fingerprint: str
    """Of the freeze plan: an optimizer restores its state by position, so another half would be corrupted without a word."""
    tokens_digest: str = ""
    """Hash of the tokens trained on, the round's own and those that methods add."""
    data_key: str = ""
    """Of the first version: names of their entries in the cache. They hash hft's code too, so that another version of hft gives
    the same tokens another name."""
    start_key: str
    """Hash of the start's weights, of which the frozen half is not stored again."""
    precision: Precision | None = None
    """What its steps were computed in; null in a file of an earlier hft."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Installed versions of what computed its last steps; empty in a file of an earlier hft."""
    files: dict[str, FileSeal]
    """Size and hash of every other file."""
    digest: str = ""
    """Hash of this file, with this field empty: the last one, in every version."""


class Manifest(FileSection):
    """What a stranger needs to repeat the run."""

    version: Version = 4
    """Version of the file's form: that of the results in it."""
    command: tuple[str, ...]
    """The command line."""
    created: str
    """UTC time of the first start."""
    versions: dict[str, str]
    """Installed versions of what computes, at the first start; each round's result has its own."""
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
