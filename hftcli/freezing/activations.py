"""What the operations of a forward pass keep for the backward pass, in bytes and FLOPs; `passes.py` puts a model's together.

The forward pass is walked operation by operation, without a tensor, by autograd's own rules: a matrix multiplication keeps its
input only where its weight trains, its gradient is passed on only where its input has one, and a tensor that several operations
keep is kept once. So a freeze plan has its own bill: a frozen linear saves its weight's gradient and, unless another reader
keeps it, its input; below the lowest trained parameter there is no graph at all.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hftcli.freezing.directions import Directions, Part
from hftcli.freezing.held import NOTHING_WIDE, Held
from hftcli.freezing.roles import Unit

Attention = Literal["eager", "sdpa", "flash"]
LossKernel = Literal["plain", "chunked"]
Arithmetic = Literal["float32", "autocast", "bfloat16"]


@dataclass(frozen=True)
class Workload:
    """What goes through the model at once, and how.

    Attributes:
        num_sequences: sequences of a forward pass on one device, at least 1; both answers of each pair with DPO.
        length: tokens of a sequence.
        packed: the sequences are laid into one row, whose attention is kept apart by a mask.
        attention: the kernel; `flash` needs no mask, `eager` keeps every score.
        loss: `chunked` is TRL's, which never has all logits at once; `plain` keeps them, here of every token.
        arithmetic: `autocast` computes in bfloat16 and holds what trains in float32; `bfloat16` is DeepSpeed's.
        checkpoint_every: every so many layers keep their input alone; None keeps all.
    """

    num_sequences: int
    length: int
    packed: bool = False
    attention: Attention = "sdpa"
    loss: LossKernel = "chunked"
    arithmetic: Arithmetic = "float32"
    checkpoint_every: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of a micro-batch, padding counted."""
        return self.num_sequences * self.length

    @property
    def num_keys(self) -> int:
        """Tokens that a row has: what attention's scores are square in."""
        return self.num_tokens if self.packed else self.length

    @property
    def is_masked(self) -> bool:
        """Whether attention reads a mask; without one it is plainly causal. One row alone needs no padding."""
        return self.attention != "flash" and (self.packed or self.num_sequences > 1)


@dataclass(frozen=True)
class Network:
    """A model as its parameters show it.

    Attributes:
        model_type: the family, as transformers' config names it.
        units: all units, as `assign_roles` gives them.
        num_heads: of the attention's queries.
        held: what one process in bfloat16 holds in float32 though it does not train.
    """

    model_type: str
    units: tuple[Unit, ...]
    num_heads: int
    held: Held = NOTHING_WIDE

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return len({unit.layer for unit in self.units if unit.layer is not None})

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings or the head, whichever has more; 0 without either."""
        sizes = [unit.parameters[0].shape[0] for unit in self.units if unit.role in ("embedding", "head")]
        return max(sizes, default=0)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the matrix multiplications, for each token of a step; all else is left out.

    Attributes:
        forward: the forward pass.
        activation_gradient: gradients with regard to activations.
        weight_gradient: gradients with regard to what trains.
        recompute: what the backward pass computes again: checkpointed layers, and the chunked loss's logits.
        reading_ahead: forward passes besides, of the start or of the model itself, which a method or DPO's reference makes of
            every micro-batch.
    """

    forward: float
    activation_gradient: float
    weight_gradient: float
    recompute: float
    reading_ahead: float = 0.0

    @property
    def total(self) -> float:
        """Per token, forward and backward."""
        return self.forward + self.activation_gradient + self.weight_gradient + self.recompute + self.reading_ahead


@dataclass(frozen=True)
class Activations:
    """What a forward and a backward pass hold on one device.

    Attributes:
        saved_bytes: what autograd keeps at the end of the forward pass; parameters are not counted.
        peak_bytes: the most that is kept at once, with the layer that is being computed again.
        working_bytes: what is held besides at the fullest moment: the loss's tile, gradients on their way, autocast's copies of
            weights that the backward pass does not need.
        fallback_bytes: what kernels may keep besides where the fastest one does not apply: keys and values of each query head,
            a copy of the attention's output.
        cast_bytes: bfloat16 copies of weights that are held otherwise, which autocast keeps through the backward pass.
    """

    saved_bytes: int
    peak_bytes: int
    working_bytes: int
    fallback_bytes: int
    cast_bytes: int


@dataclass(frozen=True)
class Adapters:
    """LoRA on every matrix that a plan trains, in place of the matrix: what trains are its two factors.

    Attributes:
        rank: the inner width of the factors; 0 of a type of PEFT's that has none such, of which the weights alone are counted.
        has_dropout: whether their inputs are thinned out.
        name: LoRA's, or that of another of PEFT's types.
        shapes: what trains with these.
    """

    rank: int
    has_dropout: bool = False
    name: str = "LoRA"
    shapes: tuple[tuple[int, ...], ...] | None = None

    @property
    def is_counted(self) -> bool:
        """Whether what they compute and keep is counted, and not their weights alone."""
        return self.rank > 0

    def list_shapes(self, units: Iterable[Unit], trained: Collection[str], parts: Mapping[str, Part]) -> list[tuple[int, ...]]:
        """The shapes of what trains.

        Args:
            parts: of the matrices whose adapter reads in some directions alone.
        """
        if self.shapes is not None:
            return list(self.shapes)
        found: list[tuple[int, ...]] = []
        for parameter in (parameter for unit in units for parameter in unit.parameters if parameter.name in trained):
            if len(parameter.shape) == 2:
                num_outputs, num_inputs = parameter.shape
                part = parts.get(parameter.name)
                num_read = part.num_columns if isinstance(part, Directions) else num_inputs
                found += [(self.rank, num_read), (num_outputs, self.rank)]
        return found


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the forward pass; its identity is that of its storage."""

    num_elements: int
    item_bytes: int
    has_gradient: bool

    @property
    def num_bytes(self) -> int:
        """What it takes where it is kept."""
        return self.num_elements * self.item_bytes


@dataclass(eq=False)
class Ledger:
    """The bill of some operations: what they keep, in bytes and tensors, and FLOPs for each token."""

    network: Network
    work: Workload
    trained: Collection[str]
    adapters: Adapters | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    taken: dict[tuple[str, Value], Value] = field(default_factory=dict)  # what parts keep, by whose it is and what is read
    kept: set[Value] = field(default_factory=set)
    fallback_bytes: int = 0
    cast_bytes: int = 0  # that the graph keeps
    cached_bytes: int = 0  # that autocast has made by the end of the forward pass, of weights that train
    copied_bytes: int = 0  # of those that the graph keeps, copies of weights that do not train: autocast itself keeps none
    gradient_bytes: int = 0  # the largest gradient of a weight, as it is made
    forward: float = 0.0
    activation_gradient: float = 0.0
    weight_gradient: float = 0.0
    recompute: float = 0.0
    last_forward: float = 0.0

    def trains(self, unit: Unit) -> bool:
        """Whether a unit's weight trains."""
        return self.adapters is None and unit.parameters[0].name in self.trained

    def moves(self, unit: Unit) -> bool:
        """Whether something of a unit trains, be it the bias alone."""
        return self.adapters is None and any(parameter.name in self.trained for parameter in unit.parameters)

    def adapts(self, unit: Unit) -> bool:
        """Whether an adapter of a unit's weight trains in its place."""
        return self.adapters is not None and unit.parameters[0].name in self.trained

    def make(self, width: int, item_bytes: int, has_gradient: bool) -> Value:
        """A tensor with so many elements for each token."""
        return Value(width * self.work.num_tokens, item_bytes, has_gradient)

    def keep(self, *values: Value) -> None:
        """Autograd keeps these until the backward pass; what is kept twice counts once."""
        self.kept.update(values)

    def keep_if(self, condition: bool, *values: Value) -> None:
        """Keep these where an operation's backward pass needs them."""
        if condition:
            self.kept.update(values)

    def weight_item_bytes(self, unit: Unit) -> int:
        """Bytes of one weight, as the model holds it."""
        if self.trains(unit):
            return 2 if self.work.arithmetic == "bfloat16" else 4
        name, is_adapted = unit.parameters[0].name, self.adapters is not None
        is_wide = self.network.held.is_wide(name, self.trained, self.parts, is_adapted)
        return 4 if self.work.arithmetic == "float32" or is_wide else 2

    def is_copied(self, unit: Unit) -> bool:
        """Whether a product needs a copy in bfloat16 of a matrix that does not train."""
        return self.network.held.is_copied(unit.parameters[0].name, self.trained, self.adapters is not None)

    def cast(self, value: Value) -> Value:
        """What a matrix multiplication reads: under autocast, each one makes a copy of its own.

        So it does beside masters on the host, where only a frozen weight in float32 makes a value of 4 bytes.
        """
        if self.work.arithmetic != "float32" and value.item_bytes == 4:
            return Value(value.num_elements, 2, value.has_gradient)
        return value

    def embed(self, unit: Unit) -> Value:
        """Look the tokens up: hidden states of the weight's own type."""
        trains = self.trains(unit) or self.adapts(unit)
        self.keep_if(trains, self.make(1, 8, False))  # the tokens themselves
        return self.make(unit.parameters[0].shape[1], self.weight_item_bytes(unit), trains)

    def multiply(self, unit: Unit, value: Value) -> Value:
        """A linear layer."""
        width, num_inputs = unit.parameters[0].shape
        part = self.parts.get(unit.parameters[0].name)
        if part is not None and self.trains(unit):
            return self.multiply_part(part, value)
        trains, value = self.trains(unit), self.cast(value)
        self.keep_if(trains, value)
        if trains:
            self.hold_weight(width * num_inputs, value)
        elif self.work.arithmetic != "float32" and self.is_copied(unit):
            self.copied_bytes += 2 * width * num_inputs * value.has_gradient
        self.last_forward = 2.0 * width * num_inputs
        self.forward += self.last_forward
        self.activation_gradient += self.last_forward * value.has_gradient
        self.weight_gradient += self.last_forward * trains
        if self.adapters is not None and self.adapts(unit):
            self.adapt(self.adapters, width, num_inputs, value)
            return self.make(width, value.item_bytes, True)
        return self.make(width, value.item_bytes, value.has_gradient or self.moves(unit))

    def multiply_part(self, part: Part, given: Value) -> Value:
        """A linear layer of which a part trains: what is kept of its input is kept once for all that read it so."""
        value = self.cast(given)
        whole = part.num_kept == part.num_inputs
        place = (part.input if whole else part.choice, given)
        if place not in self.taken:
            self.taken[place] = value if whole else self.make(part.num_kept, value.item_bytes, False)
            self.forward += 2.0 * part.num_basis_weights
        self.keep(self.taken[place])
        # The merged weight lasts, and is cast once for a step.
        item_bytes = {"float32": 4, "bfloat16": 2, "autocast": 2 + 4}[self.work.arithmetic]
        whole_bytes = (
            part.num_computed * (4 if self.work.arithmetic == "float32" else 2) * (part.num_computed > part.num_trainable)
        )
        self.gradient_bytes = max(self.gradient_bytes, item_bytes * part.num_trainable + whole_bytes)
        self.last_forward = 2.0 * part.num_outputs * part.num_inputs
        self.forward += self.last_forward
        self.activation_gradient += self.last_forward * value.has_gradient
        self.weight_gradient += 2.0 * part.num_computed
        return self.make(part.num_outputs, value.item_bytes, True)

    def hold_weight(self, num_weights: int, value: Value) -> None:
        """Autocast's copy of a weight that trains, which multiplies a value, and its gradient's, before it is added."""
        if self.work.arithmetic == "autocast":
            self.cached_bytes += 2 * num_weights
            self.cast_bytes += 2 * num_weights * value.has_gradient
        item_bytes = {"float32": 4, "bfloat16": 2, "autocast": 2 + 4}[self.work.arithmetic]
        self.gradient_bytes = max(self.gradient_bytes, item_bytes * num_weights)

    def adapt(self, adapters: Adapters, width: int, num_inputs: int, value: Value) -> None:
        """PEFT's adapter beside a linear layer. Under autocast it takes its input to float32, and autocast back: a copy."""
        is_copy = self.work.arithmetic == "autocast" or adapters.has_dropout
        taken = Value(value.num_elements, value.item_bytes, value.has_gradient) if is_copy else value
        inner = self.make(adapters.rank, taken.item_bytes, True)
        self.keep(taken, inner)
        self.keep_if(adapters.has_dropout and value.has_gradient, Value(value.num_elements, 1, False))
        self.hold_weight(adapters.rank * num_inputs, value)
        self.hold_weight(adapters.rank * width, inner)
        flops = 2.0 * adapters.rank * (width + num_inputs)
        self.forward += flops
        self.activation_gradient += flops if value.has_gradient else 2.0 * adapters.rank * width
        self.weight_gradient += flops

    def normalize(self, unit: Unit, value: Value, num_rows: int = 1) -> Value:
        """Root mean square normalization, in float32, of so many rows in each token."""
        trains = self.trains(unit) or self.adapts(unit)  # an adapter of a norm is another weight of it
        exact = value if value.item_bytes == 4 else Value(value.num_elements, 4, value.has_gradient)
        self.keep_if(value.has_gradient, exact, self.make(num_rows, 4, False))
        self.keep_if(trains, Value(value.num_elements, value.item_bytes, value.has_gradient))
        item_bytes = max(value.item_bytes, self.weight_item_bytes(unit))
        return Value(value.num_elements, item_bytes, value.has_gradient or trains)

    def add(self, left: Value, right: Value) -> Value:
        """Sum two values, of the wider type; nothing is kept."""
        item_bytes = max(left.item_bytes, right.item_bytes)
        return Value(left.num_elements, item_bytes, left.has_gradient or right.has_gradient)

    def attend(self, query: Value, key: Value, value: Value, angles: Value) -> Value:
        """Rotary positions and attention."""
        work, num_heads = self.work, self.network.num_heads
        self.keep_if(query.has_gradient or key.has_gradient, angles)
        rotated = max(query.item_bytes, angles.item_bytes)
        query = self.cast(Value(query.num_elements, rotated, query.has_gradient))
        key = self.cast(Value(key.num_elements, rotated, key.has_gradient))
        flows = query.has_gradient or key.has_gradient or value.has_gradient
        output = Value(query.num_elements, query.item_bytes, flows)
        is_grouped = key.num_elements < query.num_elements
        if is_grouped and (work.attention == "eager" or work.is_masked):
            key, value = (Value(query.num_elements, side.item_bytes, side.has_gradient) for side in (key, value))
        self.keep_if(flows, query, key, value)
        if work.attention == "eager":
            scores = self.make(num_heads * work.num_keys, 4, flows)
            self.keep_if(flows, scores)
            self.keep_if(flows and query.item_bytes == 2, Value(scores.num_elements, 2, flows))
        else:
            self.keep_if(flows, output, self.make(num_heads, 4, False))
            self.keep_if(flows and work.is_masked, self.make(work.num_keys, query.item_bytes, False))
            if flows:
                expanded = 2 * (query.num_bytes - key.num_bytes)
                self.fallback_bytes += expanded + output.num_bytes
        # A kernel that knows that attention is causal computes half of the scores.
        width = query.num_elements / work.num_tokens
        reach = work.num_keys if work.attention == "eager" or work.is_masked else work.num_keys / 2
        forward = 4.0 * width * reach
        self.forward += forward
        # Two multiplications become four; kernels that do not keep the scores compute them again.
        self.activation_gradient += forward * flows * (2.0 if work.attention == "eager" else 2.5)
        return output

    def gate(self, gate: Value, up: Value) -> Value:
        """SwiGLU: the product of up with the gate's activation."""
        self.keep_if(gate.has_gradient, gate)
        active = Value(gate.num_elements, gate.item_bytes, gate.has_gradient)
        self.keep_if(up.has_gradient, active)
        self.keep_if(active.has_gradient, up)
        return Value(up.num_elements, up.item_bytes, up.has_gradient or active.has_gradient)
