"""One round, from round.json to result.json.

Reads top to bottom. The order matters: data are tokenized before any process group exists, the plan is made from the config
alone, parameters are frozen before any optimizer exists, and result.json is written last.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback

from hftcli.freezing.selection import FreezePlan
from hftcli.launching.processes import StopRequest
from hftcli.models.checkpoint import load_model, restore_masters
from hftcli.models.description import make_start_key, pin_start
from hftcli.models.device import is_mixed, is_offloaded, is_sharded, name_precision
from hftcli.models.proof import verify_checkpoint
from hftcli.models.reader import Start
from hftcli.runs.files import keep_model, write_model
from hftcli.runs.records import RoundResult, StepSaves
from hftcli.runs.run import Round
from hftcli.runs.scores import PairScores, Scores
from hftcli.runs.seals import seal_file
from hftcli.runs.verification import Verification
from hftcli.runs.versions import list_versions
from hftcli.training.agreement import agree
from hftcli.training.curve import Curve
from hftcli.training.draws import report_draws, settle_draws
from hftcli.training.earlier import describe_earlier, grow_moments, settle_parts
from hftcli.training.kept_questions import check_questions
from hftcli.training.memory import RoundMemory, Trained
from hftcli.training.offload import make_masters
from hftcli.training.outlook import look_ahead
from hftcli.training.own_rows import add_own_rows
from hftcli.training.ranking import settle_ranking
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.references import SharedReference, describe_reference, make_reference
from hftcli.training.reports import (
    Clock,
    Reporter,
    RoundCallback,
    check_finite,
    describe_hardware,
    measure_optimizer_bytes,
    measure_peak_memory,
)
from hftcli.training.saving import describe_adapter, save_round
from hftcli.training.scorer import Scorer
from hftcli.training.stages import Assignment, Attempt, Loaded, Rows, Saved
from hftcli.training.steps import Origin, StepKeeper, find_step, read_memory
from hftcli.training.trainers import PairTrainer, TaskTrainer, make_training_arguments


def run_round(round_: Round, stop: StopRequest) -> None:
    """Train one round and leave its checkpoint, scores and result; where a step checkpoint was left, go on from it.

    Raises:
        HftError: see errors.py.
    """
    attempt = Attempt(round_, stop, Reporter(round_), Clock())
    task, rows = read_round(attempt)
    loaded = load_start(attempt, task, rows)
    trained = train(attempt, task, rows, loaded)
    saved = save(attempt, task, rows, loaded, trained)
    prove(attempt, task, rows, loaded, trained, saved)


def read_round(attempt: Attempt) -> tuple[Assignment, Rows]:
    """1, 2. What the files say, and rows to tokens, once for all ranks; what would fail without weights fails here."""

    def show(done: int, total: int) -> None:
        attempt.reporter.report("tokenizing", done, total)

    attempt.reporter.report("starting")
    task = read_assignment(pin_start(attempt.round))
    with attempt.clock.measure("tokenizing"):
        attempt.reporter.report("tokenizing")
        rows = tokenize_rows(task, show)
    rows = add_own_rows(attempt, task, rows)
    outlook = look_ahead(task, rows)
    if attempt.reporter.is_first:
        write_model(attempt.round.outlook_path, outlook)
    with attempt.clock.measure("choosing"):
        return settle_parts(attempt, settle_draws(settle_ranking(attempt, task, rows), rows), rows), rows


def load_start(attempt: Attempt, task: Assignment, rows: Rows) -> Loaded:
    """3. The ranks join, agree on the plan, and load the start with one half frozen."""
    spec, start, plan, is_first = task.spec, task.start, task.plan, attempt.reporter.is_first
    args = make_training_arguments(spec, attempt.round.steps)
    fingerprints = agree(plan, rows, args.world_size)
    if is_first:
        write_model(attempt.round.plan_path, plan)
    with attempt.clock.measure("loading"):
        attempt.reporter.report("loading")
        origin = Origin(spec, plan.fingerprint, rows.tokens_digest, make_start_key(start) if is_first else "")
        step = find_step(attempt.round, origin, args)
        if spec.earlier or step is not None:  # the untouched model was asked already
            check_questions(Round(Path(spec.earlier[0].folder)) if spec.earlier else attempt.round, rows.asked)
        mixed, sharded = is_mixed(spec), is_sharded(spec)
        model = load_model(spec.model, start, plan, mixed, sharded)
        for method, recalled in zip(task.methods, read_memory(step, args)["methods"] if step else (), strict=False):
            method.expect(recalled)
        for method in task.methods:
            method.prepare_model(model, plan, start, mixed, sharded)
        second = None
        if spec.reference == "full":
            second = load_model(spec.model, start, plan, mixed, sharded)
            if mixed and is_offloaded(spec):  # rounded as the policy is, whose masters are on the host
                for parameter in filter(lambda held: held.requires_grad, second.parameters()):
                    parameter.data = parameter.data.bfloat16()
            second.requires_grad_(False)

        def show(done: int, total: int) -> None:
            attempt.reporter.report("referencing", done, total)

        reference = make_reference(spec, start, rows.report.key, mixed, plan, is_first, show)
        masters = make_masters(model, torch.bfloat16 if mixed else torch.float32) if is_offloaded(spec) else {}
        stored = Start(spec.model, start, (*plan.trained, *plan.frozen))
    return Loaded(args, model, second, reference, fingerprints, origin, step, masters, stored)


def train(attempt: Attempt, task: Assignment, rows: Rows, loaded: Loaded) -> Trained:
    """4. Train, with the tasks scored and the reference taken before the first step."""
    clock, args = attempt.clock, loaded.args
    scorer = Scorer(attempt, task, rows)
    memory = RoundMemory(scorer, loaded.reference, task.methods)

    def measure_start() -> None:
        if loaded.step is not None:
            memory.restore(read_memory(loaded.step, args))
            curve.finish_open(trainer.state)
            return
        if is_mixed(task.spec) and is_sharded(task.spec):
            restore_masters(trainer.model, task.spec.model, task.start, task.plan)
            for method in task.methods:
                method.restore_masters()
        with ExitStack() as bare:
            for method in task.methods:
                bare.enter_context(method.laying_aside())
            scorer.measure_before()
            if loaded.reference is not None:
                with clock.measure("referencing"):
                    attempt.reporter.report("referencing")
                    loaded.reference.prepare(trainer)
            with clock.measure("referencing"):
                for method in task.methods:
                    method.ask_untouched(trainer, partial(attempt.reporter.report, "referencing"))

    callback = RoundCallback(attempt.reporter, measure_start)
    curve = Curve(scorer)
    keeper = StepKeeper(attempt.round, loaded.origin, attempt.stop, args, memory.recall)
    trainer = make_trainer(task, rows, loaded, [callback, curve, keeper])
    scorer.attach(trainer, keeper, loaded.stored)
    memory.attach(callback, curve)
    with clock.measure("training"):
        outcome = trainer.train(resume_from_checkpoint=str(loaded.step) if loaded.step else None)
    loss = outcome.training_loss  # of the steps after the last row of metrics.jsonl too
    check_finite(loss, f"the loss became {loss} by step {trainer.state.global_step}", attempt.round)
    with keeper.stopping(trainer):
        keeper.check()
    if curve.kept_step not in (None, trainer.state.global_step):
        keeper.save_end(trainer)  # before it goes back: a stop comes too late for it afterwards
    curve.go_back()
    return Trained(trainer, outcome, scorer, keeper, callback, curve)


def make_trainer(task: Assignment, rows: Rows, loaded: Loaded, callbacks: list[TrainerCallback]) -> TaskTrainer | PairTrainer:
    """TRL's trainer for the round's objective."""
    loss_kernel = task.spec.train.loss_kernel
    assert loss_kernel is not None  # chosen with the budget
    if task.spec.objective == "sft":
        sft = TaskTrainer(loaded.model, loaded.args, rows.train, task.tokenizer, callbacks, task.methods, loss_kernel)
        sft.masters = loaded.masters
        return sft
    trainer = PairTrainer(
        loaded.model, loaded.args, rows.train, task.tokenizer, callbacks, task.methods, loss_kernel,
        loaded.reference, loaded.second,
    )  # fmt: skip
    trainer.masters = loaded.masters
    if isinstance(loaded.reference, SharedReference):
        loaded.reference.remember(loaded.model)  # before a step checkpoint is laid in
    return trainer


def save(attempt: Attempt, task: Assignment, rows: Rows, loaded: Loaded, trained: Trained) -> Saved:
    """5. Save: every rank gathers, rank 0 writes."""
    trainer = trained.trainer
    with attempt.clock.measure("saving"):
        attempt.reporter.report("saving")
        if any(method.leaves_another_model for method in task.methods):
            trained.keeper.save_end(trainer)  # a stop comes too late for it afterwards
    with attempt.clock.measure("choosing"):
        moments = learn_inputs(attempt, task, rows, trainer)
    with attempt.clock.measure("saving"):
        for method in sorted(task.methods, key=lambda method: not method.leaves_another_model):
            method.finish(trainer, attempt.round)  # those last that measure the model that is left
        merged = {name: values for method in task.methods for name, values in method.list_merged().items()}
        return save_round(attempt, task, rows, trainer.model, loaded.masters, merged, moments)


def learn_inputs(attempt: Attempt, task: Assignment, rows: Rows, trainer: TaskTrainer | PairTrainer) -> str | None:
    """Count what the round has read as earlier, where its matrices train in parts; the hash of what is kept of it."""
    args = trainer.args
    for method in task.methods:
        method.end_step()  # weights of an earlier step may have been laid in

    def show(done: int, total: int) -> None:
        attempt.reporter.report("choosing", done, total)

    casts = is_mixed(task.spec) and not is_sharded(task.spec)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=casts):
        return grow_moments(
            attempt, task, rows, trainer.model_wrapped, trainer.model, args.device, args.process_index, args.world_size, show
        )


def prove(attempt: Attempt, task: Assignment, rows: Rows, loaded: Loaded, trained: Trained, saved: Saved) -> None:
    """6. Score again, verify against the start, and write the result."""
    round_, scorer = attempt.round, trained.scorer
    with trained.keeper.stopping(trained.trainer):
        trained.keeper.check()
        after, pair_scores = scorer.measure_after()
    if not attempt.reporter.is_first:
        return
    with attempt.clock.measure("verifying"):
        attempt.reporter.report("verifying")
        verification = verify_checkpoint(
            task.start, round_.checkpoint, task.plan, saved.updates, task.spec.model.dtype, saved.moved_in_memory,
            round_.bases_path, round_.adapter if task.spec.method.adapter else None, find_entries_file(round_, task.plan),
        )  # fmt: skip
    write_model(round_.scores_path, Scores(before=scorer.before, after=after, points=tuple(trained.curve.points)))
    result = make_result(attempt, task, rows, loaded, trained, saved, verification, pair_scores)
    round_.flush()  # the front then removes the step checkpoints, and the masters of earlier rounds
    keep_model(round_.result_path, result)


def find_entries_file(round_: Round, plan: FreezePlan) -> Path | None:
    """Where the entries are that trained at the end; None where these are the plan's."""
    return round_.entries_path if any(part.is_moving for part in (plan.entries or {}).values()) else None


def make_result(
    attempt: Attempt, task: Assignment, rows: Rows, loaded: Loaded, trained: Trained, saved: Saved, verification: Verification,
    pair_scores: PairScores | None,
) -> RoundResult:  # fmt: skip
    """What the round leaves to the next one and to the report."""
    spec, trainer, keeper = task.spec, trained.trainer, trained.keeper
    return RoundResult(
        fingerprint=task.plan.fingerprint,
        rank_fingerprints=loaded.fingerprints,
        precision=name_precision(spec),
        loss_kernel=spec.train.loss_kernel,
        attention=trainer.attention,
        num_steps=trainer.state.global_step,
        stopped_by=trained.curve.stopped_by,
        kept_step=trained.curve.kept_step,
        reused_before=tuple(trained.scorer.reused),
        train_loss=trained.outcome.training_loss,
        num_tokens=trainer.num_tokens,
        seconds=attempt.clock.seconds,
        resumed_from=int(loaded.step.name) if loaded.step else None,
        step_saves=StepSaves(
            num_saves=keeper.num_saves, seconds=trainer.saving_seconds + keeper.seconds, num_bytes=keeper.num_bytes
        ),
        peak_memory_bytes=measure_peak_memory(),
        gradient_bytes=trained.callback.gradient_bytes,
        optimizer_bytes=max(
            [measure_optimizer_bytes(trainer.optimizer), *(method.count_optimizer_bytes() for method in task.methods)]
        ),
        host_bytes=trainer.host_optimizer.host_bytes if trainer.host_optimizer else 0,
        updates=saved.updates,
        masters=saved.masters,
        verification=verification,
        ends=saved.ends,
        data=rows.report,
        reference=describe_reference(spec, loaded.reference, loaded.second),
        pairs=pair_scores,
        fit=task.fit,
        adapter=describe_adapter(attempt.round, task),
        earlier=describe_earlier(attempt.round, task.plan),
        entries=seal_file(entries).sha256 if (entries := find_entries_file(attempt.round, task.plan)) else None,
        redraws=report_draws(task, trainer.state.global_step),
        hardware=describe_hardware(loaded.args.world_size),
        versions=list_versions(),
    )
