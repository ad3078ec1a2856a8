"""A prepared round of one process, run as a rank under DeepSpeed's launcher, which hft itself uses from two processes on.

    PYTHONPATH=scripts:. deepspeed --num_gpus 1 --no_local_rank --module gpu.one_rank ROUND

Leaves the run's held.json: how many weights train, how many masters and moments the rank holds, and in what.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from hftcli.launching.processes import StopRequest, hold_round
from hftcli.models import device
from hftcli.runs.run import Round

# One rank takes the way of several: said before any other module takes the name.
device.is_sharded = lambda spec: True

from hftcli.training import round as training_round

MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")  # of ZeRO 1 and 2, of ZeRO 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning-rate-factor", type=float, default=1.0)
    parser.add_argument("round", type=Path)
    arguments = parser.parse_args()
    round_ = Round(arguments.round)
    held: dict[str, Any] = {}

    measure = training_round.measure_optimizer_bytes

    def look(optimizer: torch.optim.Optimizer) -> int:
        held.update(describe_held(optimizer))
        return measure(optimizer)

    training_round.measure_optimizer_bytes = look
    make_arguments = training_round.make_training_arguments

    def change_rate(*given: Any) -> Any:
        args = make_arguments(*given)
        args.learning_rate *= arguments.learning_rate_factor
        return args

    training_round.make_training_arguments = change_rate
    with hold_round(round_):
        training_round.run_round(round_, StopRequest(round_))
    result = round_.read_result()
    held |= {"num_trained": round_.read_plan().num_trainable, "verified": result.verification.passed}
    (round_.folder.parent.parent / "held.json").write_text(json.dumps(held), encoding="utf-8")
    torch.distributed.destroy_process_group()


def describe_held(optimizer: Any) -> dict[str, Any]:
    """DeepSpeed's optimizer around torch's: its masters, and the moments of the inner one."""
    while hasattr(optimizer, "optimizer") and not any(hasattr(optimizer, name) for name in MASTERS):
        optimizer = optimizer.optimizer
    name = next((name for name in MASTERS if hasattr(optimizer, name)), None)
    inner = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
    masters = [value for group in inner.param_groups for value in group["params"]]
    if name is not None:
        masters = list(getattr(optimizer, name))
    moments = [state["exp_avg"] for state in inner.state.values() if "exp_avg" in state]
    return {
        "optimizer": type(optimizer).__name__,
        "inner": type(inner).__name__,
        "num_masters": sum(value.numel() for value in masters),
        "masters_dtype": str(masters[0].dtype),
        "num_first_moments": sum(value.numel() for value in moments),
        "moments_dtype": str(moments[0].dtype),
    }


if __name__ == "__main__":
    main()
