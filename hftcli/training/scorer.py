"""What the parts of a round share while it trains: who asks the model before and after, and what a stopped round remembers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.trainer_utils import TrainOutput
from trl.models import unwrap_model_for_generation

from hftcli.measuring.judging import score_task
from hftcli.measuring.pairs import Reading, read_pairs, score_pairs
from hftcli.measuring.questions import TokenizedTask
from hftcli.methods.method import Method
from hftcli.models.device import is_mixed, is_sharded
from hftcli.runs.scores import HELD_OUT, Moment, PairScores, Score
from hftcli.training.internals import Memory, ResumableTrainer
from hftcli.training.references import Reference
from hftcli.training.reports import RoundCallback
from hftcli.training.stages import Assignment, Attempt, Rows
from hftcli.training.steps import StepKeeper
from hftcli.training.trainers import PairTrainer, TaskTrainer


class Scorer:
    """Asks the model of a round its tasks and held-out rows, and keeps what it said before training."""

    def __init__(self, attempt: Attempt, task: Assignment, rows: Rows):
        self.attempt = attempt
        self.spec = task.spec
        self.rows = rows
        self.held_out = (HELD_OUT,) if HELD_OUT in rows.asked else ()
        self.before: dict[str, Score] = {}
        self.read_before: list[Reading] = []

    def attach(self, trainer: TaskTrainer | PairTrainer, keeper: StepKeeper) -> None:
        """Take the trainer whose model is asked, and who says between batches whether to stop: both are made later."""
        self.trainer = trainer
        self.keeper = keeper

    def measure_before(self) -> None:
        """Ask the untouched model; all ranks together."""
        self.before.update(self._score("before", self.spec.scoring.before, self.held_out))
        if self.rows.pairs is not None:
            self.read_before.extend(self._read(None))

    def measure_after(self) -> tuple[dict[str, Score], PairScores | None]:
        """Ask the trained model; all ranks together."""
        after = self._score("after", self.spec.scoring.after, (*self.spec.scoring.likelihood, *self.held_out))
        if self.rows.pairs is None or self.spec.dpo is None:
            return after, None
        args, beta = self.trainer.args, self.spec.dpo.beta
        before, read_after = self.read_before, self._read(self.read_before)
        return after, PairScores(
            before=score_pairs(before, before, beta, args.device, args.world_size),
            after=score_pairs(read_after, before, beta, args.device, args.world_size),
        )

    def _score(self, moment: Moment, names: tuple[str, ...], read_only: tuple[str, ...]) -> dict[str, Score]:
        args, scores = self.trainer.args, {}
        with (
            self._measuring(),
            self._open_model([self.rows.asked[name] for name in names], [self.rows.asked[name] for name in read_only]) as model,
        ):
            for name in names + read_only:
                scores[name], predictions = score_task(
                    model, self.rows.asked[name], self.trainer.processing_class, args.device, args.process_index,
                    args.world_size, self.spec.scoring.temperature, name in read_only, self._show,
                )  # fmt: skip
                if self.attempt.reporter.is_first:
                    self.attempt.round.write_predictions(moment, name, predictions)
        return scores

    def _read(self, start: list[Reading] | None) -> list[Reading]:
        args = self.trainer.args
        with self._measuring():
            return read_pairs(
                self.trainer.model_wrapped, self.rows.pairs, args.device, args.process_index, args.world_size, start, self._show
            )

    def _show(self, done: int, total: int) -> None:
        self.attempt.reporter.report("scoring", done, total)
        self.keeper.check()

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        # DeepSpeed holds its weights in bfloat16 itself.
        casts = is_mixed(self.spec) and not is_sharded(self.spec)
        with (
            self.attempt.clock.measure("scoring"),
            torch.autocast(self.trainer.args.device.type, torch.bfloat16, enabled=casts),
        ):
            yield

    @contextmanager
    def _open_model(self, tasks: list[TokenizedTask], read_only: list[TokenizedTask]) -> Iterator[torch.nn.Module]:
        """The model as scoring these tasks needs it: where a cache is used, with weights that are whole on every rank."""
        if not any(task.prompts for task in tasks) and not any(task.questions for task in tasks + read_only):
            yield self.trainer.model_wrapped
            return
        with unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as whole:
            yield whole


class RoundMemory:
    """What a step checkpoint holds of a round beside what the trainer and DeepSpeed save."""

    def __init__(self, scorer: Scorer, reference: Reference | None, methods: list[Method]):
        self.scorer = scorer
        self.reference = reference
        self.methods = methods

    def attach(self, callback: RoundCallback) -> None:
        """Who measures the gradients; it is made after the memory."""
        self.callback = callback

    def recall(self) -> Memory:
        """Called by every rank for each step checkpoint."""
        return {
            "sums": self.scorer.trainer.recall_sums(),
            "before": {name: value.model_dump() for name, value in self.scorer.before.items()},
            "read_before": [vars(reading) for reading in self.scorer.read_before],
            "reference": self.reference.recall() if self.reference is not None else None,
            "methods": [method.recall() for method in self.methods],
            "gradient_bytes": self.callback.gradient_bytes,
        }

    def restore(self, memory: Memory) -> None:
        """Take up what `recall` gave, in place of measuring it again."""
        self.scorer.trainer.restore_sums(memory["sums"])
        self.scorer.before.update({name: Score(**values) for name, values in memory["before"].items()})
        self.scorer.read_before.extend(Reading(**tensors) for tensors in memory["read_before"])
        if self.reference is not None:
            self.reference.restore(self.scorer.trainer, memory["reference"])
        for method, recalled in zip(self.methods, memory["methods"], strict=True):
            method.restore(recalled)
        self.callback.gradient_bytes = memory["gradient_bytes"]


@dataclass(frozen=True)
class Trained:
    """A model after its last step, not saved yet."""

    trainer: ResumableTrainer
    outcome: TrainOutput
    scorer: Scorer
    keeper: StepKeeper
    callback: RoundCallback
