"""Measuring while a round trains: its curve of learning against forgetting, the budget that ends it, and the step it keeps.

What is measured changes nothing of the training: the model is asked without dropout and draws from generators of its own, and a
round that is measured has the weights of one that is not, bit for bit.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState

from hftcli.comparing.curves import Standing, find_end, is_better, make_point
from hftcli.errors import Interrupted, OverBudget
from hftcli.models.checkpoint import gather_masters, lay_in_masters
from hftcli.models.device import is_sharded
from hftcli.runs.files import write_text
from hftcli.runs.run import Round
from hftcli.runs.scores import HELD_OUT, CurvePoint
from hftcli.training.internals import Memory
from hftcli.training.scorer import Scorer
from hftcli.training.trainers import checkpoint_layers


@dataclass(frozen=True)
class Best:
    """The step that is kept if none of those that follow is better.

    Attributes:
        masters: what trains, whole, in float32, on the CPU; on rank 0 alone.
    """

    point: CurvePoint
    masters: dict[str, torch.Tensor]


class Curve(TrainerCallback):
    """Measures after the steps that the recipe names; stands before what writes step checkpoints, which hold the points."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.spec = scorer.spec
        self.is_first = scorer.attempt.reporter.is_first
        self.points: list[CurvePoint] = []
        self.best: Best | None = None
        self.stopped_by: str | None = None
        self.is_open = False  # a signal came while the last step was measured
        self.start: Standing | None = None

    @property
    def kind(self) -> str | None:
        """Which step is kept."""
        best = self.spec.checkpoint.best
        return best or ("within_budget" if self.spec.stop.max_forgetting is not None else None)

    def on_step_end(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure where it is due, and end the round where the recipe says so; all ranks together."""
        if state.global_step in self.spec.scoring.list_steps(state.max_steps):
            self.is_open = True
            self._measure(state)
        if self.stopped_by is not None:
            control.should_training_stop = True

    def finish_open(self, state: TrainerState) -> None:
        """Measure the step that a signal kept from being measured, once its checkpoint is laid in."""
        if self.is_open:
            self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        trainer, scoring = self.scorer.trainer, self.spec.scoring
        try:
            now = self.scorer.measure_now(scoring.learned, scoring.known)
        except Interrupted:
            if self.scorer.keeper.stop.at_once:
                raise
            return  # a step checkpoint is written next, and the point comes when the round goes on
        finally:
            checkpoint_layers(trainer.model, trainer.args)  # asking sets it up in its own way
        point, is_kept, decided = None, False, None
        pairs_before = self.scorer.pairs_before  # all ranks together
        if self.is_first:
            self.start = self.start or self._read_start()
            start = replace(self.start, pairs=pairs_before)
            point = make_point(state.global_step, start, now, scoring.learned, scoring.known)
            decided = find_end(point, self.spec.stop)
            best = self.best.point if self.best is not None else None
            is_kept = self.kind is not None and is_better(point, best, self.spec.stop, self.kind == "within_budget")
        found: list[Any] = [point, is_kept, decided]
        if trainer.args.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        point, is_kept, self.stopped_by = found
        trainer.is_ended = self.stopped_by is not None
        assert point is not None  # rank 0 made it
        if is_kept:
            sharded = is_sharded(self.spec)
            self.best = Best(point, gather_masters(trainer.model, sharded, self.is_first, trainer.masters))
        self.points.append(point)
        self.is_open = False
        row = describe_point(point)
        if self.is_first:
            add_metrics(self.scorer.attempt.round, point.step, row)
        # To a tracker, which must not take the place of the training's own row.
        trainer.callback_handler.on_log(trainer.args, state, TrainerControl(), row)
        self.scorer.attempt.reporter.report("training", state.global_step, state.max_steps)

    def _read_start(self) -> Standing:
        """What was known before the round: as it was measured, or after the round before."""
        round_, scorer = self.scorer.attempt.round, self.scorer
        names = (*self.spec.scoring.learned, *self.spec.scoring.known)
        if self.spec.earlier:
            last = Round(Path(self.spec.earlier[-1].folder))
            return Standing(last.read_scores().after, {name: last.read_predictions("after", name) for name in names})
        return Standing(scorer.before, {name: round_.read_predictions("before", name) for name in names})

    def go_back(self) -> None:
        """Lay in the weights of the step that is kept; all ranks together, after the last step.

        Raises:
            OverBudget: no measured step lies within the budget.
        """
        if self.kind is None:
            return
        step, trainer = self.scorer.trainer.state.global_step, self.scorer.trainer
        if self.best is None:
            first, stop = self.points[0], self.spec.stop
            raise OverBudget(
                f"no measured step lies within stop.max_forgetting {stop.max_forgetting:g}: the first, step {first.step}, "
                f"has lost {first.forgetting[stop.by].mean:.4f}; nothing is kept",
                "measure earlier with eval.every_steps, or lower train.learning_rate, in another --output",
            )
        if self.best.point.step < step:
            lay_in_masters(trainer.model, self.best.masters, is_sharded(self.spec), trainer.masters)

    @property
    def kept_step(self) -> int | None:
        """The step whose weights the model has after `go_back`; None where that is the last for want of another rule."""
        return self.best.point.step if self.best is not None else None

    def recall(self) -> Memory:
        """What a step checkpoint has to keep."""
        return {
            "points": [point.model_dump() for point in self.points],
            "best": self.best and {"step": self.best.point.step, "masters": self.best.masters},
            "stopped_by": self.stopped_by,
            "is_open": self.is_open,
        }

    def restore(self, memory: Memory) -> None:
        """Take up what `recall` gave."""
        self.points = [CurvePoint(**values) for values in memory["points"]]
        if memory["best"] is not None:
            point = next(point for point in self.points if point.step == memory["best"]["step"])
            self.best = Best(point, memory["best"]["masters"])
        self.stopped_by, self.is_open = memory["stopped_by"], memory["is_open"]
        self.scorer.trainer.is_ended = self.stopped_by is not None


def describe_point(point: CurvePoint) -> dict[str, float]:
    """A point as a row of metrics.jsonl, with the prefix by which trackers know what was measured from what was trained."""
    row: dict[str, float | None] = {}
    for by, gain in point.learning.items():
        row[f"eval_learning_{by}"] = gain
    for by, loss in point.forgetting.items():
        row |= {f"eval_forgetting_{by}": loss.mean, f"eval_forgetting_{by}_low": loss.low}
        row[f"eval_forgetting_{by}_high"] = loss.high
    for name, score in point.scores.items():
        task = "held_out" if name == HELD_OUT else name
        row |= {f"eval_{task}_score": score.score, f"eval_{task}_nll": score.nll}
    if point.pairs is not None:
        row |= {"eval_reward_accuracy": point.pairs.reward_accuracy, "eval_kl": point.pairs.kl}
    return {key: value for key, value in row.items() if value is not None}


def add_metrics(round_: Round, step: int, row: dict[str, float]) -> None:
    """Add what was measured after a step to metrics.jsonl, before what was logged of the same step."""
    rows = round_.read_metrics() if round_.metrics_path.exists() else []
    place = next((index for index, held in enumerate(rows) if held["step"] >= step), len(rows))
    rows.insert(place, {"step": step, **row})
    write_text(round_.metrics_path, "".join(json.dumps(held) + "\n" for held in rows))
