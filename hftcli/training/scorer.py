"""Who asks the model of a round, before it, within it and after it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from trl.models import unwrap_model_for_generation

from hftcli.comparing.curves import Standing
from hftcli.measuring.judging import score_task
from hftcli.measuring.pairs import Reading, read_pairs, score_pairs
from hftcli.measuring.questions import TokenizedTask
from hftcli.models.checkpoint import holding_file, holding_rounding
from hftcli.models.device import is_mixed, is_sharded
from hftcli.models.masters import open_masters
from hftcli.models.reader import Start
from hftcli.runs.scores import HELD_OUT, Moment, PairScore, PairScores, Score
from hftcli.training.basis import Basis
from hftcli.training.stages import Assignment, Attempt, Rows
from hftcli.training.steps import StepKeeper
from hftcli.training.trainers import PairTrainer, TaskTrainer


class Scorer:
    """Asks the model of a round its tasks and held-out rows, and keeps what it said before training."""

    def __init__(self, attempt: Attempt, task: Assignment, rows: Rows):
        self.attempt = attempt
        self.task = task
        self.spec = task.spec
        self.rows = rows
        held_out: tuple[str, ...] = (HELD_OUT,) if HELD_OUT in rows.asked else ()
        self.choices = tuple(name for name in held_out if rows.asked[name].bare_questions)  # which have a score
        self.held_out = tuple(name for name in held_out if name not in self.choices)
        self.before: dict[str, Score] = {}
        self.reused: list[str] = []  # of what was asked before, what an earlier run had asked already
        self.read_before: list[Reading] = []

    def attach(self, trainer: TaskTrainer | PairTrainer, keeper: StepKeeper, stored: Start) -> None:
        """Take what is made later: the trainer whose model is asked, who says between batches whether to stop, the start."""
        self.trainer = trainer
        self.keeper = keeper
        self.stored = stored

    def measure_before(self) -> None:
        """Ask the untouched model, as the start's files hold it; all ranks together."""
        if not (self.spec.scoring.before or self.held_out or self.choices or self.rows.pairs is not None):
            return
        with holding_file(self.trainer.model, self.stored.folder, self.stored.masters):
            self.before.update(self._recall_before())
            if self.rows.pairs is not None:
                self.read_before.extend(self._read(None))

    def _recall_before(self) -> dict[str, Score]:
        """Scores of the untouched model: those that an earlier run kept, and of the others anew."""
        asked, args, is_first = self.rows.asked, self.trainer.args, self.attempt.reporter.is_first
        names = {name: name in self.held_out for name in (*self.spec.scoring.before, *self.choices, *self.held_out)}
        dtype = self.trainer.model.get_input_embeddings().weight.dtype
        basis = Basis(self.task, args.world_size, args.device, dtype) if is_first and names else None
        kept = {name: basis.read(asked[name], is_read_only) for name, is_read_only in names.items()} if basis else {}
        known = [[name for name, score in kept.items() if score is not None]]
        if args.world_size > 1:
            torch.distributed.broadcast_object_list(known)  # the ranks may be on machines with other caches
        (self.reused,) = known
        missing = [name for name in names if name not in self.reused]
        found = self._score(
            "before", tuple(name for name in missing if not names[name]), tuple(name for name in missing if names[name])
        )
        if basis is None:
            return dict(found.scores)
        for name in missing:
            basis.write(asked[name], names[name], found.scores[name], found.answers[name])
        for name, score in kept.items():
            if score is not None:
                self.attempt.round.write_predictions("before", name, score.answers)
        return {name: score.score if (score := kept[name]) is not None else found.scores[name] for name in names}

    def measure_after(self) -> tuple[dict[str, Score], PairScores | None]:
        """Ask the model that was saved, as its files hold it; all ranks together."""
        checkpoint = self.attempt.round.checkpoint
        if self.trainer.args.world_size > 1:
            torch.distributed.barrier()  # rank 0 has written it
        with holding_file(self.trainer.model, checkpoint, open_masters(checkpoint).tensors):
            names, read_only = (*self.spec.scoring.after, *self.choices), (*self.spec.scoring.likelihood, *self.held_out)
            after = self._score("after", names, read_only).scores
            before, now = self._score_pairs(self.read_before), self._score_pairs(None)
        return dict(after), PairScores(before=before, after=now) if before is not None and now is not None else None

    def measure_now(self, learned: tuple[str, ...], known: tuple[str, ...]) -> Standing:
        """Ask the model as it would be saved between two steps; all ranks together."""
        with ExitStack() as held:
            for method in self.task.methods:
                held.enter_context(method.holding_end(self.trainer))
            held.enter_context(holding_rounding(self.trainer.model, self.stored))
            names = tuple(name for name in (*learned, *known) if name != HELD_OUT)
            found = self._score(None, (*names, *self.choices), self.held_out)
            return replace(found, pairs=self._score_pairs(None))

    @property
    def pairs_before(self) -> PairScore | None:
        """Held-out pairs before the round; all ranks together."""
        return self._score_pairs(self.read_before)

    def _score_pairs(self, readings: list[Reading] | None) -> PairScore | None:
        """Held-out pairs beside the reference.

        Args:
            readings: None asks the model as it is.
        """
        if self.rows.pairs is None or self.spec.dpo is None:
            return None
        read = self._read(self.read_before) if readings is None else readings
        args = self.trainer.args
        return score_pairs(read, self.read_before, self.spec.dpo.beta, args.device, args.world_size)

    def _score(self, moment: Moment | None, names: tuple[str, ...], read_only: tuple[str, ...]) -> Standing:
        """Scores and answers of these tasks; with a moment, rank 0 keeps the answers."""
        args, scores, answers = self.trainer.args, {}, {}
        with (
            self._measuring(),
            self._open_model([self.rows.asked[name] for name in names], [self.rows.asked[name] for name in read_only]) as model,
        ):
            for name in names + read_only:
                scores[name], answers[name] = score_task(
                    model, self.rows.asked[name], self.trainer.processing_class, args.device, args.process_index,
                    args.world_size, self.spec.scoring.temperature, name in read_only, self._show,
                )  # fmt: skip
                if moment is not None and self.attempt.reporter.is_first:
                    self.attempt.round.write_predictions(moment, name, answers[name])
        return Standing(scores, answers)

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
        # With a cache, transformers would take the router's loss of the last token with the mask of all.
        config = self.trainer.model.config.get_text_config()
        is_routed = bool(config.to_dict().get("output_router_logits"))
        with (
            self.attempt.clock.measure("scoring"),
            torch.autocast(self.trainer.args.device.type, torch.bfloat16, enabled=casts),
        ):
            if is_routed:
                config.output_router_logits = False
            yield
            if is_routed:
                config.output_router_logits = True

    @contextmanager
    def _open_model(self, tasks: list[TokenizedTask], read_only: list[TokenizedTask]) -> Iterator[torch.nn.Module]:
        """The model as scoring these tasks needs it: where a cache is used, with weights that are whole on every rank."""
        if not any(task.prompts for task in tasks) and not any(task.questions for task in tasks + read_only):
            yield self.trainer.model_wrapped
            return
        with unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as whole:
            yield whole
