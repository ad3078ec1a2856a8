"""What the calls of a round hand on, one to the next (round.py)."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, SFTConfig

from hftcli.freezing.activations import Network
from hftcli.freezing.selection import FreezePlan
from hftcli.launching.processes import StopRequest
from hftcli.measuring.questions import TokenizedTask
from hftcli.methods.method import Method
from hftcli.models.reader import Start
from hftcli.runs.masters import MastersReport
from hftcli.runs.records import AnswerEnds, DataReport, FitReport
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec
from hftcli.training.offload import Masters
from hftcli.training.references import Reference
from hftcli.training.reports import Clock, Reporter
from hftcli.training.steps import Origin


@dataclass(frozen=True)
class Attempt:
    """One start of a round; a round that is stopped takes several."""

    round: Round
    stop: StopRequest
    reporter: Reporter
    clock: Clock


@dataclass(frozen=True)
class Assignment:
    """What the files say: no process group, no weights.

    Attributes:
        spec: the round, its loss kernel and its fit to this machine decided.
        start: folder of the checkpoint that it begins from.
        asked: the tasks to score, by name.
        chat_template: with which rows are rendered, by name where there are several; None without one.
    """

    spec: RoundSpec
    start: Path
    plan: FreezePlan
    network: Network
    methods: list[Method]
    fit: FitReport | None
    tokenizer: PreTrainedTokenizerBase
    num_embeddings: int
    asked: dict[str, TokenizedTask]
    chat_template: str | dict[str, str] | None


@dataclass(frozen=True)
class Rows:
    """The tokens of a round.

    Attributes:
        train: what is trained on.
        own: the round's own rows, without what methods add and in the order in which they were read.
        report: what became of them.
        tokens_digest: hash of all tokens that are trained on, those that methods add among them.
        asked: the tasks to score, and held-out rows.
        pairs: held-out preference pairs; None where there are none.
        ends: tokens with which the trained answers end, the most frequent first.
        kept: rows that `freeze.keep` names, those of them that are read; None where there are none.
        kept_digest: hash of their tokens, and which of them are read.
        scored: rows that `freeze.importance` names, those of them that are read; None where there are none.
        scored_digest: the same of these.
    """

    train: Dataset
    own: Dataset
    report: DataReport
    tokens_digest: str
    asked: dict[str, TokenizedTask]
    pairs: Dataset | None
    ends: tuple[int, ...]
    kept: Dataset | None = None
    kept_digest: str = ""
    scored: Dataset | None = None
    scored_digest: str = ""


@dataclass(frozen=True)
class Loaded:
    """The start with a part of it frozen, on ranks that have joined and agreed on which.

    Attributes:
        second: the second model that preference optimization may refer to.
        step: the step checkpoint to go on from; None where the round begins.
        masters: what trains, in host memory, with `launch.offload`.
        stored: the start as its files hold it, and the float32 masters beside them.
    """

    args: SFTConfig | DPOConfig
    model: PreTrainedModel
    second: PreTrainedModel | None
    reference: Reference | None
    fingerprints: tuple[str, ...]
    origin: Origin
    step: Path | None
    masters: Masters
    stored: Start


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, and what rank 0 alone knows of it.

    Attributes:
        updates: largest absolute change of each trained parameter, in float32.
        moved_in_memory: frozen parameters that the model did not hold any more as the start has them.
        ends: with which tokens an answer ends.
        masters: what lies beside the checkpoint, and what rounding dropped.
    """

    updates: dict[str, float] = field(default_factory=dict)
    moved_in_memory: tuple[str, ...] = ()
    ends: AnswerEnds | None = None
    masters: MastersReport | None = None
