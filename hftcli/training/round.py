"""One round, from round.json to result.json.

Reads top to bottom. The order matters: data are tokenized before any process group exists, the plan is made from the config
alone, parameters are frozen before any optimizer exists, and result.json is written last.
"""

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from hftcli.data.chat import set_chat_template
from hftcli.data.prepare import check_positions, default_cache, prepare_dataset, prepare_pairs, prepare_task
from hftcli.errors import InputError, TrainingError
from hftcli.freezing.activations import Network
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.launching.planning import apply_fit, choose_fit, make_budget
from hftcli.launching.processes import StopRequest
from hftcli.measuring.asking import TokenizedTask, hold_out, tokenize_task
from hftcli.measuring.judging import score_task
from hftcli.measuring.pairs import Reading, read_pairs, score_pairs
from hftcli.methods import make_methods
from hftcli.models.checkpoint import gather_weights, is_partitioned, load_model, save_checkpoint, save_delta
from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer, make_start_key, read_start_dtype
from hftcli.models.proof import measure_updates, verify_checkpoint
from hftcli.runs.files import write_model
from hftcli.runs.records import Checksums, DataReport, FitReport, Hardware, ReferenceReport, RoundResult, StepSaves
from hftcli.runs.run import Round
from hftcli.runs.scores import HELD_OUT, Moment, PairScores, Score, Scores
from hftcli.runs.seals import list_files, seal_files
from hftcli.runs.spec import RoundSpec
from hftcli.tasks import load_task
from hftcli.training.references import PrecomputedReference, Reference, SharedReference, make_reference_key
from hftcli.training.steps import Memory, Origin, StepKeeper, find_step, read_memory
from hftcli.training.trainers import (
    PairTrainer,
    Reporter,
    RoundCallback,
    TaskTrainer,
    is_mixed,
    is_sharded,
    make_training_arguments,
    measure_optimizer_bytes,
)

PHASES = ("tokenizing", "loading", "scoring", "referencing", "training", "saving", "verifying")


def run_round(round_: Round, stop: StopRequest) -> None:
    """Train one round and leave its checkpoint, scores and result; where a step checkpoint was left, go on from it.

    Raises:
        HftError: see errors.py.
    """
    spec = round_.read_spec()
    reporter = Reporter(round_)
    clock = Clock()

    # 1. What the files say: no process group, no weights.
    reporter.report("starting")
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
    asked = {
        name: tokenize_task(
            load_task(name, spec.data.root, "test", scoring.max_examples), spec.data.max_length, tokenizer
        )
        for name in dict.fromkeys(scoring.before + scoring.after + scoring.likelihood)
    }  # fmt: skip

    # 2. Rows to tokens, once for all ranks.
    with clock.measure("tokenizing"):
        reporter.report("tokenizing")
        dataset, data_report = prepare_rows(spec, tokenizer, reporter)
        rows, keys = {spec.task: dataset}, [data_report.key]
        for name in dict.fromkeys(name for method in methods for name in method.needed_tasks):
            task = load_task(name, spec.data.root, "train", spec.data.max_examples)
            rows[name], report = prepare_task(task, spec.data, tokenizer, default_cache())
            keys.append(report.key)
        for method in methods:
            dataset = method.prepare_rows(dataset, rows)
        pairs = None
        held_out: tuple[str, ...] = ()
        if spec.held_out and spec.objective == "dpo":
            pairs, _ = prepare_pairs(spec.held_out, tokenizer, default_cache())
        elif spec.held_out:
            unpacked = spec.train.model_copy(update={"packing": False})
            asked[HELD_OUT] = hold_out(prepare_dataset(spec.held_out, unpacked, tokenizer, default_cache())[0])
            held_out = (HELD_OUT,)

    # 3. The ranks join, agree on the plan, and load the start with one half frozen.
    args = make_training_arguments(spec, round_.steps)
    fingerprints = gather_fingerprints(plan, args.world_size)
    if reporter.is_first:
        write_model(round_.plan_path, plan)
    with clock.measure("loading"):
        reporter.report("loading")
        start_key = make_start_key(start) if reporter.is_first else ""
        origin = Origin(spec, plan.fingerprint, "+".join(keys), start_key)
        step = find_step(round_, origin, args)
        model = load_model(spec.model, start, plan, is_mixed(spec), is_sharded(spec))
        for method in methods:
            method.prepare_model(model, plan, start, is_mixed(spec), is_sharded(spec))
        second = None
        if spec.reference == "full":
            second = load_model(spec.model, start, plan, is_mixed(spec), is_sharded(spec)).requires_grad_(False)
        reference = make_reference(spec, start, data_report, reporter)

    # 4. Train, with the tasks scored and the reference taken before the first step.
    casts = is_mixed(spec) and not is_sharded(spec)  # DeepSpeed holds its weights in bfloat16

    def show(done: int, total: int) -> None:
        reporter.report("scoring", done, total)
        keeper.check()

    def score(moment: Moment, names: tuple[str, ...], read_only: tuple[str, ...] = ()) -> dict[str, Score]:
        with (
            clock.measure("scoring"),
            torch.autocast(args.device.type, torch.bfloat16, enabled=casts),
            open_model(trainer, [asked[name] for name in names], [asked[name] for name in read_only]) as opened,
        ):
            scores = {}
            for name in names + read_only:
                scores[name], predictions = score_task(
                    opened, asked[name], tokenizer, args.device, args.process_index, args.world_size, scoring.temperature,
                    name in read_only, show,
                )  # fmt: skip
                if reporter.is_first:
                    round_.write_predictions(moment, name, predictions)
        return scores

    def read(start: list[Reading] | None = None) -> list[Reading]:
        with clock.measure("scoring"), torch.autocast(args.device.type, torch.bfloat16, enabled=casts):
            return read_pairs(
                trainer.model_wrapped, pairs, args.device, args.process_index, args.world_size, start, show
            )  # fmt: skip

    before: dict[str, Score] = {}
    read_before: list[Reading] = []

    def recall() -> Memory:
        return {
            "sums": trainer.recall_sums(),
            "before": {name: value.model_dump() for name, value in before.items()},
            "read_before": [vars(reading) for reading in read_before],
            "reference": reference.recall() if reference is not None else None,
            "methods": [method.recall() for method in methods],
            "gradient_bytes": callback.gradient_bytes,
        }

    def restore(memory: Memory) -> None:
        trainer.restore_sums(memory["sums"])
        before.update({name: Score(**values) for name, values in memory["before"].items()})
        read_before.extend(Reading(**tensors) for tensors in memory["read_before"])
        if reference is not None:
            reference.restore(trainer, memory["reference"])
        for method, recalled in zip(methods, memory["methods"], strict=True):
            method.restore(recalled)
        callback.gradient_bytes = memory["gradient_bytes"]

    def measure_start() -> None:
        if step is not None:
            restore(read_memory(step, args))
            return
        before.update(score("before", scoring.before, held_out))
        if pairs is not None:
            read_before.extend(read())
        if reference is not None:
            with clock.measure("referencing"):
                reporter.report("referencing")
                reference.prepare(trainer)

    callback = RoundCallback(reporter, measure_start)
    keeper = StepKeeper(round_, origin, stop, args, recall)
    callbacks = [callback, keeper]
    if spec.objective == "sft":
        trainer = TaskTrainer(model, args, dataset, tokenizer, callbacks, methods, spec.train.loss_kernel)
    else:
        trainer = PairTrainer(
            model, args, dataset, tokenizer, callbacks, methods, spec.train.loss_kernel, reference, second
        )  # fmt: skip
    if isinstance(reference, SharedReference):
        reference.remember(model)  # before a step checkpoint is laid in
    with clock.measure("training"):
        outcome = trainer.train(resume_from_checkpoint=str(step) if step else None)
    with keeper.stopping(trainer):
        keeper.check()
    clock.seconds["training"] -= clock.seconds["scoring"] + clock.seconds["referencing"]

    # 5. Save, verify against the start, score again. Every rank gathers; rank 0 writes.
    with clock.measure("saving"):
        reporter.report("saving")
        if any(method.leaves_another_model for method in methods):
            keeper.save_end(trainer)  # a stop comes too late for it afterwards
        for method in methods:
            method.finish(trainer, round_)
        dtype = read_start_dtype(spec.model, start)
        updates, weights = {}, {}
        for name, values in gather_weights(trainer.model, is_sharded(spec)):
            if reporter.is_first:
                weights[name] = values
        if reporter.is_first:
            updates = measure_updates(weights, start, dtype, plan)
            weights = {name: values.to(dtype) for name, values in weights.items()}
            if spec.checkpoint.format == "delta":
                save_delta(trainer.model, tokenizer, weights, round_.checkpoint, start, plan)
            else:
                save_checkpoint(trainer.model, tokenizer, weights, round_.checkpoint)
            write_model(round_.checksums_path, Checksums(files=seal_files(round_.checkpoint, list_files(round_.checkpoint))))
    with keeper.stopping(trainer):
        keeper.check()
        after = score("after", scoring.after, (*scoring.likelihood, *held_out))
        read_after = read(read_before) if pairs is not None else None
    pair_scores = None
    if pairs is not None:
        pair_scores = PairScores(
            before=score_pairs(read_before, read_before, spec.dpo.beta, args.device, args.world_size),
            after=score_pairs(read_after, read_before, spec.dpo.beta, args.device, args.world_size),
        )
    if not reporter.is_first:
        return
    with clock.measure("verifying"):
        reporter.report("verifying")
        verification = verify_checkpoint(start, round_.checkpoint, plan, updates)
    write_model(round_.scores_path, Scores(before=before, after=after))

    # 6. Done.
    result = RoundResult(
        fingerprint=plan.fingerprint,
        rank_fingerprints=fingerprints,
        precision="bfloat16" if is_mixed(spec) else "float32",
        loss_kernel=spec.train.loss_kernel,
        num_steps=trainer.state.global_step,
        train_loss=outcome.training_loss,
        num_tokens=trainer.num_tokens,
        seconds=clock.seconds,
        resumed_from=int(step.name) if step else None,
        step_saves=StepSaves(
            num_saves=keeper.num_saves, seconds=trainer.saving_seconds + keeper.seconds, num_bytes=keeper.num_bytes
        ),
        peak_memory_bytes=measure_peak_memory(),
        gradient_bytes=callback.gradient_bytes,
        optimizer_bytes=measure_optimizer_bytes(trainer.optimizer),
        updates=updates,
        verification=verification,
        data=data_report,
        reference=describe_reference(spec, reference, second),
        pairs=pair_scores,
        fit=fit,
        hardware=describe_hardware(args.world_size),
    )
    write_model(round_.result_path, result)


def prepare_rows(spec: RoundSpec, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> tuple[Dataset, DataReport]:
    """The tokens of the rows to train on."""

    def show(done: int, total: int) -> None:
        reporter.report("tokenizing", done, total)

    if spec.task is not None:
        task = load_task(spec.task, spec.data.root, "train", spec.data.max_examples)
        return prepare_task(task, spec.data, tokenizer, default_cache(), show)
    if spec.objective == "sft":
        return prepare_dataset(spec.data, spec.train, tokenizer, default_cache(), show)
    return prepare_pairs(spec.data, tokenizer, default_cache(), show)


@contextmanager
def open_model(
    trainer: TaskTrainer | PairTrainer, tasks: list[TokenizedTask], read_only: list[TokenizedTask]
) -> Iterator[torch.nn.Module]:
    """The model as scoring these tasks needs it: where a cache is used, with weights that are whole on every rank."""
    if not any(task.prompts for task in tasks) and not any(task.questions for task in tasks + read_only):
        yield trainer.model_wrapped
        return
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as whole:
        yield whole


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


def make_reference(spec: RoundSpec, start: Path, data: DataReport, reporter: Reporter) -> Reference | None:
    """What stands in for a second model; None where there is one, or nothing to refer to."""
    if spec.reference == "shared":
        return SharedReference()
    if spec.reference == "precompute":
        # The weights are read whole for the key, which rank 0 alone needs.
        key = make_reference_key(spec, start, data.key, is_mixed(spec)) if reporter.is_first else ""
        path = default_cache("references") / f"{key}.safetensors"
        return PrecomputedReference(path, lambda *count: reporter.report("referencing", *count))
    return None


def describe_reference(spec: RoundSpec, reference: Reference | None, second: PreTrainedModel | None) -> ReferenceReport | None:
    if spec.reference is None:
        return None
    if reference is None:
        held = [value.ds_tensor if is_partitioned(value) else value for value in second.parameters()]
        return ReferenceReport(mode="full", key=None, is_reused=False, num_bytes=sum(value.nbytes for value in held))
    return ReferenceReport(mode=spec.reference, key=reference.key, is_reused=reference.is_reused, num_bytes=reference.num_bytes)


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


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


def measure_peak_memory() -> int:
    """Peak bytes of this process: of the GPU's allocator, or its resident set where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_hardware(num_ranks: int) -> Hardware:
    has_gpu = torch.cuda.is_available()
    return Hardware(
        device=torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        num_processes=num_ranks,
        num_cores=os.cpu_count(),
        num_threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
