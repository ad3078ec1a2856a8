"""What a freeze plan costs: the bytes that each device holds for weights, gradients, AdamW's state and DPO's reference.

The count is that of the ZeRO paper (arXiv 1910.02054, sections 3.1 and 5): with mixed precision, a weight that trains
costs 16 bytes, and each stage of ZeRO spreads one more part of them over the devices. A frozen weight costs only
itself: no gradient, no moments and no float32 master. Activations, buffers and the allocator's slack come on top.
"""

from dataclasses import dataclass
from typing import Literal

from hftcli.freezing.selection import FreezePlan

Precision = Literal["float32", "mixed"]
ReferenceMode = Literal["precompute", "shared", "full"]


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reference_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reference_bytes


@dataclass(frozen=True)
class Budget:
    """A freeze plan on given devices, beside full fine-tuning on the same ones; see `estimate_memory` for the attributes."""

    plan: FreezePlan
    precision: Precision
    num_processes: int
    zero_stage: int
    reference: ReferenceMode | None = None

    @property
    def half(self) -> Memory:
        """What the plan costs."""
        return self._estimate(self.plan.num_trainable, self.reference)

    @property
    def full(self) -> Memory:
        """What it would cost to train every weight, with a second model where DPO needs a reference."""
        return self._estimate(self.plan.num_parameters, self.reference and "full")

    def _estimate(self, num_trainable: int, reference: ReferenceMode | None) -> Memory:
        return estimate_memory(
            self.plan.num_parameters,
            num_trainable,
            precision=self.precision,
            num_processes=self.num_processes,
            zero_stage=self.zero_stage,
            reference=reference,
        )


def estimate_memory(
    num_parameters: int,
    num_trainable: int,
    *,
    precision: Precision,
    num_processes: int,
    zero_stage: int,
    reference: ReferenceMode | None = None,
) -> Memory:
    """Bytes on each device for training with AdamW.

    Full fine-tuning is the same question with `num_trainable` equal to `num_parameters`.

    Args:
        num_parameters: weights of the model.
        num_trainable: weights that train.
        precision: `mixed` computes in bfloat16, with float32 masters for what trains.
        num_processes: devices that share the work. More than one means DeepSpeed, which keeps masters apart from the
            weights; on one device a weight that trains is its own master.
        zero_stage: what DeepSpeed spreads over the devices: 1 the optimizer's state, 2 also gradients, 3 also weights.
        reference: DPO's: a copy of what trains (`shared`), a second model (`full`), or some bytes a pair (`precompute`).
    """
    num_frozen = num_parameters - num_trainable
    if precision == "float32":
        # From stage 1 on, DeepSpeed keeps a master of its own even of float32 weights.
        optimizer = (12 if num_processes > 1 and zero_stage > 0 else 8) * num_trainable
        weights, gradients = 4 * num_parameters, 4 * num_trainable
    elif num_processes == 1:
        weights, gradients, optimizer = 2 * num_frozen + 4 * num_trainable, 4 * num_trainable, 8 * num_trainable
    else:
        weights, gradients, optimizer = 2 * num_parameters, 2 * num_trainable, 12 * num_trainable

    def share(num_bytes: int, first_stage: int) -> int:
        """One device's part, rounded up, where the stage spreads it."""
        return -(-num_bytes // num_processes) if zero_stage >= first_stage else num_bytes

    # The copy of what trains is held as the weights are.
    trained_bytes = (4 if precision == "float32" or num_processes == 1 else 2) * num_trainable
    references = {"shared": trained_bytes, "full": share(weights, first_stage=3)}
    return Memory(
        weights_bytes=share(weights, first_stage=3),
        gradients_bytes=share(gradients, first_stage=2),
        optimizer_bytes=share(optimizer, first_stage=1),
        reference_bytes=references.get(reference, 0),
    )
