"""One round, one process per rank: from round.json to result.json.

    python -m hftcli.worker RUN/rounds/00-sft
    deepspeed --num_gpus 8 --no_local_rank --module hftcli.worker RUN/rounds/00-sft

Reads top to bottom. The order matters: data are tokenized before any process group exists, the plan is made from the config
alone, parameters are frozen before any optimizer exists, and result.json is written last.
"""

import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from hftcli.chat import set_chat_template
from hftcli.data import check_positions, default_cache, prepare_dataset, prepare_pairs, prepare_task
from hftcli.errors import HftError, InputError, TrainingError
from hftcli.evaluate import Reading, TokenizedTask, read_pairs, score_pairs, score_task, tokenize_task
from hftcli.freezing.activations import Network
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.methods import make_methods
from hftcli.models import (
    describe_model,
    fetch_checkpoint,
    gather_weights,
    is_partitioned,
    load_model,
    load_tokenizer,
    measure_updates,
    read_start_dtype,
    save_checkpoint,
    save_delta,
    verify_checkpoint,
)
from hftcli.planning import apply_fit, choose_fit, make_budget
from hftcli.references import PrecomputedReference, Reference, SharedReference, make_reference_key
from hftcli.run import (
    DataReport,
    Failure,
    FitReport,
    Hardware,
    Moment,
    PairScores,
    ReferenceReport,
    Round,
    RoundResult,
    RoundSpec,
    Score,
    Scores,
    write_model,
)
from hftcli.tasks import load_task
from hftcli.trainers import (
    PairTrainer,
    Reporter,
    RoundCallback,
    TaskTrainer,
    is_mixed,
    is_sharded,
    make_training_arguments,
    measure_optimizer_bytes,
    silence_libraries,
)

PHASES = ("tokenizing", "loading", "scoring", "referencing", "training", "saving", "verifying")


def run_round(round_: Round) -> None:
    """Train one round and leave its checkpoint, scores and result.

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
        rows = {spec.task: dataset}
        for name in dict.fromkeys(name for method in methods for name in method.needed_tasks):
            task = load_task(name, spec.data.root, "train", spec.data.max_examples)
            rows[name], _ = prepare_task(task, spec.data, tokenizer, default_cache())
        for method in methods:
            dataset = method.prepare_rows(dataset, rows)
        pairs = prepare_pairs(spec.pairs, tokenizer, default_cache())[0] if spec.pairs else None

    # 3. The ranks join, agree on the plan, and load the start with one half frozen.
    args = make_training_arguments(spec, round_.folder)
    fingerprints = gather_fingerprints(plan, args.world_size)
    if reporter.is_first:
        write_model(round_.plan_path, plan)
    with clock.measure("loading"):
        reporter.report("loading")
        model = load_model(spec.model, start, plan, is_mixed(spec), is_sharded(spec))
        for method in methods:
            method.prepare_model(model, plan, start, is_mixed(spec), is_sharded(spec))
        second = None
        if spec.reference == "full":
            second = load_model(spec.model, start, plan, is_mixed(spec), is_sharded(spec)).requires_grad_(False)
        reference = make_reference(spec, start, data_report, reporter)

    # 4. Train, with the tasks scored and the reference taken before the first step.
    casts = is_mixed(spec) and not is_sharded(spec)  # DeepSpeed holds its weights in bfloat16

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
                    name in read_only, lambda *count: reporter.report("scoring", *count),
                )  # fmt: skip
                if reporter.is_first:
                    round_.write_predictions(moment, name, predictions)
        return scores

    def read(start: list[Reading] | None = None) -> list[Reading]:
        with clock.measure("scoring"), torch.autocast(args.device.type, torch.bfloat16, enabled=casts):
            return read_pairs(
                trainer.model_wrapped, pairs, args.device, args.process_index, args.world_size, start,
                lambda *count: reporter.report("scoring", *count),
            )  # fmt: skip

    before: dict[str, Score] = {}
    read_before: list[Reading] = []

    def measure_start() -> None:
        before.update(score("before", scoring.before))
        if pairs is not None:
            read_before.extend(read())
        if reference is not None:
            with clock.measure("referencing"):
                reporter.report("referencing")
                reference.prepare(trainer)

    callback = RoundCallback(reporter, measure_start)
    if spec.objective == "sft":
        trainer = TaskTrainer(model, args, dataset, tokenizer, [callback], methods)
    else:
        trainer = PairTrainer(model, args, dataset, tokenizer, [callback], reference, second)
    with clock.measure("training"):
        outcome = trainer.train()
    clock.seconds["training"] -= clock.seconds["scoring"] + clock.seconds["referencing"]

    # 5. Save, verify against the start, score again. Every rank gathers; rank 0 writes.
    with clock.measure("saving"):
        reporter.report("saving")
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
    after = score("after", scoring.after, scoring.likelihood)
    pair_scores = None
    if pairs is not None:
        pair_scores = PairScores(
            before=score_pairs(read_before, read_before, spec.dpo.beta, args.device, args.world_size),
            after=score_pairs(read(read_before), read_before, spec.dpo.beta, args.device, args.world_size),
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
        num_steps=trainer.state.global_step,
        train_loss=outcome.training_loss,
        num_tokens=callback.num_tokens,
        seconds=clock.seconds,
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
    """The round with its micro-batch and checkpointing chosen, where it asks for that.

    Raises:
        InputError: nothing fits, or there is neither a GPU nor `train.memory_bytes`.
    """
    if spec.train.fit is None:
        return spec, None
    memory_bytes = spec.train.memory_bytes
    if memory_bytes is None:
        if not torch.cuda.is_available():
            raise InputError("train.fit: auto reads the GPU's memory, and there is no GPU", "set train.memory_bytes")
        # All ranks must choose alike, so the smallest device of the machine counts, and nothing that changes.
        devices = range(torch.cuda.device_count())
        memory_bytes = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
    budget = make_budget(spec, network, plan, spec.launch.num_ranks, is_mixed(spec))
    fit = choose_fit(spec, budget, memory_bytes)
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


def main() -> None:
    round_ = Round(Path(sys.argv[-1]))
    silence_libraries()
    try:
        run_round(round_)
    except Exception as error:
        known = error if isinstance(error, HftError) else TrainingError(
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}; nothing of {round_.name} is kept, "
            "finished rounds are untouched",
            f"see the end of {round_.log_path}, or run again with --traceback",
        )  # fmt: skip
        if not round_.failure_path.exists():
            failure = Failure(message=known.message, fix=known.fix, exit_code=known.exit_code, traceback=traceback.format_exc())
            write_model(round_.failure_path, failure)
        traceback.print_exc()
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
