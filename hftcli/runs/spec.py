"""What the front asks of a worker, round.json, and what the worker says while it is at work."""

import math
from typing import Literal

from hftcli.errors import InputError
from hftcli.freezing.budget import ReferenceMode
from hftcli.freezing.rule import FreezeRule
from hftcli.recipe.asking import AskingSection
from hftcli.recipe.evaluation import StopSection
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.recipe import Objective
from hftcli.recipe.section import FileSection, Section, Version
from hftcli.recipe.sections import CheckpointSection, DataSection, DpoSection, LaunchSection, ModelSection, TrainSection


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
    asking: AskingSection = AskingSection(chat=False)
    """How the questions are asked; a file of an earlier hft has none, which asked without template."""
    learned: tuple[str, ...] = ()
    """Of what is measured, the tasks and held-out rows that ask for what the round trains on."""
    known: tuple[str, ...] = ()
    """The tasks that ask for what was known before the round."""
    every_steps: int | None = None
    """Steps between the points that are measured within the round; null measures by `num_points`, or not at all."""
    num_points: int | None = None
    """Points that are measured within the round."""

    def list_steps(self, num_steps: int) -> tuple[int, ...]:
        """Steps after which to measure, of so many; the last is among them unless there are none."""
        if self.every_steps is not None:
            return (*range(self.every_steps, num_steps, self.every_steps), num_steps)
        if self.num_points is not None:
            return tuple(sorted({math.ceil(num_steps * part / self.num_points) for part in range(1, self.num_points + 1)}))
        return ()


class RoundSpec(FileSection):
    """One training pass: one objective, one dataset, one starting checkpoint, one freeze rule."""

    version: Version = 3
    """Version of the file's form. The first has no `launch.offload`; in the first two, `train.bf16: true` is what null is
    now."""
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
    """Tasks to score before and after, and within."""
    stop: StopSection = StopSection()
    """When to end before the last step."""
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


class HubStart(FileSection):
    """Which model a hub id was when the round was first started; it is that one in all that the run does."""

    commit: str
    """The hub's commit."""


class Progress(Section):
    """Where a worker is, for the front to show, and to see that it is not hung."""

    phase: Literal["starting", "tokenizing", "choosing", "loading", "scoring", "referencing", "training", "saving", "verifying"]
    """What the worker does now."""
    done: int = 0
    """Units of the phase that are done: steps, rows, batches."""
    total: int = 0
    """Units of the phase in all; 0 where it is not known."""
    loss: float | None = None
    """Last training loss."""


class Failure(Section):
    """Why a worker stopped, for the front to raise again."""

    message: str
    """What went wrong and where."""
    fix: str = ""
    """What to do about it."""
    exit_code: int
    """The exit code that the front ends with."""
    kind: str = ""
    """Name of the error's class, where the exit code alone does not say what a front has to know."""
    traceback: str = ""
    """Where in the code, for `--traceback`."""
