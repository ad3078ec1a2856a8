"""Whether a launch can carry what a round asks for."""

from hftcli.errors import InputError
from hftcli.launching.holding import NEEDS_WHOLE_WEIGHTS
from hftcli.launching.packages import check_packages
from hftcli.launching.planning import check_offload, check_pull
from hftcli.recipe.effects import SORTING
from hftcli.runs.spec import RoundSpec
from hftcli.tasks import find_benchmark, find_rows


def check_reference(spec: RoundSpec) -> None:
    """Raises: InputError: the launch cannot carry the reference."""
    if spec.reference == "shared" and spec.method.peft is not None:
        raise InputError(
            "reference: shared lays what trains back to where it was, and an adapter of method.peft may begin elsewhere than "
            "the model does",
            "set reference: precompute, which asks the model without it",
        )
    if spec.reference == "shared" and spec.launch.num_ranks > 1 and spec.launch.zero_stage == 3:
        raise InputError(
            "reference: shared lays the trained half as it was into whole parameters, and under launch.zero_stage 3 each "
            "process holds only pieces of them",
            "set reference: precompute, which needs no second model at any stage, or launch.zero_stage: 2",
        )


def check_round(spec: RoundSpec) -> None:
    """Raises: InputError: something of the round cannot be carried here."""
    check_packages(spec.train, spec.launch)
    check_offload(spec)
    check_pull(spec)
    check_sorting(spec)
    check_method(spec)


def check_sorting(spec: RoundSpec) -> None:
    """Raises: InputError: a loss sorts the pairs of a micro-batch, and there is one pair in it."""
    losses = () if spec.dpo is None else (spec.dpo.loss_type,) if isinstance(spec.dpo.loss_type, str) else spec.dpo.loss_type
    sorting = [name for name in losses if name in SORTING]
    if sorting and spec.train.per_device_train_batch_size == 1:
        raise InputError(
            f"dpo.loss_type {sorting[0]} sorts the pairs of a micro-batch, of which each process has one at a time: nothing is "
            "sorted, and the loss is sigmoid's",
            "set train.per_device_train_batch_size to 2 or more, with a train.global_batch_size that has as many for each "
            "process, and train.fit: null; or take dpo.loss_type: sigmoid",
        )


def check_method(spec: RoundSpec) -> None:
    """Raises: InputError: the launch cannot carry one of the methods, or the rows that one needs are not there."""
    if spec.method.replay and spec.method.replay.extra:
        find_benchmark(spec.method.replay.extra, "method.replay.extra")
        find_rows(spec.method.replay.extra, spec.data.root, "train")
    num_processes, zero_stage = spec.launch.num_ranks, spec.launch.zero_stage
    if spec.method.peft is not None and (readers := spec.method.start_readers):
        raise InputError(
            f"method.{readers[0]} asks the model as it was when the round began, and an adapter of method.peft may begin "
            "elsewhere than the model does",
            f"drop one of the two; method.lora goes with method.{readers[0]}",
        )
    whole = NEEDS_WHOLE_WEIGHTS | dict.fromkeys(spec.method.start_readers, "lays the start in for a pass of its own")
    for name in spec.method.names:
        if name in ("gem", "agem") and num_processes > 1:
            raise InputError(
                f"method.{name} changes the gradient between the backward pass and the step, and with {num_processes} "
                "processes ZeRO has taken it apart by then",
                "set launch.num_processes: 1, or defend what was learned with method.replay or method.ewc",
            )
        if name == "peft" and spec.method.adapter == "adalora" and num_processes > 1:
            raise InputError(
                "method.peft: ADALORA moves ranks by the gradients of a step, which ZeRO does not leave to it",
                "set launch.num_processes: 1, or take another type",
            )
        if name in whole and num_processes > 1 and zero_stage == 3:
            raise InputError(
                f"method.{name} {whole[name]}, and under launch.zero_stage 3 each process holds only pieces of them",
                "set launch.zero_stage: 2",
            )
