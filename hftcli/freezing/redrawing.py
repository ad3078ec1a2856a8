"""Redrawing within a round: what trains changes every so many steps, as `freeze.redraw` says.

Two kinds of order. By chance, each draw is made as a round's is, independent of those before: HFT's own half, or with
`group: layer` LISA's layers (arXiv 2403.17919). In turns, the layers come as blocks of neighbours, each once in a cycle: BAdam
(arXiv 2404.02827) and HiFT (arXiv 2401.15207); embeddings and head, where they train, are blocks of their own, with what stands
beside them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil

from hftcli.freezing.held import Held
from hftcli.freezing.roles import Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan, choose_outside_layers, make_plan, rank_random, write_plan

NUM_TRIED_DRAWS = 50  # of which the largest stands for all of a round whose steps are not known yet
LEAST_STEPS, MOST_STEPS = 50, 100  # of a block, by BAdam's rule


def settle_every(rule: FreezeRule, units: Sequence[Unit], num_rows: int, batch_size: int) -> int:
    """Steps from one draw to the next; `auto` is BAdam's: a pass over the rows goes once through the blocks, within bounds."""
    assert rule.redraw is not None
    if rule.redraw.every != "auto":
        return rule.redraw.every
    return min(max(num_rows // (batch_size * len(list_blocks(units, rule))), LEAST_STEPS), MOST_STEPS)


def count_cycle_steps(rule: FreezeRule, units: Sequence[Unit], num_rows: int, batch_size: int) -> int:
    """Steps from one change of the learning rate to the next: of all blocks, where that goes on once a cycle."""
    if rule.redraw is None or rule.redraw.schedule == "step":
        return 1
    return settle_every(rule, units, num_rows, batch_size) * len(list_blocks(units, rule))


def list_draws(units: Sequence[Unit], rule: FreezeRule, round_index: int, num_draws: int) -> list[frozenset[str]]:
    """The names of what trains, draw by draw."""
    assert rule.redraw is not None
    if rule.redraw.order == "random":
        return [frozenset(draw_half(units, rule, round_index, place).trained) for place in range(num_draws)]
    blocks = list_blocks(units, rule)
    order = list(blocks)
    found: list[frozenset[str]] = []
    while len(found) < num_draws:
        if rule.redraw.order == "cyclic":
            order = rank_random(blocks, derive_seed(rule.seed, len(found)), round_index)
        found += [blocks[name] for name in order]
    return found[:num_draws]


def draw_half(units: Sequence[Unit], rule: FreezeRule, round_index: int, place: int) -> FreezePlan:
    """One of the draws by chance; the first is what the round would train without redrawing."""
    return make_plan(units, rule.model_copy(update={"seed": derive_seed(rule.seed, place)}), round_index)


def derive_seed(seed: int, place: int) -> int:
    """Another seed for every draw but the first."""
    return int.from_bytes(hashlib.sha256(f"{seed}/redraw/{place}".encode()).digest()[:6]) if place else seed


def list_blocks(units: Sequence[Unit], rule: FreezeRule) -> dict[str, frozenset[str]]:
    """The blocks that take turns, by name, in the order of `redraw.order`: from the input up but for `descending`.

    Bridges go with the embeddings, and the final norm with the head: where these are frozen, they are in no block.

    Raises:
        ModelError: embeddings and head are one tensor, and one of them is to train and the other not.
    """
    assert rule.redraw is not None
    choose_outside_layers([unit for unit in units if unit.layer is None], rule)  # refuses what cannot be
    layers = sorted({unit.layer for unit in units if unit.layer is not None})
    size = max(int(Fraction(str(rule.trainable_fraction)) * len(layers) + Fraction(1, 2)), 1)
    is_tied = all(unit.role != "head" for unit in units)
    below = [unit for unit in units if unit.role in ("embedding", "bridge")] * (rule.embeddings == "train")
    above = [unit for unit in units if unit.role in ("head", "final_norm")] * (rule.head == "train")
    if is_tied and below:  # the embeddings' gradient is whole only where it reaches them from both sides
        below, above = [*below, *above], []
    members: dict[str, list[Unit]] = {"embeddings": below}
    for start in range(0, len(layers), size):
        own = layers[start : start + size]
        name = f"layer {own[0]}" if len(own) == 1 else f"layers {own[0]} to {own[-1]}"
        members[name] = [unit for unit in units if unit.layer in own]
    members["head"] = above
    if size >= len(layers):
        members = {"all": [unit for group in members.values() for unit in group]}
    found = {
        name: frozenset(parameter.name for unit in group for parameter in unit.parameters)
        for name, group in members.items()
        if group
    }
    return dict(reversed(found.items())) if rule.redraw.order == "descending" else found


def plan_draws(units: Sequence[Unit], rule: FreezeRule, round_index: int, draws: Sequence[frozenset[str]]) -> FreezePlan:
    """The plan of a round of these draws: what trains in any of them is no part of what is frozen."""
    return write_plan(units, {name for draw in set(draws) for name in draw}, rule, round_index)


def try_draws(units: Sequence[Unit], rule: FreezeRule, round_index: int) -> list[frozenset[str]]:
    """Draws that stand for all of a round whose steps are not known yet: every block once, or some by chance."""
    assert rule.redraw is not None
    num_draws = NUM_TRIED_DRAWS if rule.redraw.order == "random" else len(list_blocks(units, rule))
    return list_draws(units, rule, round_index, num_draws)


def plan_largest(units: Sequence[Unit], rule: FreezeRule, round_index: int) -> FreezePlan:
    """The plan of the draw with the most weights, which is what a device must hold at once."""
    sizes = {parameter.name: parameter.num_elements for unit in units for parameter in unit.parameters}
    largest = max(try_draws(units, rule, round_index), key=lambda draw: sum(sizes[name] for name in draw))
    return write_plan(units, set(largest), rule, round_index)


def choose_plan(units: Sequence[Unit], rule: FreezeRule, round_index: int, num_heads: int) -> FreezePlan:
    """What a device holds at once: the plan of the round, or of the largest of its draws."""
    if rule.redraw is not None:
        return plan_largest(units, rule, round_index)
    return make_plan(units, rule, round_index, num_heads)


def hold_waiting(held: Held, units: Sequence[Unit], rule: FreezeRule, round_index: int) -> Held:
    """What is held in float32 beside the largest draw: matrices that wait for theirs are rounded, with masters on the host."""
    trained = {name for draw in try_draws(units, rule, round_index) for name in draw}
    waiting = [parameter for unit in units for parameter in unit.parameters if parameter.name in trained]
    vectors = {parameter.name for parameter in waiting if len(parameter.shape) == 1}
    return replace(held, wide=(held.wide - trained) | vectors)


def describe_draw(units: Sequence[Unit], draw: frozenset[str]) -> str:
    """What of a model trains in a draw: its layers, where these train whole, or how many units; and what stands outside."""
    trained = [unit for unit in units if unit.parameters[0].name in draw]
    inside = [unit for unit in units if unit.layer is not None]
    own = {unit.layer for unit in trained if unit.layer is not None}
    chosen = [unit for unit in trained if unit.layer is not None]
    parts = list(dict.fromkeys(unit.role.replace("_", " ") for unit in trained if unit.layer is None))
    if chosen and len(chosen) == sum(unit.layer in own for unit in inside):
        parts = [("layer " if len(own) == 1 else "layers ") + ", ".join(map(str, sorted(own, key=str))), *parts]
    elif chosen:
        parts = [f"{len(chosen)} of {len(inside)} units in the layers", *parts]
    return ", ".join(parts)


def count_draws(num_steps: int, every: int) -> int:
    """Draws of a round."""
    return ceil(num_steps / every)
