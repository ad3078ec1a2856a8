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
from trl import SFTTrainer

from hftcli.chat import set_chat_template
from hftcli.data import check_positions, default_cache, prepare_dataset
from hftcli.errors import HftError, TrainingError
from hftcli.evaluate import score_rows, tokenize_task
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.models import (
    describe_model,
    fetch_checkpoint,
    gather_weights,
    load_model,
    load_tokenizer,
    measure_updates,
    read_start_dtype,
    save_checkpoint,
    verify_checkpoint,
)
from hftcli.run import Failure, Hardware, Round, RoundResult, Score, Scores, write_model
from hftcli.tasks import load_task
from hftcli.trainers import (
    Reporter,
    RoundCallback,
    is_mixed,
    is_sharded,
    make_training_arguments,
    measure_optimizer_bytes,
    silence_libraries,
)


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
    plan = make_plan(assign_roles(description.model_type, description.parameters), spec.freeze, spec.index)
    tokenizer = load_tokenizer(start)
    set_chat_template(tokenizer, spec.model.chat_template)
    tasks = {name: tokenize_task(load_task(name), tokenizer) for name in spec.tasks}

    # 2. Rows to tokens, once for all ranks.
    with clock.measure("tokenizing"):
        reporter.report("tokenizing")
        dataset, data_report = prepare_dataset(
            spec.data, spec.train, tokenizer, default_cache(), lambda *count: reporter.report("tokenizing", *count)
        )

    # 3. The ranks join, agree on the plan, and load the start with one half frozen.
    args = make_training_arguments(spec, round_.folder)
    fingerprints = gather_fingerprints(plan, args.world_size)
    if reporter.is_first:
        write_model(round_.plan_path, plan)
    with clock.measure("loading"):
        reporter.report("loading")
        model = load_model(spec.model, start, plan, is_mixed(spec), is_sharded(spec))

    # 4. Train, with the tasks scored before the first step.
    def score() -> dict[str, Score]:
        casts = is_mixed(spec) and not is_sharded(spec)  # DeepSpeed holds its weights in bfloat16
        with clock.measure("scoring"), torch.autocast(args.device.type, torch.bfloat16, enabled=casts):
            return {
                name: score_rows(
                    trainer.model_wrapped, rows, args.device, args.process_index, args.world_size,
                    lambda *count: reporter.report("scoring", *count),
                )
                for name, rows in tasks.items()
            }  # fmt: skip

    before: dict[str, Score] = {}
    callback = RoundCallback(reporter, lambda: before.update(score()))
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
    with clock.measure("training"):
        outcome = trainer.train()
    clock.seconds["training"] -= clock.seconds["scoring"]

    # 5. Save, verify against the start, score again. Every rank gathers; rank 0 writes.
    with clock.measure("saving"):
        reporter.report("saving")
        dtype = read_start_dtype(spec.model, start)
        updates, weights = {}, {}
        for name, values in gather_weights(trainer.model, is_sharded(spec)):
            if reporter.is_first:
                weights[name] = values
        if reporter.is_first:
            updates = measure_updates(weights, start, dtype, plan)
            weights = {name: values.to(dtype) for name, values in weights.items()}
            save_checkpoint(trainer.model, tokenizer, weights, round_.checkpoint)
    after = score()
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
        hardware=describe_hardware(args.world_size),
    )
    write_model(round_.result_path, result)


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("tokenizing", "loading", "scoring", "training", "saving", "verifying"), 0.0)

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
