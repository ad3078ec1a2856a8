"""A forward and a backward pass through a model: what they hold at their fullest moment, and what they compute.

Recomputation is that of torch's non-reentrant checkpoints, which stop at the last tensor that is needed. A micro-batch is taken
to find the gradients of another one, as all but the first of a step do.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from hftcli.freezing.activations import Activations, Adapters, Flops, Ledger, Network, Value, Workload
from hftcli.freezing.directions import Part
from hftcli.freezing.roles import Unit

CHUNK_TOKENS, CHUNK_VOCABULARY = 4096, 32768  # tile of TRL's chunked loss


@dataclass(frozen=True)
class LossBytes:
    """What the head and the loss need for a moment: in the forward pass, in the backward pass, of it the head's gradient."""

    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class Walk:
    """A forward pass through the layers, and the backward pass back through them.

    Attributes:
        value: the hidden states at the end.
        bottom: the bill of the embeddings.
        layers: the bills of the layers.
        again: those of them that are computed again.
        kept: what is kept at the end of the forward pass.
        peak_bytes: the most that is kept at once, with a layer that is being computed again.
        working_bytes: the most that a layer's backward pass holds of gradients.
    """

    value: Value
    bottom: Ledger
    layers: tuple[Ledger, ...]
    again: tuple[Ledger, ...]
    kept: frozenset[Value]
    peak_bytes: int
    working_bytes: int


def walk_llama(ledger: Ledger, units: dict[str, Unit], value: Value, angles: Value) -> Value:
    """A layer of Llama and its kin: normalization before attention and before the gated mlp; with `q_norm` in Qwen 3."""
    normed = ledger.normalize(units["input_layernorm"], value)
    query, key, values = (ledger.multiply(units[name], normed) for name in ("q_proj", "k_proj", "v_proj"))
    if "q_norm" in units:
        head_width = units["q_norm"].parameters[0].shape[0] * ledger.work.num_tokens
        query = ledger.normalize(units["q_norm"], query, query.num_elements // head_width)
        key = ledger.normalize(units["k_norm"], key, key.num_elements // head_width)
    value = ledger.add(value, ledger.multiply(units["o_proj"], ledger.attend(query, key, values, angles)))
    normed = ledger.normalize(units["post_attention_layernorm"], value)
    product = ledger.gate(*(ledger.multiply(units[name], normed) for name in ("gate_proj", "up_proj")))
    return ledger.add(value, ledger.multiply(units["down_proj"], product))


def count_activations(
    network: Network,
    trained: Collection[str],
    work: Workload,
    adapters: Adapters | None = None,
    parts: Mapping[str, Part] | None = None,
) -> tuple[Activations, Flops] | None:
    """What a forward and a backward pass hold and compute; None for a family whose layers are not written down in `LAYERS`.

    Args:
        trained: names of the parameters that train, or that have adapters.
        adapters: what trains in their place.
        parts: of the matrices that train, those of which a part does.
    """
    if network.model_type not in LAYERS:
        return None
    outside = {unit.role: unit for unit in network.units if unit.layer is None}
    embedding = outside["embedding"]
    walk = walk_layers(network, trained, work, adapters, parts, embedding)
    top = Ledger(network, work, trained, adapters, parts or {})
    value = top.normalize(outside["final_norm"], walk.value)
    loss = bill_loss(top, outside.get("head", embedding), value)

    bills = (walk.bottom, *walk.layers, top)
    lasting = [bill for bill in bills if bill not in walk.again]
    saved = sum_bytes(walk.kept | top.kept)
    peak = max(walk.peak_bytes, saved)
    copies = sum(bill.copied_bytes for bill in lasting)
    lasting_casts = sum(bill.cast_bytes for bill in lasting) + copies
    casts = lasting_casts + max((bill.cast_bytes + bill.copied_bytes for bill in walk.again), default=0)
    # The gradient of a head that is the embeddings waits for theirs, which is added to it at the end.
    waiting = 0 if "head" in outside else loss.gradient_bytes
    own = walk.bottom.weight_item_bytes(embedding) * embedding.num_parameters
    moments = {
        "the loss": saved + sum(bill.cached_bytes for bill in bills) + copies + loss.forward_bytes,
        "the loss's backward pass": saved + lasting_casts + loss.backward_bytes,
        "a layer's backward pass": peak + casts + waiting + walk.working_bytes,
        "the embeddings' backward pass": (waiting + own + walk.value.num_bytes)
        * (walk.bottom.trains(embedding) or walk.bottom.adapts(embedding)),
    }
    activations = Activations(
        saved_bytes=saved,
        peak_bytes=peak,
        working_bytes=max(moments.values()) - peak - casts,
        fallback_bytes=sum(bill.fallback_bytes for bill in lasting)
        + max((bill.fallback_bytes for bill in walk.again), default=0),
        cast_bytes=casts,
    )
    flops = Flops(
        forward=sum(bill.forward for bill in bills),
        activation_gradient=sum(bill.activation_gradient for bill in bills),
        weight_gradient=sum(bill.weight_gradient for bill in bills),
        # What the last multiplication of a layer puts out is kept by nobody, so it is not computed again.
        recompute=sum(bill.forward - bill.last_forward for bill in walk.again) + top.recompute,
    )
    return activations, flops


def walk_layers(
    network: Network, trained: Collection[str], work: Workload, adapters: Adapters | None,
    parts: Mapping[str, Part] | None, embedding: Unit,
) -> Walk:  # fmt: skip
    """From the embeddings to the last layer."""
    layers: dict[int, dict[str, Unit]] = {}
    for unit in network.units:
        if unit.layer is not None:
            layers.setdefault(unit.layer, {})[unit.name.rpartition(".")[2]] = unit
    bottom = Ledger(network, work, trained, adapters, parts or {})
    value = bottom.embed(embedding)
    head_width = layers[0]["q_proj"].parameters[0].shape[0] // network.num_heads
    angles = Value(2 * head_width * work.num_keys, value.item_bytes, False)
    bills: list[Ledger] = []
    again: list[Ledger] = []
    kept = set(bottom.kept)
    peak = working = 0
    for index, units in layers.items():
        bill = Ledger(network, work, trained, adapters, parts or {})
        start, value = value, LAYERS[network.model_type](bill, units, value, angles)
        bills.append(bill)
        working = max(working, count_gradients(bill, units, start))
        if work.checkpoint_every and index % work.checkpoint_every == 0 and value.has_gradient:
            again.append(bill)
            peak = max(peak, sum_bytes(kept | bill.kept))
            kept |= {start, angles}
        else:
            kept |= bill.kept
    return Walk(value, bottom, tuple(bills), tuple(again), frozenset(kept), peak, working)


def count_gradients(bill: Ledger, units: dict[str, Unit], start: Value) -> int:
    """The most that a layer's backward pass holds of gradients.

    Three of the mlp's inner width beside the layer's own, or a weight's own before it is added up.
    """
    inner_bytes = 4 if bill.work.arithmetic == "float32" else 2
    widest = max(unit.parameters[0].shape[0] for unit in units.values()) * bill.work.num_tokens
    return 2 * start.num_bytes + max(3 * widest * inner_bytes, bill.gradient_bytes)


def bill_loss(ledger: Ledger, head: Unit, value: Value) -> LossBytes:
    """Add the head and the loss to a bill."""
    work = ledger.work
    vocabulary, hidden = head.parameters[0].shape
    trains = ledger.trains(head)
    gradient = 4 * head.num_parameters * trains
    if work.loss == "plain":
        logits = ledger.multiply(head, Value(value.num_elements, value.item_bytes, value.has_gradient))
        ledger.keep(ledger.make(vocabulary, 4, True))  # logarithms of the probabilities
        ledger.keep(ledger.make(1, 8 + 1, False))  # target, mask
        rounded = logits.num_bytes if logits.item_bytes == 2 else 0
        needed = 2 * 4 * logits.num_elements + rounded
        return LossBytes(needed, needed + gradient, gradient)
    flops = 2.0 * head.num_parameters
    ledger.forward += flops
    ledger.recompute += flops
    ledger.activation_gradient += flops * value.has_gradient
    ledger.weight_gradient += flops * trains
    # Without the last token of every row, which has no successor: a copy where that leaves gaps.
    ledger.keep(value if work.packed or work.num_sequences == 1 else Value(value.num_elements, value.item_bytes, True))
    ledger.keep(ledger.make(1, 8 + 4 + 4 + 1, False))  # target, logarithm of the sum, entropy, mask
    num_tokens, item_bytes = min(work.num_tokens, CHUNK_TOKENS), 4 if work.arithmetic == "float32" else 2
    tile = num_tokens * CHUNK_VOCABULARY * item_bytes
    # A tile's part of the weight, where its type is another, and of the weight's gradient, where it is not added in place.
    part = min(vocabulary, CHUNK_VOCABULARY) * hidden * item_bytes
    copied = part * (item_bytes < ledger.weight_item_bytes(head))
    rounded = num_tokens * hidden * item_bytes * (item_bytes < 4)
    forward = tile + copied + value.num_bytes + rounded * (item_bytes < value.item_bytes)
    backward = tile + copied + part * trains * (item_bytes < 4) + 4 * value.num_elements + rounded + gradient
    return LossBytes(forward, backward, gradient)


def sum_bytes(values: Iterable[Value]) -> int:
    """What several values take together."""
    return sum(value.num_bytes for value in values)


# How a layer of a family computes. A family that is not here trains all the same; what it holds is for `hft plan --measure`.
LAYERS: dict[str, Callable[[Ledger, dict[str, Unit], Value, Value], Value]] = {
    "llama": walk_llama,
    "mistral": walk_llama,
    "qwen2": walk_llama,
    "qwen3": walk_llama,
}
