"""What a method may do in a round. Every hook does nothing here; a method overrides those that it needs.

narrow_plan       what trains, before anything is loaded                       lora, olora
prepare_rows      the rows that are trained on, and those that are kept        replay, ewc, gem, agem
prepare_model     the loaded model, before any optimizer exists                lora, olora
set_arguments     the trainer's arguments                                      replay
start             the model is where it trains, and untouched                  ewc
compute_penalty   a term of the loss                                           ewc, olora
change_gradient   after the last backward pass of a step, before the step      gem, agem
finish            after the last step, before the checkpoint is written        ewc, lora, olora
"""

import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe import Section
from hftcli.run import Round, RoundSpec


class Method:
    """A defence of old knowledge in one round.

    Args:
        section: the method's own section of the recipe.
    """

    def __init__(self, spec: RoundSpec, section: Section):
        self.spec = spec
        self.section = section

    @property
    def earlier_tasks(self) -> tuple[str, ...]:
        """The tasks of the rounds before, each once, without the round's own."""
        return tuple(dict.fromkeys(round_.task for round_ in self.spec.earlier if round_.task != self.spec.task))

    @property
    def last_round(self) -> Round | None:
        """The round before; None in the first of a run."""
        return Round(Path(self.spec.earlier[-1].folder)) if self.spec.earlier else None

    @property
    def needed_tasks(self) -> tuple[str, ...]:
        """Tasks besides the round's own whose training rows the method needs."""
        return ()

    def narrow_plan(self, plan: FreezePlan, units: tuple[Unit, ...]) -> FreezePlan:
        """The plan with less in it that trains."""
        return plan

    def prepare_rows(self, dataset: Dataset, rows: dict[str, Dataset]) -> Dataset:
        """The rows to train on.

        Args:
            dataset: as the methods before have left it.
            rows: the training rows by task: the round's own, and those that methods need.
        """
        return dataset

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Change the loaded model; the other arguments are those of `load_model`."""

    def set_arguments(self, args: TrainingArguments) -> None:
        """Change the trainer's arguments before the trainer exists."""

    def start(self, trainer: Trainer) -> None:
        """Called once by all ranks before the first step."""

    def compute_penalty(self) -> torch.Tensor | None:
        """What a step's loss has on top, () with a gradient; None for nothing."""
        return None

    def change_gradient(self, trainer: Trainer) -> None:
        """Change the gradients of a step, which are accumulated and clipped."""

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Called once by all ranks after the last step; rank 0 leaves in the round's folder what later rounds need."""


def draw_rows(rows: Dataset, num_rows: int, task: str, seed: int) -> Dataset:
    """Rows of a task, drawn without replacement; the same ones in every round of a run.

    Args:
        num_rows: how many; all of them where there are fewer.
    """
    drawn = random.Random(f"{seed}/{task}").sample(range(len(rows)), min(num_rows, len(rows)))
    return rows.select(sorted(drawn))
