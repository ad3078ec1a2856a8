"""The budget of a recipe or of a round, and the fit: the micro-batch, checkpointing and loss kernel that a device carries."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from hftcli.errors import InputError
from hftcli.freezing.activations import Adapters, Arithmetic, Attention, LossKernel, Network, Workload
from hftcli.freezing.budget import Budget
from hftcli.freezing.redrawing import hold_waiting
from hftcli.freezing.selection import FreezePlan
from hftcli.freezing.states import find_form
from hftcli.launching.holding import OFFLOADED_OPTIM, count_held, find_limits, list_uncounted
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.sections import TrainSection
from hftcli.runs.records import FitReport
from hftcli.runs.spec import RoundSpec

NO_GPU_TO_FIT = ("train.fit: auto reads the GPU's memory, and there is no GPU", "set train.memory_bytes")
PLAIN_BYTES = 2**30  # of float32 logits, up to which they are kept without being asked


def make_budget(
    source: Recipe | RoundSpec, network: Network, plan: FreezePlan, num_processes: int, mixed: bool, has_gpu: bool = True,
    adapters: Adapters | None = None,
) -> Budget:  # fmt: skip
    """What a plan costs under the settings of a recipe or a round.

    Args:
        num_processes: devices that share the work.
        mixed: compute in bfloat16, with float32 masters for what trains.
        has_gpu: whether the devices are GPUs.
        adapters: what trains in place of the weights, where that was counted.
    """
    if source.freeze.redraw is not None:
        network = replace(network, held=hold_waiting(network.held, network.units, source.freeze, plan.round_index))
    kernels = list_kernels(source.train, has_gpu, source.method.needs_logits)
    return Budget(
        plan=plan,
        precision="mixed" if mixed else "float32",
        num_processes=num_processes,
        zero_stage=source.launch.zero_stage,
        network=network,
        work=make_workload(source, network, find_arithmetic(mixed, num_processes, source.launch.offload), has_gpu),
        reference="shared" if source.method.start_readers else source.reference,  # it is laid in as DPO's is
        adapters=adapters or find_adapters(source),
        on_gpu=has_gpu,
        offload=source.launch.offload == "optimizer",
        num_accumulation_steps=-(-source.train.global_batch_size // (source.train.per_device_train_batch_size * num_processes)),
        optimizer=find_form(source.train.extra.get("optim", "adamw_torch_fused"), source.train.extra.get("optim_args")),
        num_readings=source.method.num_readings + (source.dpo is not None and source.reference != "precompute"),
        asks_start=bool(source.method.start_readers),
        held_bytes=count_held(source, num_processes, mixed),
        uncounted=list_uncounted(source),
        limits=find_limits(source, kernels[-1]),
    )


def bound_batch(train: TrainSection, num_processes: int) -> TrainSection:
    """The settings with a micro-batch of no more than a process's share of the global batch."""
    share = train.global_batch_size // num_processes
    if train.per_device_train_batch_size <= share or train.global_batch_size % num_processes or train.fit is not None:
        return train
    return train.model_copy(update={"per_device_train_batch_size": share})


def find_adapters(source: Recipe | RoundSpec) -> Adapters | None:
    """The low-rank adapters that train in place of matrices, where a method has them."""
    lora = source.method.lora or source.method.olora
    if lora is None:
        return None
    return Adapters(lora.r, has_dropout=lora.lora_dropout > 0 and source.dpo is None)


def make_workload(source: Recipe | RoundSpec, network: Network, arithmetic: Arithmetic, has_gpu: bool) -> Workload:
    """The micro-batch of a recipe or a round, with sequences of full length."""
    train = source.train
    every = (train.extra.get("activation_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    work = Workload(
        num_sequences=train.per_device_train_batch_size * count_sequences(source),
        length=source.data.max_length,
        packed=train.packing and source.dpo is None,
        attention=find_attention(source.model.attn_implementation),
        arithmetic=arithmetic,
        checkpoint_every=every if train.activation_checkpointing else None,
    )
    is_small = 4 * work.num_tokens * network.vocabulary <= PLAIN_BYTES
    kernels = list_kernels(train, has_gpu, source.method.needs_logits)
    return replace(work, loss=kernels[0] if is_small else kernels[-1])


def list_kernels(train: TrainSection, has_gpu: bool, needs_logits: bool = False) -> tuple[LossKernel, ...]:
    """The loss kernels that settings admit, the better ones first.

    Args:
        needs_logits: whether a method reads all of them.
    """
    if needs_logits or train.extra.get("label_smoothing_factor"):
        return ("plain",)  # TRL keeps the logits for the latter
    if train.loss_kernel is not None:
        return (train.loss_kernel,)
    return ("chunked",) if has_gpu else ("plain", "chunked")


def count_sequences(source: Recipe | RoundSpec) -> int:
    """Sequences that a unit of the batch is: a pair has two."""
    return 1 if source.dpo is None else 2


def find_arithmetic(mixed: bool, num_processes: int, offload: Literal["optimizer", "none"] = "none") -> Arithmetic:
    """How a process computes: DeepSpeed, which several processes mean, holds its weights in bfloat16, as does offloading."""
    if not mixed:
        return "float32"
    return "autocast" if num_processes == 1 and offload == "none" else "bfloat16"


def find_attention(implementation: str | None) -> Attention:
    """The kind of kernel that transformers' name means; null is `sdpa` in every family that is counted."""
    if implementation is not None and ("flash" in implementation or "flex" in implementation):
        return "flash"
    return "eager" if implementation == "eager" else "sdpa"


def choose_fit(source: Recipe | RoundSpec, budget: Budget, memory_bytes: int, has_gpu: bool = True) -> FitReport:
    """What a memory carries: least is computed again, then most sequences go at once.

    Args:
        budget: that of the recipe or the round.
        memory_bytes: what one device may use.
        has_gpu: whether the devices are GPUs.

    Raises:
        InputError: nothing fits, or the model's activations are not counted.
    """
    if budget.half_step is None:
        raise InputError(
            f"train.fit: the activations of model_type {budget.network.model_type!r} are not counted",
            "set train.per_device_train_batch_size and train.activation_checkpointing by hand",
        )
    per_process = source.train.global_batch_size // budget.num_processes
    most = min(per_process, source.train.per_device_train_batch_size)
    sizes = [size for size in range(most, 0, -1) if per_process % size == 0]
    needed = 0
    for work in list_works(budget, list_kernels(source.train, has_gpu, source.method.needs_logits)):
        for size in sizes:
            sized = replace(work, num_sequences=size * count_sequences(source))
            needed = replace(budget, work=sized).half.high_bytes
            if needed <= memory_bytes:
                return FitReport(
                    per_device_train_batch_size=size,
                    checkpoint_every=work.checkpoint_every,
                    loss_kernel=work.loss,
                    needed_bytes=needed,
                    memory_bytes=memory_bytes,
                )
    raise InputError(
        f"train.fit: a micro-batch of 1 with {source.data.max_length} tokens and every layer checkpointed needs {needed:,} "
        f"bytes on a device, and there are {memory_bytes:,}",
        "lower data.max_length, use more processes with launch.zero_stage 2 or 3, or take a smaller model",
    )


def apply_fit(train: TrainSection, fit: FitReport) -> TrainSection:
    """The settings with the choice in place of `fit`."""
    every = fit.checkpoint_every
    found: dict[str, Any] = {
        "fit": None,
        "memory_bytes": None,
        "per_device_train_batch_size": fit.per_device_train_batch_size,
        "activation_checkpointing": every is not None,
        "loss_kernel": fit.loss_kernel,
    }
    if every is not None:
        kwargs = train.extra.get("activation_checkpointing_kwargs") or {}
        found["activation_checkpointing_kwargs"] = {**kwargs, "every_n_layers": every}
    return TrainSection(**{**train.model_dump(), **found})


def list_works(budget: Budget, kernels: Sequence[LossKernel]) -> list[Workload]:
    """A budget's micro-batch with all checkpointing and these loss kernels, from that which computes least again."""
    intervals = list_checkpointing(budget.network.num_layers)
    works = [replace(budget.work, checkpoint_every=every, loss=kernel) for every in intervals for kernel in kernels]
    return sorted(works, key=lambda work: _count_again(replace(budget, work=work)))


def _count_again(budget: Budget) -> float:
    """FLOPs of a token's second forward pass; 0 where they are not counted."""
    return budget.half_step[1].recompute if budget.half_step is not None else 0.0


def list_checkpointing(num_layers: int) -> Iterator[int | None]:
    """From no layer computed again to all of them; of the intervals that come to as many layers, the smallest.

    The smallest interval ends lowest: the highest layers are computed again while all below them is still kept.
    """
    yield None
    yield from {-(-num_layers // every): every for every in range(num_layers, 0, -1)}.values()


def check_pull(spec: RoundSpec) -> None:
    """Raises: InputError: several processes cannot pull or average by whole tensors, or redraw what trains."""
    if spec.freeze.redraw is not None and spec.launch.num_ranks > 1 and spec.launch.zero_stage > 0:
        raise InputError(
            f"freeze.redraw changes what trains within the round, and under launch.zero_stage {spec.launch.zero_stage} "
            "gradients and states are laid out once, for all of it",
            "set launch.num_processes: 1, or launch.zero_stage: 0 with train.bf16: false, or drop freeze.redraw",
        )
    if spec.freeze.choice == "spiel" and spec.launch.num_ranks > 1 and spec.launch.zero_stage > 0:
        raise InputError(
            f"freeze.part: spiel changes what trains within the round, and under launch.zero_stage {spec.launch.zero_stage} "
            "each process steps on flat pieces of them",
            "set launch.num_processes: 1, or launch.zero_stage: 0 with train.bf16: false, or take freeze.part: random",
        )
    pull, launch = spec.freeze.pull, spec.launch
    if pull is not None and pull.selective and launch.num_ranks > 1 and launch.zero_stage > 0:
        raise InputError(
            f"freeze.pull.selective looks at whole tensors, and under launch.zero_stage {launch.zero_stage} each process steps "
            "on flat pieces of them",
            "set freeze.pull.selective: false, which goes with every stage, or launch.zero_stage: 0 with train.bf16: false",
        )
    if spec.freeze.average == "dynamic" and launch.num_ranks > 1 and launch.zero_stage > 0:
        raise InputError(
            f"freeze.average: dynamic measures whole tensors, and under launch.zero_stage {launch.zero_stage} each process "
            "steps on flat pieces of them",
            "set freeze.average: 0.99, which goes with every stage, or launch.zero_stage: 0 with train.bf16: false",
        )


def check_offload(spec: RoundSpec) -> None:
    """Raises: InputError: the launch cannot have its optimizer on the host."""
    if spec.launch.offload == "none":
        return
    if spec.launch.num_ranks > 1 and spec.launch.zero_stage < 2:
        raise InputError(
            f"launch.offload: optimizer with {spec.launch.num_ranks} processes needs launch.zero_stage 2 or 3, and it is "
            f"{spec.launch.zero_stage}",
            "set launch.zero_stage: 2",
        )
    if names := [name for name in spec.method.names if name != "replay"]:
        raise InputError(
            f"method.{names[0]} works on gradients and weights on the device, and launch.offload keeps them on the host",
            "set launch.offload: none, or defend what was learned with method.replay",
        )
    optim = spec.train.extra.get("optim", OFFLOADED_OPTIM[0])
    if optim not in OFFLOADED_OPTIM:
        raise InputError(f"train.optim: {optim} does not run on the host", "drop it, or set launch.offload: none")
