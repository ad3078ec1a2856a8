"""What a method may do in a round. Every hook does nothing here; a method overrides those that it needs.

narrow_plan       what trains, before anything is loaded                       lora, olora, ia3, peft
prepare_rows      the rows that are trained on, and those that are kept        replay, ewc, gem, agem, distill
check_start       what the start cannot carry, before anything is loaded        ia3, peft, distill
take_bases        the directions that are open, where the plan has some        lora, quiet
expect            what a step checkpoint keeps, before there is an optimizer   redraw, spiel
prepare_model     the loaded model, before any optimizer exists                all that hold a start, adapters, quiet
laying_aside      while the untouched model is asked                           ia3, peft
holding_end       while the model is measured within the round                 adapters, quiet, average, interpolation
set_arguments     the trainer's arguments                                      replay
restore_masters   DeepSpeed made masters of rounded values, and no step yet    lora
start             the model is where it trains                                 all that hold a start, olora, quiet, average, ift
ask_untouched     before the first step, of the model that has not moved       anchor
see_places        of which rows a micro-batch is                               self_replay, anchor, token_weights
read_ahead        before the forward pass of a micro-batch                     anchor, distill, token_weights, ift, self_replay
penalize_tokens   a term of each token's loss, by the whole distribution       anchor, distill, self_replay
weigh_tokens      what a token counts in the loss                              token_weights, ift, self_replay
list_totals       what a row of metrics.jsonl has the mean of                  token_weights
compute_penalty   a term of the loss                                           ewc, l2sp, olora, peft
change_gradient   after the last backward pass of a step, before the step      gem, agem, pull
list_waiting      what of the trained half has no gradient at the moment       redraw
recall, restore   what a step checkpoint keeps            gem, agem, peft, pull, average, redraw, spiel, token_weights, anchor
end_step          after a step of the optimizer                                quiet, spiel, peft, redraw, token_weights
finish            after the last step, before the checkpoint is written        ewc, ift, adapters, and all of `freeze` but pull
list_merged       after `finish`: what was merged, where the model rounds it   adapters, quiet, redraw, interpolation
"""

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hftcli.data.tokens import Progress
from hftcli.freezing.activations import Adapters
from hftcli.freezing.roles import Unit
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe.section import Section
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec


class Method:
    """A defence of old knowledge in one round.

    Args:
        section: the method's own section of the recipe.

    Attributes:
        leaves_another_model: whether `finish` changes the model, so that it can train no more.
        reads_ahead: whether something reads every micro-batch before the model is trained on it: the start of the round, or the
            model as it is.
        asks_places: whether it needs to know of which row of the dataset a trained token is.
        reads_distributions: whether it needs all log-probabilities of a token's place, which the plain loss kernel alone has.
        num_given: sequences of rows, before those of texts that the start writes; None where it writes none.
        adapters: what trains in place of the weights, where that was counted.
        num_adapter_weights: of what it adds to the model, those that train; known once that is loaded.
    """

    leaves_another_model = False
    reads_distributions = False
    reads_ahead = False
    asks_places = False
    num_given: int | None = None
    adapters: Adapters | None = None
    num_adapter_weights = 0
    cycle_steps = 1  # from one change of the learning rate to the next

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

    def narrow_plan(self, plan: FreezePlan, units: tuple[Unit, ...], num_heads: int = 1) -> FreezePlan:
        """The plan with less in it that trains.

        Args:
            num_heads: of the attention's queries.
        """
        return plan

    def prepare_rows(self, dataset: Dataset, rows: dict[str, Dataset]) -> Dataset:
        """The rows to train on.

        Args:
            dataset: as the methods before have left it.
            rows: the training rows by task: the round's own, and those that methods need.
        """
        return dataset

    def check_start(self, start: Path, plan: FreezePlan) -> None:
        """Look at the start's config, before its weights are read.

        Raises:
            InputError: it cannot carry the method.
        """

    def check_steps(self, num_steps: int) -> None:
        """Look at how long the round is, before the start's weights are read.

        Raises:
            InputError: the method comes to nothing in so many steps.
        """

    def take_bases(self, bases: dict[str, torch.Tensor]) -> None:
        """Take the directions that are open in this round, by what the matrices read; none where the plan has none."""

    def expect(self, recalled: Any) -> None:
        """Know, before the model is prepared, what `restore` is going to get."""

    def prepare_model(self, model: PreTrainedModel, plan: FreezePlan, start: Path, mixed: bool, sharded: bool) -> None:
        """Change the loaded model; the other arguments are those of `load_model`."""

    def laying_aside(self) -> AbstractContextManager[None]:
        """While the untouched model is asked: what the method added is left out."""
        return nullcontext()

    def holding_end(self, trainer: Trainer) -> AbstractContextManager[None]:
        """While the model is measured between two steps: it is what `finish` would leave. All ranks together."""
        return nullcontext()

    def set_arguments(self, args: TrainingArguments) -> None:
        """Change the trainer's arguments before the trainer exists."""

    def restore_masters(self) -> None:
        """Called by all ranks where DeepSpeed in bfloat16 made masters of what it was given, once before the first step."""

    def start(self, trainer: Trainer) -> None:
        """Called once by all ranks before the first step, or before going on from a step checkpoint."""

    def read_ahead(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], columns_N: torch.Tensor) -> None:
        """Called before the model reads a micro-batch, on all ranks alike, where the method's `reads_ahead` is true.

        Args:
            columns_N: places before tokens that some row of it trains on.
        """

    def see_places(self, places_BT: torch.Tensor) -> None:
        """Called before `read_ahead`, where the method's `asks_places` is true.

        Args:
            places_BT: of the row that each trained token of a micro-batch belongs to in the dataset; -1 for the others.
        """

    def ask_untouched(self, trainer: Trainer, on_batch: Progress) -> None:
        """Called once by all ranks when the model is where it trains, and untouched; not where the round goes on.

        Args:
            on_batch: called with batches done and in all.
        """

    def penalize_tokens(self, log_probs_BNV: torch.Tensor, targets_BN: torch.Tensor) -> torch.Tensor | None:
        """What the tokens at these places have on top of their loss, (B, N) with a gradient; None for nothing.

        Only a method whose `reads_distributions` is true is asked.

        Args:
            log_probs_BNV: what the model expects at each of them, with a gradient.
            targets_BN: the tokens.
        """
        return None

    def weigh_tokens(
        self, log_probs_BT: torch.Tensor, entropies_BT: torch.Tensor, is_trained_BT: torch.Tensor
    ) -> torch.Tensor | None:
        """What each trained token of a micro-batch counts in the loss, (B, T); None for all the same.

        A weight with a gradient is trained through; anything may stand where no token is trained, but a finite number.

        Args:
            log_probs_BT: of the tokens, but for the first of each row.
            entropies_BT: of what could stand in their places, nats.
        """
        return None

    def list_totals(self) -> Mapping[str, torch.Tensor]:
        """Of the micro-batch whose loss was just computed: a sum over something, and how much of it there is, (2,), by name.

        Rows of metrics.jsonl have the mean over all micro-batches and ranks; the names are the same on all of these.
        """
        return {}

    def compute_penalty(self) -> torch.Tensor | None:
        """What a step's loss has on top, () with a gradient; None for nothing."""
        return None

    def change_gradient(self, trainer: Trainer) -> None:
        """Change the gradients of a step, which are accumulated and clipped."""

    def list_waiting(self) -> Mapping[str, tuple[torch.nn.Parameter, torch.Tensor]]:
        """Of what trains in the round, what does not at the moment: the parameter, and the tensor with its exact values."""
        return {}

    def count_optimizer_bytes(self) -> int:
        """The most that the optimizer has held in the round, where it does not hold as much to the end."""
        return 0

    def recall(self) -> Any:
        """What a step checkpoint has to keep of what changes in training: numbers, strings and tensors, in tuples and dicts."""

    def restore(self, recalled: Any) -> None:
        """Take it up again, before `start`. The model is then that of the step, and no more that of the round's start."""

    def end_step(self) -> None:
        """Called after every step of the optimizer, before anything reads the model."""

    def finish(self, trainer: Trainer, round_: Round) -> None:
        """Called once by all ranks after the last step; rank 0 leaves in the round's folder what later rounds need."""

    def list_merged(self) -> dict[str, torch.Tensor]:
        """Float32 values, by parameter, of what `finish` merged into weights that the model holds rounded; on rank 0."""
        return {}


def draw_rows(rows: Dataset, num_rows: int, task: str, seed: int) -> Dataset:
    """Rows of a task, drawn without replacement; the same ones in every round of a run.

    Args:
        num_rows: how many; all of them where there are fewer.
    """
    drawn = random.Random(f"{seed}/{task}").sample(range(len(rows)), min(num_rows, len(rows)))
    return rows.select(sorted(drawn))
