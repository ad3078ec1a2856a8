"""One round, from round.json to result.json.

Reads top to bottom. The order matters: data are tokenized before any process group exists, the plan is made from the config
alone, parameters are frozen before any optimizer exists, and result.json is written last.
"""

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import set_chat_template
from hftcli.data.prepare import check_positions, default_cache, prepare_dataset, prepare_pairs, prepare_task
from hftcli.data.tokens import Progress
from hftcli.errors import InputError, TrainingError
from hftcli.freezing.activations import Network
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.launching.planning import apply_fit, choose_fit, make_budget
from hftcli.launching.processes import StopRequest
from hftcli.measuring.asking import hold_out, tokenize_task
from hftcli.methods import make_methods
from hftcli.models.checkpoint import gather_weights, load_model, save_checkpoint, save_delta
from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer, make_start_key, read_start_dtype
from hftcli.models.device import is_mixed, is_offloaded, is_sharded
from hftcli.models.proof import measure_updates, verify_checkpoint
from hftcli.runs.files import write_model
from hftcli.runs.history import HISTORY_NAME, extend_history
from hftcli.runs.records import Checksums, DataReport, FitReport, RoundResult, StepSaves, Verification
from hftcli.runs.run import Round
from hftcli.runs.scores import HELD_OUT, PairScores, Scores
from hftcli.runs.seals import list_files, seal_files
from hftcli.runs.spec import RoundSpec
from hftcli.tasks import load_task
from hftcli.training.offload import make_masters
from hftcli.training.references import SharedReference, describe_reference, make_reference
from hftcli.training.reports import (
    Clock,
    Reporter,
    RoundCallback,
    describe_hardware,
    measure_optimizer_bytes,
    measure_peak_memory,
)
from hftcli.training.scorer import RoundMemory, Scorer, Trained
from hftcli.training.stages import Assignment, Attempt, Loaded, Rows, Saved
from hftcli.training.steps import Origin, StepKeeper, find_step, read_memory
from hftcli.training.trainers import PairTrainer, TaskTrainer, make_training_arguments


def run_round(round_: Round, stop: StopRequest) -> None:
    """Train one round and leave its checkpoint, scores and result; where a step checkpoint was left, go on from it.

    Raises:
        HftError: see errors.py.
    """
    attempt = Attempt(round_, stop, Reporter(round_), Clock())
    task = read_assignment(attempt)
    rows = tokenize_rows(attempt, task)
    loaded = load_start(attempt, task, rows)
    trained = train(attempt, task, rows, loaded)
    saved = save(attempt, task, loaded, trained)
    prove(attempt, task, rows, loaded, trained, saved)


def read_assignment(attempt: Attempt) -> Assignment:
    """1. What the files say."""
    spec = attempt.round.read_spec()
    attempt.reporter.report("starting")
    start = fetch_checkpoint(spec.model.path)
    description = describe_model(str(start))
    check_positions(spec.data.max_length, description.max_positions)
    units = assign_roles(description.model_type, description.parameters)
    plan = make_plan(units, spec.freeze, spec.index)
    methods = make_methods(spec)
    for method in methods:
        plan = method.narrow_plan(plan, units)
    spec, fit = fit_round(spec, Network(description.model_type, units, description.num_heads), plan)
    tokenizer = load_tokenizer(start)
    set_chat_template(tokenizer, spec.model.chat_template)
    scoring = spec.scoring
    asked = {}
    for name in dict.fromkeys(scoring.before + scoring.after + scoring.likelihood):
        questions = load_task(name, spec.data.root, "test", scoring.max_examples)
        asked[name] = tokenize_task(questions, spec.data.max_length, tokenizer)
    return Assignment(spec, start, plan, methods, fit, tokenizer, asked)


def fit_round(spec: RoundSpec, network: Network, plan: FreezePlan) -> tuple[RoundSpec, FitReport | None]:
    """The round with its loss kernel, and where it asks for that its micro-batch and checkpointing, chosen for this machine.

    Raises:
        InputError: nothing fits, or there is neither a GPU nor `train.memory_bytes`.
    """
    has_gpu = torch.cuda.is_available()
    budget = make_budget(spec, network, plan, spec.launch.num_ranks, is_mixed(spec), has_gpu)
    if spec.train.fit is None:
        return spec.model_copy(update={"train": spec.train.model_copy(update={"loss_kernel": budget.work.loss})}), None
    memory_bytes = spec.train.memory_bytes
    if memory_bytes is None:
        if not has_gpu:
            raise InputError("train.fit: auto reads the GPU's memory, and there is no GPU", "set train.memory_bytes")
        # All ranks must choose alike, so the smallest device of the machine counts, and nothing that changes.
        devices = range(torch.cuda.device_count())
        memory_bytes = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
    fit = choose_fit(spec, budget, memory_bytes, has_gpu)
    return spec.model_copy(update={"train": apply_fit(spec.train, fit)}), fit


def tokenize_rows(attempt: Attempt, task: Assignment) -> Rows:
    """2. Rows to tokens, once for all ranks."""
    spec, tokenizer, cache = task.spec, task.tokenizer, default_cache()

    def show(done: int, total: int) -> None:
        attempt.reporter.report("tokenizing", done, total)

    with attempt.clock.measure("tokenizing"):
        attempt.reporter.report("tokenizing")
        dataset, report = prepare_rows(spec, tokenizer, show)
        by_task, digests = {spec.task: dataset} if spec.task is not None else {}, [report.tokens_digest]
        for name in dict.fromkeys(name for method in task.methods for name in method.needed_tasks):
            needed = load_task(name, spec.data.root, "train", spec.data.max_examples)
            by_task[name], needed_report = prepare_task(needed, spec.data, tokenizer, cache)
            digests.append(needed_report.tokens_digest)
        for method in task.methods:
            dataset = method.prepare_rows(dataset, by_task)
        pairs, asked = None, dict(task.asked)
        if spec.held_out and spec.objective == "dpo":
            pairs, _ = prepare_pairs(spec.held_out, tokenizer, cache)
        elif spec.held_out:
            unpacked = spec.train.model_copy(update={"packing": False})
            asked[HELD_OUT] = hold_out(prepare_dataset(spec.held_out, unpacked, tokenizer, cache)[0])
    return Rows(dataset, report, "+".join(digests), asked, pairs)


def prepare_rows(spec: RoundSpec, tokenizer: PreTrainedTokenizerBase, on_progress: Progress) -> tuple[Dataset, DataReport]:
    """The tokens of the round's own rows."""
    if spec.task is not None:
        task = load_task(spec.task, spec.data.root, "train", spec.data.max_examples)
        return prepare_task(task, spec.data, tokenizer, default_cache(), on_progress)
    if spec.objective == "sft":
        return prepare_dataset(spec.data, spec.train, tokenizer, default_cache(), on_progress)
    return prepare_pairs(spec.data, tokenizer, default_cache(), on_progress)


def load_start(attempt: Attempt, task: Assignment, rows: Rows) -> Loaded:
    """3. The ranks join, agree on the plan, and load the start with one half frozen."""
    spec, start, plan, is_first = task.spec, task.start, task.plan, attempt.reporter.is_first
    args = make_training_arguments(spec, attempt.round.steps)
    fingerprints = gather_fingerprints(plan, args.world_size)
    if is_first:
        write_model(attempt.round.plan_path, plan)
    with attempt.clock.measure("loading"):
        attempt.reporter.report("loading")
        origin = Origin(spec, plan.fingerprint, rows.tokens_digest, make_start_key(start) if is_first else "")
        step = find_step(attempt.round, origin, args)
        mixed, sharded = is_mixed(spec), is_sharded(spec)
        model = load_model(spec.model, start, plan, mixed, sharded)
        for method in task.methods:
            method.prepare_model(model, plan, start, mixed, sharded)
        second = None
        if spec.reference == "full":
            second = load_model(spec.model, start, plan, mixed, sharded).requires_grad_(False)

        def show(done: int, total: int) -> None:
            attempt.reporter.report("referencing", done, total)

        reference = make_reference(spec, start, rows.report.key, mixed, is_first, show)
        masters = make_masters(model, torch.bfloat16 if mixed else torch.float32) if is_offloaded(spec) else {}
    return Loaded(args, model, second, reference, fingerprints, origin, step, masters)


def gather_fingerprints(plan: FreezePlan, num_ranks: int) -> tuple[str, ...]:
    """The plan's fingerprint as each rank computed it: a rank with another half would train without an error.

    Raises:
        TrainingError: they differ.
    """
    fingerprints = [plan.fingerprint]
    if num_ranks > 1:
        fingerprints = [""] * num_ranks
        torch.distributed.all_gather_object(fingerprints, plan.fingerprint)
    if len(set(fingerprints)) > 1:
        raise TrainingError(f"the ranks drew different halves: {', '.join(fingerprints)}", "install the same hft on all")
    return tuple(fingerprints)


def train(attempt: Attempt, task: Assignment, rows: Rows, loaded: Loaded) -> Trained:
    """4. Train, with the tasks scored and the reference taken before the first step."""
    clock, args = attempt.clock, loaded.args
    scorer = Scorer(attempt, task, rows)
    memory = RoundMemory(scorer, loaded.reference, task.methods)

    def measure_start() -> None:
        if loaded.step is not None:
            memory.restore(read_memory(loaded.step, args))
            return
        scorer.measure_before()
        if loaded.reference is not None:
            with clock.measure("referencing"):
                attempt.reporter.report("referencing")
                loaded.reference.prepare(trainer)

    callback = RoundCallback(attempt.reporter, measure_start)
    keeper = StepKeeper(attempt.round, loaded.origin, attempt.stop, args, memory.recall)
    trainer = make_trainer(task, rows, loaded, callback, keeper)
    scorer.attach(trainer, keeper)
    memory.attach(callback)
    with clock.measure("training"):
        outcome = trainer.train(resume_from_checkpoint=str(loaded.step) if loaded.step else None)
    with keeper.stopping(trainer):
        keeper.check()
    clock.seconds["training"] -= clock.seconds["scoring"] + clock.seconds["referencing"]
    return Trained(trainer, outcome, scorer, keeper, callback)


def make_trainer(
    task: Assignment, rows: Rows, loaded: Loaded, callback: RoundCallback, keeper: StepKeeper
) -> TaskTrainer | PairTrainer:
    """TRL's trainer for the round's objective."""
    callbacks, loss_kernel = [callback, keeper], task.spec.train.loss_kernel
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


def save(attempt: Attempt, task: Assignment, loaded: Loaded, trained: Trained) -> Saved:
    """5. Save: every rank gathers, rank 0 writes."""
    spec, start, round_, is_first = task.spec, task.start, attempt.round, attempt.reporter.is_first
    trainer = trained.trainer
    with attempt.clock.measure("saving"):
        attempt.reporter.report("saving")
        if any(method.leaves_another_model for method in task.methods):
            trained.keeper.save_end(trainer)  # a stop comes too late for it afterwards
        for method in task.methods:
            method.finish(trainer, round_)
        dtype = read_start_dtype(spec.model, start)
        updates, weights = {}, {}
        for name, values in gather_weights(trainer.model, is_sharded(spec), loaded.masters):
            if is_first:
                weights[name] = values
        if is_first:
            updates = measure_updates(weights, start, dtype, task.plan)
            weights = {name: values.to(dtype) for name, values in weights.items()}
            if spec.checkpoint.format == "delta":
                save_delta(trainer.model, task.tokenizer, weights, round_.checkpoint, start, task.plan)
            else:
                save_checkpoint(trainer.model, task.tokenizer, weights, round_.checkpoint)
            write_model(round_.checkpoint / HISTORY_NAME, extend_history(start, spec, task.plan.fingerprint))
            write_model(round_.checksums_path, Checksums(files=seal_files(round_.checkpoint, list_files(round_.checkpoint))))
    return Saved(updates)


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
        verification = verify_checkpoint(task.start, round_.checkpoint, task.plan, saved.updates)
    write_model(round_.scores_path, Scores(before=scorer.before, after=after))
    write_model(round_.result_path, make_result(attempt, task, rows, loaded, trained, saved, verification, pair_scores))


def make_result(
    attempt: Attempt, task: Assignment, rows: Rows, loaded: Loaded, trained: Trained, saved: Saved, verification: Verification,
    pair_scores: PairScores | None,
) -> RoundResult:  # fmt: skip
    """What the round leaves to the next one and to the report."""
    spec, trainer, keeper = task.spec, trained.trainer, trained.keeper
    return RoundResult(
        fingerprint=task.plan.fingerprint,
        rank_fingerprints=loaded.fingerprints,
        precision="bfloat16" if is_mixed(spec) else "float32",
        loss_kernel=spec.train.loss_kernel,
        attention=trainer.attention,
        num_steps=trainer.state.global_step,
        train_loss=trained.outcome.training_loss,
        num_tokens=trainer.num_tokens,
        seconds=attempt.clock.seconds,
        resumed_from=int(loaded.step.name) if loaded.step else None,
        step_saves=StepSaves(
            num_saves=keeper.num_saves, seconds=trainer.saving_seconds + keeper.seconds, num_bytes=keeper.num_bytes
        ),
        peak_memory_bytes=measure_peak_memory(),
        gradient_bytes=trained.callback.gradient_bytes,
        optimizer_bytes=measure_optimizer_bytes(trainer.optimizer),
        host_bytes=trainer.host_optimizer.host_bytes if trainer.host_optimizer else 0,
        updates=saved.updates,
        verification=verification,
        data=rows.report,
        reference=describe_reference(spec, loaded.reference, loaded.second),
        pairs=pair_scores,
        fit=task.fit,
        hardware=describe_hardware(loaded.args.world_size),
    )
