"""What a freeze plan costs: the bytes that each device holds, and the FLOPs of a token.

Weights, gradients, AdamW's state and DPO's reference are counted as in the ZeRO paper (arXiv 1910.02054, sections 3.1 and
5), but that gradients are summed in float32: with mixed precision, a weight that trains costs 18 bytes, and each stage of ZeRO
spreads one more part of them over the devices. A frozen weight costs only itself, in float32 where bfloat16 would round it: no
gradient, no moments and no master. Activations are those of `passes.py`, for the micro-batch that the budget names. What
methods hold besides is so many bytes for each weight that trains.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from hftcli.freezing.activations import Activations, Adapters, Flops, LossKernel, Network, Workload
from hftcli.freezing.directions import Directions, Entries, Part, count_basis
from hftcli.freezing.held import NOTHING_WIDE, Held
from hftcli.freezing.passes import count_activations
from hftcli.freezing.selection import FreezePlan
from hftcli.freezing.states import STATE_FORMS, StateForm, list_shapes

Precision = Literal["float32", "mixed"]
ReferenceMode = Literal["precompute", "shared", "full"]

# DeepSpeed's own sizes, in elements: the bucket that gradients are reduced from, and the most that ZeRO 3 has gathered at once.
BUCKET_ELEMENTS, LIVE_ELEMENTS = 500_000_000, 1_000_000_000
LIBRARY_BYTES = 2**26  # workspaces of cuBLAS and cuBLASLt on a Hopper card, and at most on older ones
IN_FLIGHT_BYTES = 2**30  # of gradients that the device still holds while they go to the host
# On a host of 16 cores (scripts/README.md): bytes a second over the bus, and weights a second whose gradients are added up, and
# which are clipped and updated.
BUS_BYTES_S, ADDED_S, UPDATED_S = 55e9, 1.9e9, 3.0e9
MOVING_BYTES = 20  # for an entry that may give way to others: a candidate, its gradient, sums and squares of it, and an age
SLACK_FRACTION = 0.1  # of what comes and goes within a step: rounding and holes in the allocator's blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        methods_bytes: what methods hold for what trains.
        activations_bytes: what autograd keeps at most, with autocast's copies of weights.
        buffers_bytes: what kernels and communication need for a moment.
        library_bytes: what the GPU's matrix library takes for itself.
        spare_bytes: what slower kernels and the allocator may take besides.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    reference_bytes: int = 0
    methods_bytes: int = 0
    activations_bytes: int = 0
    buffers_bytes: int = 0
    library_bytes: int = 0
    spare_bytes: int = 0

    @property
    def low_bytes(self) -> int:
        """What there is in any case: tensors that live from one operation to a later one."""
        states = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.reference_bytes + self.methods_bytes
        return states + self.activations_bytes

    @property
    def total_bytes(self) -> int:
        """What is expected."""
        return self.low_bytes + self.buffers_bytes + self.library_bytes

    @property
    def high_bytes(self) -> int:
        """What is enough."""
        return self.total_bytes + self.spare_bytes


@dataclass(frozen=True)
class HostWork:
    """What an optimizer on the host takes, for each process.

    Attributes:
        host_bytes: masters, moments, gradients, and the page-locked copies that travel.
        down_bytes: gradients that leave the device, for each micro-batch.
        up_bytes: weights that come back, for each step.
        bus_s: seconds of a step for both, at the rate that was measured on one machine.
        update_s: seconds of a step for adding gradients up, clipping and updating there.
    """

    host_bytes: int
    down_bytes: int
    up_bytes: int
    bus_s: float
    update_s: float

    @property
    def bottleneck(self) -> str:
        """Which of the two takes longer."""
        return "the host's update" if self.update_s > self.bus_s else "the bus"


@dataclass(frozen=True)
class MeasuredStep:
    """What two steps on this machine held, in one process.

    Attributes:
        activations_bytes: what autograd kept at the end of the forward pass, parameters not counted.
        peak_bytes: most that the GPU's allocator held; None without a GPU.
        step_s: seconds of the second step.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    peak_bytes: int | None
    step_s: float


@dataclass(frozen=True)
class Limits:
    """What a recipe leaves open to whoever looks for a way to make a round fit.

    Attributes:
        least_loss: the loss kernel that takes the least memory of those that it admits.
        can_offload: whether `launch.offload` goes with it, adapters aside.
        can_fit: whether `train.fit` does.
        most_stage: the highest `launch.zero_stage` of several processes.
    """

    least_loss: LossKernel = "chunked"
    can_offload: bool = True
    can_fit: bool = True
    most_stage: int = 3


@dataclass(frozen=True)
class Budget:
    """A freeze plan on given devices, beside full fine-tuning on the same ones; see `estimate_memory` for the attributes.

    Attributes:
        work: the micro-batch.
        correction: measured over estimated activations, where they were measured.
        adapters: LoRA in place of the matrices that the plan trains.
        on_gpu: whether the devices are GPUs.
        offload: what trains is kept and updated in host memory.
        num_accumulation_steps: micro-batches of a step.
        optimizer: what the optimizer keeps of a tensor.
        num_readings: forward passes of every micro-batch besides the one that trains.
        asks_start: whether the reference is the start of the round, which a method asks, and not DPO's.
        held_bytes: what methods hold on every device for each weight that trains.
        uncounted: what else is held for a while and not counted, in words.
        limits: ways to make it fit that the settings rule out.
    """

    plan: FreezePlan
    precision: Precision
    num_processes: int
    zero_stage: int
    network: Network
    work: Workload
    reference: ReferenceMode | None = None
    correction: float = 1.0
    adapters: Adapters | None = None
    on_gpu: bool = True
    offload: bool = False
    num_accumulation_steps: int = 1
    optimizer: StateForm = STATE_FORMS["adamw_torch_fused"]
    num_readings: float = 0
    asks_start: bool = False
    held_bytes: int = 0
    uncounted: tuple[str, ...] = ()
    limits: Limits = Limits()

    @property
    def host(self) -> HostWork | None:
        """What the host holds and does for the plan; None where it does nothing."""
        if not self.offload:
            return None
        num_own = -(-self.plan.num_trainable // self.num_processes)
        item_bytes = 4 if self.precision == "float32" else 2
        moved = item_bytes * num_own
        # DeepSpeed adds up on the device at stage 2 and sends sums; hft's own sends every micro-batch.
        steps = self.num_accumulation_steps
        return HostWork(
            host_bytes=16 * num_own + moved,
            down_bytes=moved,
            up_bytes=moved,
            bus_s=(steps + 1) * moved / BUS_BYTES_S,
            update_s=num_own * (steps / ADDED_S + 1 / UPDATED_S),
        )

    @property
    def held(self) -> Held:
        """What is held in float32 though it does not train; nothing where DeepSpeed has the weights."""
        return self.network.held if self.num_processes == 1 else NOTHING_WIDE

    @property
    def wide(self) -> dict[str, int]:
        """Sizes, in weights, of what the plan leaves so, by name; they count where the rest is held in bfloat16."""
        return self.held.list_wide(self.network.units, frozenset(self.plan.trained), self.plan.parts, self.adapters is not None)

    @property
    def half(self) -> Memory:
        """What the plan costs."""
        step, parts, num_wide = self.half_step, self.plan.parts, sum(self.wide.values())
        if self.adapters is not None:
            shapes = [(shape, False) for shape in self._adapter_shapes]
            num_bytes = self._count_states(shapes, self.num_adapter_weights)
            num_frozen = self.plan.num_parameters + count_basis(parts)
            return self._estimate(self.num_adapter_weights, self.reference, step, num_bytes, num_frozen, num_wide)
        if parts:
            return self._estimate_parts(parts, step)
        num_bytes = self._count_states(list_shapes(self.network.units, frozenset(self.plan.trained)), self.plan.num_trainable)
        return self._estimate(self.plan.num_trainable, self.reference, step, num_bytes, num_wide=num_wide)

    def _estimate_parts(self, parts: dict[str, Part], step: tuple[Activations, Flops] | None) -> Memory:
        """What trains of matrices lies beside them, and they are held as what is frozen is.

        So are the directions and, but for ZeRO 3, the matrices into which B was merged; columns and entries are merged in their
        place, and where entries lie is held on every device.
        """
        whole = list_shapes(self.network.units, frozenset(self.plan.trained) - parts.keys())
        shapes = [*whole, *((part.shape, False) for part in parts.values())]
        num_whole = sum(prod(shape) for shape, _ in whole)
        directed = [part for part in parts.values() if isinstance(part, Directions)]
        is_split = self.num_processes > 1 and self.zero_stage == 3
        num_merged = 0 if is_split else sum(part.num_outputs * part.num_inputs for part in directed)
        memory = self._estimate(
            self.plan.num_trainable, self.reference, step, self._count_states(shapes, self.plan.num_trainable),
            num_frozen=self.plan.num_parameters - num_whole + count_basis(parts) + num_merged, num_wide=sum(self.wide.values()),
        )  # fmt: skip
        num_places = sum(part.index_bytes for part in parts.values())
        num_moving = sum(part.num_entries for part in parts.values() if isinstance(part, Entries) and part.is_moving)
        memory = replace(
            memory, weights_bytes=memory.weights_bytes + num_places,
            buffers_bytes=memory.buffers_bytes + MOVING_BYTES * num_moving,
        )  # fmt: skip
        if self.reference != "shared":
            return memory
        # Where nothing is added to it, a matrix is its own reference.
        num_copied = self.plan.num_trainable - sum(part.num_trainable for part in directed)
        return replace(memory, reference_bytes=memory.reference_bytes * num_copied // self.plan.num_trainable)

    @property
    def num_adapter_weights(self) -> int:
        """Weights that train beside the model's own, all of which are frozen then."""
        return sum(prod(shape) for shape in self._adapter_shapes)

    @property
    def _adapter_shapes(self) -> list[tuple[int, ...]]:
        if self.adapters is None:
            return []
        return self.adapters.list_shapes(self.network.units, frozenset(self.plan.trained), self.plan.parts)

    @property
    def full(self) -> Memory:
        """What it would cost to train every weight, with a second model where DPO needs a reference."""
        shapes = list_shapes(self.network.units, frozenset((*self.plan.trained, *self.plan.frozen)))
        num_bytes = self._count_states(shapes, self.plan.num_parameters)
        reference = self.reference if self.asks_start else self.reference and "full"
        return self._estimate(self.plan.num_parameters, reference, self.full_step, num_bytes)

    @property
    def half_step(self) -> tuple[Activations, Flops] | None:
        """A step of the plan; None where it is not counted."""
        return self._count(self.plan.trained, self.adapters, self.plan.parts)

    @property
    def full_step(self) -> tuple[Activations, Flops] | None:
        """A step of full fine-tuning; None where it is not counted."""
        return self._count((*self.plan.trained, *self.plan.frozen))

    def _count(
        self, trained: tuple[str, ...], adapters: Adapters | None = None, parts: dict[str, Part] | None = None
    ) -> tuple[Activations, Flops] | None:
        network = replace(self.network, held=self.held)
        if (step := count_activations(network, frozenset(trained), self.work, adapters, parts)) is None:
            return None
        activations, flops = step
        return activations, replace(flops, reading_ahead=self.num_readings * flops.forward)

    def _count_states(self, shapes: Iterable[tuple[tuple[int, ...], bool]], num_trainable: int) -> int:
        """Bytes of the optimizer's state before it is spread. DeepSpeed lays the tensors of what trains end to end."""
        if self.num_processes > 1 and (self.precision == "mixed" or self.zero_stage > 0):
            return self.optimizer.count_bytes((num_trainable,))
        return sum(self.optimizer.count_bytes(shape, is_embedding) for shape, is_embedding in shapes)

    def _estimate(
        self, num_trainable: int, reference: ReferenceMode | None, step: tuple[Activations, Flops] | None, state_bytes: int,
        num_frozen: int | None = None, num_wide: int = 0,
    ) -> Memory:  # fmt: skip
        states = estimate_memory(
            self.plan.num_parameters if num_frozen is None else num_frozen + num_trainable,
            num_trainable,
            precision=self.precision,
            num_processes=self.num_processes,
            zero_stage=self.zero_stage,
            reference=reference,
            state_bytes=state_bytes,
            num_wide=num_wide,
        )
        states = replace(states, methods_bytes=self.held_bytes * num_trainable)
        if self.offload:
            states = self._offload(states)
        if step is None:
            return states
        activations, _ = step
        held = round(self.correction * activations.peak_bytes) + activations.cast_bytes
        buffers = activations.working_bytes + self._estimate_communication(num_trainable)
        return replace(
            states,
            activations_bytes=held,
            buffers_bytes=buffers,
            library_bytes=LIBRARY_BYTES * self.on_gpu,
            spare_bytes=states.spare_bytes + activations.fallback_bytes + round(SLACK_FRACTION * (held + buffers)),
        )

    def _offload(self, states: Memory) -> Memory:
        """What the device keeps: no state, no master of its own, and no gradient that has left it."""
        weights = states.weights_bytes
        if self.precision == "mixed" and self.num_processes == 1:
            weights -= 2 * self.plan.num_trainable  # whose masters are on the host
        # Those on their way come when most activations have gone.
        travelling = min(states.gradients_bytes, IN_FLIGHT_BYTES)
        return replace(states, weights_bytes=weights, gradients_bytes=0, optimizer_bytes=0, spare_bytes=travelling)

    def _estimate_communication(self, num_trainable: int) -> int:
        """DeepSpeed's buffers: at stage 0 a flat copy of gradients, from 1 on a bucket, at 3 also the gathered weights."""
        if self.num_processes == 1:
            return 0
        item_bytes = 4 if self.precision == "float32" else 2
        if self.zero_stage == 0:
            return item_bytes * min(num_trainable, BUCKET_ELEMENTS)
        bucket = (4 if self.zero_stage == 1 else item_bytes) * BUCKET_ELEMENTS
        if self.zero_stage > 1 and self.precision == "mixed":  # its copy in float32, in which the ranks' are added up
            bucket += 4 * min(num_trainable, BUCKET_ELEMENTS)
        gathered = item_bytes * min(self.plan.num_parameters, LIVE_ELEMENTS) if self.zero_stage == 3 else 0
        return bucket + gathered


def estimate_memory(
    num_parameters: int,
    num_trainable: int,
    *,
    precision: Precision,
    num_processes: int,
    zero_stage: int,
    reference: ReferenceMode | None = None,
    state_bytes: int | None = None,
    num_wide: int = 0,
) -> Memory:
    """Bytes on each device.

    Full fine-tuning is the same question with `num_trainable` equal to `num_parameters`.

    Args:
        num_parameters: weights of the model.
        num_trainable: weights that train.
        precision: `mixed` computes in bfloat16, with float32 masters for what trains.
        num_processes: devices that share the work. More than one means DeepSpeed, which keeps masters apart from the
            weights; on one device a weight that trains is its own master.
        zero_stage: what DeepSpeed spreads over the devices: 1 the optimizer's state, 2 also gradients, 3 also weights.
        reference: DPO's: a copy of what trains (`shared`), a second model (`full`), or some bytes a pair (`precompute`).
        state_bytes: of the optimizer, on all devices together; AdamW's, 8 bytes a weight, unless given.
        num_wide: weights that do not train and that one process in bfloat16 holds in float32 all the same.
    """
    num_frozen = num_parameters - num_trainable
    state = 8 * num_trainable if state_bytes is None else state_bytes
    if precision == "float32":
        # From stage 1 on, DeepSpeed keeps a master of its own even of float32 weights.
        optimizer = state + (4 * num_trainable if num_processes > 1 and zero_stage > 0 else 0)
        weights, gradients = 4 * num_parameters, 4 * num_trainable
    elif num_processes == 1:
        weights = 2 * (num_frozen + num_wide) + 4 * num_trainable
        gradients, optimizer = 4 * num_trainable, state
    else:
        # Stage 0, which hft refuses here, would sum gradients in bfloat16; from 1 on they are summed in float32.
        weights, gradients = 2 * num_parameters, (4 if zero_stage else 2) * num_trainable
        optimizer = 4 * num_trainable + state

    def share(num_bytes: int, first_stage: int) -> int:
        """One device's part, rounded up, where the stage spreads it."""
        return -(-num_bytes // num_processes) if zero_stage >= first_stage else num_bytes

    # The copy of what trains is held as the weights are.
    trained_bytes = (4 if precision == "float32" or num_processes == 1 else 2) * num_trainable
    references: dict[ReferenceMode | None, int] = {"shared": trained_bytes, "full": share(weights, first_stage=3)}
    return Memory(
        weights_bytes=share(weights, first_stage=3),
        gradients_bytes=share(gradients, first_stage=2),
        optimizer_bytes=share(optimizer, first_stage=1),
        reference_bytes=references.get(reference, 0),
    )
