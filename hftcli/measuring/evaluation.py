"""What `hft eval` finds of one model, and its files.

FILE.json          Evaluation
FILE.items.jsonl   an Item per question and line, of all tasks
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from hftcli.comparing.items import ItemChange
from hftcli.errors import InputError
from hftcli.recipe.section import FileSection, Section
from hftcli.runs.files import write_model, write_text
from hftcli.runs.scores import Prediction, Score

PREFIX = "harness:"  # of the names of lm-evaluation-harness's tasks


class Drift(Section):
    """How far a model has moved from its base on some texts."""

    source: str
    """Where the texts come from: a file, a task, or `samples of the base`."""
    base_nll: float
    """The base's negative log-likelihood, nats per token."""
    model_nll: float
    """The model's negative log-likelihood, nats per token."""
    nll_change: float
    """`model_nll` - `base_nll`: the change of cross-entropy."""
    nll_change_error: float | None
    """Standard error of `nll_change` over texts, nats per token; null for a single text."""
    kl: float
    """KL(base || model) of the next token, over the whole vocabulary, averaged over the places: nats per token."""
    kl_error: float | None
    """Standard error of `kl` over texts, nats per token; null for a single text."""
    num_tokens: int
    """Places measured."""
    num_texts: int
    """Texts measured."""


class Item(Prediction):
    """What became of one question, with the task it is of."""

    task: str
    """Name of the task."""
    base_score: float | None = None
    """What the base scores on the question, by the task's own metric; null without a base."""


class Evaluation(FileSection):
    """What one model scores, and how far it has moved from its base."""

    model: str
    """Folder or hub id of the model."""
    base: str | None
    """Folder or hub id of what it is compared with; null where there is none."""
    dtype: str
    """Data type that the model computes in."""
    max_length: int
    """Tokens of a question with its answer, and of a piece of text."""
    max_examples: int | None
    """The first so many questions of each task, and rows of each file; null takes all."""
    versions: dict[str, str]
    """Installed versions of what computes."""
    tasks: dict[str, Score] = Field(default_factory=dict)
    """Scores by task."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Time that the model took for each task, loading not counted."""
    base_tasks: dict[str, Score] = Field(default_factory=dict)
    """Scores of the base by task; none without a base."""
    items: dict[str, ItemChange] = Field(default_factory=dict)
    """By task, what became of its questions between the base and the model; none without a base, or where a question has no
    score."""
    base_text: Drift | None = None
    """On base text: that which was given, or samples of the base itself; null without a base. Over samples of the base both
    `kl` and `nll_change` are unbiased estimates of KL(base || model) per token, and `kl` is the closer one."""
    prompts: Drift | None = None
    """On the answers to the prompts that were given, or where they have none on those of the base; null without prompts."""


@dataclass(frozen=True)
class Subject:
    """A model to score.

    Attributes:
        path: folder or hub id.
        base: what its run started from; None outside a run.
        root: `data.root` of its run.
        max_length: `data.max_length` of its run; None outside a run.
    """

    path: str
    base: str | None = None
    root: str | None = None
    max_length: int | None = None


def check_output(path: Path) -> None:
    """Raises: InputError: an evaluation cannot be written there."""
    if path.suffix != ".json":
        raise InputError(f"--output {path}: expected a file that ends in .json", f"give {path.with_suffix('.json')}")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}", "make it, or give another")


def write_evaluation(path: Path, evaluation: Evaluation, items: Iterable[Item]) -> Path:
    """Write both files, the items first.

    Returns:
        The file of the items.
    """
    items_path = path.with_suffix(".items.jsonl")
    write_text(items_path, "".join(item.model_dump_json() + "\n" for item in items))
    write_model(path, evaluation)
    return items_path
