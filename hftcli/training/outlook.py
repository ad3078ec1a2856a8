"""What a round is going to do, known before it has weights: rows, steps, the learning rate, what trains, what it holds."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import get_scheduler

from hftcli.doctor.disk import foresee_disk
from hftcli.doctor.doctor import Finding
from hftcli.doctor.memory import check_host, check_memory, share_memory
from hftcli.errors import InputError
from hftcli.freezing.activations import Adapters
from hftcli.freezing.redrawing import NUM_TRIED_DRAWS, count_cycle_steps, count_draws, list_draws, settle_every
from hftcli.launching.planning import make_budget
from hftcli.measuring.questions import TokenizedTask
from hftcli.models.device import is_mixed, is_sharded
from hftcli.models.masters import open_masters
from hftcli.models.reader import Start
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.sections import TrainSection
from hftcli.runs.masters import MastersState
from hftcli.runs.records import Outlook
from hftcli.runs.run import Run
from hftcli.runs.spec import RoundSpec, Scoring
from hftcli.training.earlier import find_carried
from hftcli.training.own_rows import stand_in
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.stages import Assignment, Rows
from hftcli.training.trainers import build_arguments, make_deepspeed_config

logger = logging.getLogger(__name__)

NUM_TRIED_STEPS = 10_000  # of a schedule


@dataclass
class Passes:
    """How often the rows are gone through; a method may change it, as it changes the trainer's arguments."""

    num_train_epochs: float
    max_steps: int
    train_sampling_strategy: str = "random"


def look_ahead(task: Assignment, rows: Rows) -> Outlook:
    """Raises: InputError: no step would train, or something else of the round would come to nothing."""
    spec, plan = task.spec, task.plan
    num_steps = count_steps(task, len(rows.train))
    num_warmup_steps = count_warmup_steps(spec.train.warmup_steps, num_steps)
    cycle_steps = count_cycle_steps(spec.freeze, task.network.units, count_pass(task, rows), spec.train.global_batch_size)
    check_schedule(spec.train, num_steps, num_warmup_steps, cycle_steps)
    check_points(spec.scoring, num_steps)
    for method in task.methods:
        method.check_steps(num_steps)
    check_deciding(spec, rows.asked)
    check_draws(task, count_pass(task, rows), num_steps)
    warn_open(spec)
    budget = make_budget(
        spec, task.network, plan, spec.launch.num_ranks, is_mixed(spec), torch.cuda.is_available(), find_counted(task)
    )
    return Outlook(
        data=rows.report,
        num_sequences=len(rows.train),
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
        is_warmup_dropped=num_steps == 1 and 0 < spec.train.warmup_steps < 1,
        num_trainable=plan.num_trainable,
        num_parameters=plan.num_parameters,
        fingerprint=plan.fingerprint,
        num_adapter_weights=budget.num_adapter_weights,
        memory_bytes=budget.half.total_bytes,
        masters=find_masters_state(task),
    )


def find_counted(task: Assignment) -> Adapters | None:
    """What trains in place of the weights, where a method has counted it."""
    return next((method.adapters for method in task.methods if method.adapters is not None), None)


def find_masters_state(task: Assignment) -> MastersState:
    """Whether the float32 masters of a round's start are beside it, and taken."""
    state = open_masters(task.start).state
    return state if state in ("none", "missing") else Start(task.spec.model, task.start, ()).masters_state


def count_steps(task: Assignment, num_sequences: int) -> int:
    """Optimizer steps of a round, as transformers counts them: a part-full one is one."""
    train = task.spec.train
    passes = Passes(train.num_train_epochs, train.max_steps)
    for method in task.methods:
        method.set_arguments(passes)
    if passes.max_steps > 0:
        return passes.max_steps
    return math.ceil(passes.num_train_epochs * math.ceil(num_sequences / train.global_batch_size))


def count_pass(task: Assignment, rows: Rows) -> int:
    """Sequences of a pass over the rows: where replay spells the passes out, with its own rows behind them, of the task's."""
    replay = task.spec.method.replay
    return rows.report.num_sequences if replay is not None and replay.when == "after" else len(rows.train)


def count_warmup_steps(warmup_steps: float, num_steps: int) -> int:
    """Steps of warm-up: a number, or below 1 a share, which is rounded up but never takes the only step.

    The first step of a warm-up has a learning rate of 0.
    """
    if warmup_steps >= 1:
        return int(warmup_steps)
    return math.ceil(num_steps * warmup_steps) if num_steps > 1 else 0


def check_points(scoring: Scoring, num_steps: int) -> None:
    """Raises: InputError: there is no step to measure at before the last."""
    if scoring.every_steps is not None and scoring.every_steps >= num_steps:
        raise InputError(
            f"eval.every_steps is {scoring.every_steps}, and the round has {num_steps} steps: nothing would be measured before "
            "the last",
            "lower it, or give eval.num_points",
        )
    if scoring.num_points is not None and scoring.num_points > num_steps:
        raise InputError(
            f"eval.num_points is {scoring.num_points}, and the round has {num_steps} steps", "give that many or fewer"
        )


def check_deciding(spec: RoundSpec, asked: Mapping[str, TokenizedTask]) -> None:
    """See that what decides is measured by what `stop.by` says: one task that is not would leave nothing measured.

    Args:
        asked: what is measured, by name.

    Raises:
        InputError: a task has no right answers of which a likelihood could be taken, or no score.
    """
    stop, scoring = spec.stop, spec.scoring
    has_budget, picks = stop.max_forgetting is not None, spec.checkpoint.best is not None
    known, learned = scoring.known * has_budget, scoring.learned * (has_budget or picks or stop.min_learning is not None)
    unread = [name for name in (*known, *learned) if not (asked[name].rows or asked[name].questions)]
    if stop.by == "nll" and unread:
        raise InputError(
            f"stop.by is nll, and {unread[0]} has no right answers of which a likelihood could be measured, but rules",
            f"set stop.by: score, or leave {unread[0]} out of eval.tasks",
        )
    if stop.by == "nll":
        return
    if unscored := [name for name in known if not asked[name].has_score]:
        raise InputError(
            f"stop.by is score, and {unscored[0]} has none, but a likelihood alone",
            f"set stop.by: nll, or leave {unscored[0]} out of eval.tasks",
        )
    key = "stop.min_learning" if stop.min_learning is not None else "checkpoint.best"
    has_pairs = spec.dpo is not None and spec.held_out is not None
    is_learning_needed = stop.min_learning is not None or spec.checkpoint.best == "learning"
    if is_learning_needed and not has_pairs and not any(asked[name].has_score for name in learned):
        raise InputError(
            f"{key} goes by what is learned, stop.by is score, and {learned[0]} has none, but a likelihood alone",
            f"set stop.by: nll, or drop {key}",
        )


def warn_open(spec: RoundSpec) -> None:
    """Say of what chooses what is closed, or frozen, that nothing is.

    It is not refused, so that one key may be varied and full fine-tuning be among what is compared.
    """
    rule = spec.freeze
    if rule.trainable_fraction < 1:
        return
    given = {"rank": rule.rank != "random"}
    if spec.method.open_fraction is None:  # by which adapters close directions all the same
        given |= {key: getattr(rule, key) is not None for key in ("keep", "part", "blocks")}
    keys = " and ".join(f"freeze.{key}" for key, is_given in given.items() if is_given)
    if keys:
        logger.warning("%s: nothing is closed at freeze.trainable_fraction 1", keys)


def check_draws(task: Assignment, num_sequences: int, num_steps: int) -> None:
    """See that there is more than one draw.

    Args:
        num_sequences: of a pass over the rows.

    Raises:
        InputError: the round ends with its first draw.
    """
    rule = task.spec.freeze
    if rule.redraw is None:
        return
    units = task.network.units
    if len({*list_draws(units, rule, task.spec.index, NUM_TRIED_DRAWS)}) == 1:
        logger.warning(
            "freeze.redraw: every draw is the same: with freeze.trainable_fraction %g, nothing waits for another",
            rule.trainable_fraction,
        )
    every = settle_every(rule, units, num_sequences, task.spec.train.global_batch_size)
    if count_draws(num_steps, every) < 2:
        meant = f"auto, which is {every} here" if rule.redraw.every == "auto" else str(every)
        raise InputError(
            f"freeze.redraw.every is {meant}, and the round has {num_steps} steps: what trains in the first would train in all",
            "lower it, train for longer, or drop freeze.redraw",
        )


def list_own_draws(task: Assignment, rows: Rows) -> list[frozenset[str]]:
    """What trains in a round whose rows are known, draw by draw; nothing where it is not drawn anew."""
    rule, units, spec = task.spec.freeze, task.network.units, task.spec
    if rule.redraw is None:
        return []
    every = settle_every(rule, units, count_pass(task, rows), spec.train.global_batch_size)
    return list_draws(units, rule, spec.index, count_draws(count_steps(task, len(rows.train)), every))


def check_schedule(train: TrainSection, num_steps: int, num_warmup_steps: int, cycle_steps: int = 1) -> None:
    """See that a schedule makes of its settings what a learning rate may be.

    Args:
        cycle_steps: after so many steps the learning rate goes on, as after one of the schedule's.

    Raises:
        InputError: the schedule does not take its settings, or has a learning rate of 0 in every step, or an odd one.
    """
    num_changes = math.ceil(num_steps / cycle_steps)
    name, options = train.lr_scheduler_type, train.extra.get("lr_scheduler_kwargs")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], train.learning_rate)
    tried = sorted({*range(0, num_changes, max(num_changes // NUM_TRIED_STEPS, 1)), num_warmup_steps, num_changes - 1})
    try:
        [share_at] = get_scheduler(name, optimizer, num_warmup_steps, num_changes, options).lr_lambdas
        shares = {change * cycle_steps: share_at(change) for change in tried if change < num_changes}
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"train.lr_scheduler_type {name} does not take train.lr_scheduler_kwargs {options or {}}: {error}",
            f"see transformers' get_scheduler for what {name} takes",
        ) from None
    for step, share in shares.items():
        if isinstance(share, complex) or not -1e-9 <= share <= 1 + 1e-9:  # up to rounding
            raise InputError(
                f"the learning rate is {share * train.learning_rate:g} in step {step + 1} of {num_steps}, and "
                f"train.learning_rate, its peak, is {train.learning_rate:g}: train.lr_scheduler_kwargs {options or {}}",
                f"see transformers' get_scheduler for what {name} makes of them",
            )
    if not any(share > 0 for share in shares.values()):
        raise InputError(
            f"the learning rate is 0 in all {num_steps} steps: train.warmup_steps {train.warmup_steps:g} takes every one",
            "set train.warmup_steps: 0, or train for longer with train.num_train_epochs, or lower train.global_batch_size",
        )


def foresee_run(
    recipe: Recipe, run: Run, on_progress: Callable[[str, int, int], None]
) -> tuple[dict[str, Outlook], list[Finding]]:
    """What the rounds of a prepared run are going to do, by name, and what its devices and its disk have to say to that.

    Args:
        on_progress: called with a round's name, rows done and in all.

    Raises:
        InputError: something of it would fail.
    """
    outlooks: dict[str, Outlook] = {}
    specs = {round_.name: round_.read_spec() for round_ in run.rounds}
    first = next(iter(specs.values()))
    if is_sharded(first):
        make_deepspeed_config(first)
    for name, spec in specs.items():
        if spec is not first:
            # It starts from a model of the same shape and tokenizer, which is not there yet, and asks the same tasks.
            scoring = Scoring(every_steps=spec.scoring.every_steps, num_points=spec.scoring.num_points)
            spec = spec.model_copy(update={"model": first.model, "scoring": scoring})
        task = read_assignment(spec, needs_weights=False)
        if not outlooks:
            find_carried(task)
        build_arguments(task.spec, run.round(name).steps)
        rows = tokenize_rows(task, partial(on_progress, name))
        outlooks[name] = look_ahead(task, stand_in(task, rows))
        if spec.model.path != specs[name].model.path:  # a later round's masters are not there yet
            outlooks[name] = outlooks[name].model_copy(update={"masters": "none"})
    launch = first.launch
    budget = make_budget(
        task.spec, task.network, task.plan, launch.num_ranks, is_mixed(task.spec), torch.cuda.is_available(), find_counted(task)
    )
    rank_bytes = None if launch.hostfile else share_memory(launch, [])
    disk = foresee_disk(recipe, task.start, budget, launch.num_ranks, len(specs), list_own_draws(task, rows))
    found = (check_memory(budget, rank_bytes), check_host(budget, launch, rank_bytes), disk)
    return outlooks, [finding for finding in found if finding is not None]
