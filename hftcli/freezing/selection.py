"""Which half trains: from a model's units, a rule and the index of the round to a freeze plan.

The method is Half Fine-Tuning (arXiv 2404.18466). Three facts describe a draw and are kept apart: which units form a
group, how the units of a group are ranked, and what share of them trains. The draw depends on the seed, the round and
the names alone, and on the units' scores where these rank them, so that it is the same on every rank, machine and Python.
Full fine-tuning is the share 1.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_jsonable_python

from hftcli.errors import ModelError
from hftcli.freezing.counts import RoleCount, count_roles, count_trained, count_trained_units
from hftcli.freezing.directions import (
    Columns,
    Directions,
    Entries,
    Part,
    find_input,
    list_inputs,
    open_columns,
    open_directions,
    open_entries,
)
from hftcli.freezing.roles import Unit
from hftcli.freezing.rule import FreezeRule, ImportanceRule


class FreezePlan(BaseModel):
    """Which parameters train in a round and which are frozen: names, never tensors.

    Raises:
        ModelError: the fingerprint is of another content, as after an edit of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rule: FreezeRule
    """The rule that was followed."""

    round_index: int
    """The round it was drawn for, from 0."""

    trained: tuple[str, ...]
    """Names of the parameters that train, in the model's order."""

    frozen: tuple[str, ...]
    """Names of the parameters that stay as they are, in the model's order."""

    num_parameters: int
    """Weights of the model; tied ones count once."""

    num_trainable: int
    """Weights that train, embeddings and head included."""

    num_units: int
    """Units in the layers."""

    num_trainable_units: int
    """Units in the layers that train."""

    roles: dict[str, RoleCount]
    """The same by role, inside the layers and outside."""

    directions: Annotated[dict[str, Directions] | None, Field(exclude_if=lambda value: value is None)] = None
    """Of the trained matrices, those that train in a part of their directions; null where all train whole."""

    columns: Annotated[dict[str, Columns] | None, Field(exclude_if=lambda value: value is None)] = None
    """Of the trained matrices, those that train in a part of their columns; null where all train whole."""

    entries: Annotated[dict[str, Entries] | None, Field(exclude_if=lambda value: value is None)] = None
    """Of the trained matrices, those that train in a part of their entries; null where all train whole."""

    moments: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """SHA-256 of the second moments of earlier inputs, by which these are chosen; null before they are taken."""

    bases: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """SHA-256 of the file that says which directions, columns or entries these are, or with which the round begins."""

    importance: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """SHA-256 of the file with the scores that rank the units; null where they are drawn, and before they are scored."""

    fingerprint: str
    """SHA-256 of all of the above. An optimizer restores its state by position, so a resume under another plan would
    corrupt weights without a word; equal fingerprints rule that out."""

    @property
    def short_fingerprint(self) -> str:
        """Enough of the fingerprint to tell plans apart by eye."""
        return self.fingerprint[:12]

    @property
    def trainable_fraction(self) -> float:
        """The share of all weights that trains, as achieved; the rule's own share is for the layers only."""
        return self.num_trainable / self.num_parameters

    @property
    def is_ranked(self) -> bool:
        """Whether the units are those that the rule asks for: not while scores that rank them are to come."""
        return self.rule.rank in RANKINGS or self.importance is not None

    @property
    def parts(self) -> dict[str, Part]:
        """Of the trained matrices, those of which a part trains."""
        return {**(self.directions or {}), **(self.columns or {}), **(self.entries or {})}

    @property
    def num_moving(self) -> int:
        """Weights of what a checkpoint has anew: a matrix of which a part trains is written as a whole."""
        return self.num_trainable + sum(part.num_outputs * part.num_inputs - part.num_trainable for part in self.parts.values())

    @model_validator(mode="after")
    def _check_fingerprint(self) -> "FreezePlan":
        expected = _hash_content({name: value for name, value in self if name != "fingerprint"})
        if self.fingerprint != expected:
            raise ModelError(
                f"the freeze plan of round {self.round_index} is not as it was written: "
                f"its fingerprint is {self.short_fingerprint}, its content has {expected[:12]}",
                "restore freeze_plan.json; to train another half, change the recipe",
            )
        return self


def make_plan(
    units: Sequence[Unit],
    rule: FreezeRule,
    round_index: int,
    num_heads: int = 1,
    scores: Mapping[str, float] | None = None,
) -> FreezePlan:
    """Decide what trains in a round.

    Args:
        units: all units of the model, as `assign_roles` gives them.
        round_index: place of the round in the history of the model, from 0; every round draws another half.
        num_heads: of the attention's queries, each of which has directions of its own with `blocks`.
        scores: of the units, by name, where the rule ranks by them; until they are there, a random draw stands in for it.

    Raises:
        ModelError: nothing would train, tied embeddings are to be frozen and trained at once, `frozen_prefix` is less than a
            layer or all of them, the model's matrices do not come apart into directions, what they read is not known, or biases
            are to train and the layers have none.
    """
    num_frozen_layers = count_frozen_layers(units, rule)
    drawn = keep_biases(units) if rule.grain == "biases" else units
    inside = [unit for unit in drawn if unit.layer is not None]
    outside = [unit for unit in drawn if unit.layer is None]
    if rule.rank == "wanda" and (unread := [unit for unit in inside if unit.role != "norm" and find_input(unit) is None]):
        raise ModelError(
            f"freeze.rank: wanda does not know what {unread[0].name} reads", "take another, such as magnitude or fisher"
        )
    chosen = choose_in_layers(inside, rule, round_index, num_frozen_layers, scores) | choose_outside_layers(outside, rule)
    if not chosen:
        raise ModelError(f"nothing would train with freeze.trainable_fraction {rule.trainable_fraction}", "set a larger share")

    trained = {parameter.name for unit in chosen for parameter in unit.parameters}
    if rule.importance is not None:  # what rows were read shows in the scores
        rule = rule.model_copy(update={"importance": ImportanceRule(freezes=rule.importance.freezes)})
    if not rule.divides:
        return write_plan(units, trained, rule, round_index)
    list_inputs(inside, rule.blocks, num_heads)  # of those that another round draws as well
    everywhere = [unit for unit in inside if unit.role != "norm"]
    above = [unit for unit in everywhere if (unit.layer or 0) >= num_frozen_layers]
    # Biases and norms follow the draw in any case.
    matrices = [unit for unit in above if unit in chosen] if "matrices" in rule.grain else above
    share = Fraction(str(rule.trainable_fraction))
    if "matrices" not in rule.grain:  # else the draw has made up for what is below
        share = raise_share(share, *(sum(unit.parameters[0].num_elements for unit in part) for part in (above, everywhere)))
    parts: dict[str, Any]
    if rule.grain == "columns":
        parts = {"columns": open_columns(matrices, share, is_shared=rule.choice == "quiet")}
    elif rule.grain == "entries":
        parts = {"entries": open_entries(matrices, share, is_moving=rule.choice == "spiel")}
    else:
        parts = {"directions": open_directions(matrices, share, rule.blocks, num_heads)}
    trained |= {unit.parameters[0].name for unit in matrices}
    # What rows were named shows in the moments.
    return write_plan(units, trained, rule.model_copy(update={"keep": None}), round_index, **parts)


def complete_plan(plan: FreezePlan, **hashes: str) -> FreezePlan:
    """A plan with the hashes of what its units or their parts were chosen by, and of what these are."""
    content = {name: value for name, value in plan if name != "fingerprint"} | hashes
    return FreezePlan(**content, fingerprint=_hash_content(content))


def keep_biases(units: Iterable[Unit]) -> list[Unit]:
    """What units have of biases, without those that have none; embeddings and head, which have keys of their own, are whole.

    Raises:
        ModelError: no unit in the layers has one.
    """
    found = []
    for unit in units:
        own = tuple(parameter for parameter in unit.parameters if parameter.name.endswith("bias"))
        if unit.role in ("embedding", "head"):
            found.append(unit)
        elif own:
            found.append(replace(unit, parameters=own))
    if all(unit.layer is None for unit in found):
        raise ModelError(
            "freeze.grain: biases would train nothing in the layers: this model's modules have no biases, like those of most "
            "models of Llama's kind",
            "to train few weights, take method.peft: {type: LN_TUNING} for the norms, method.ia3, or method.lora",
        )
    return found


def count_frozen_layers(units: Iterable[Unit], rule: FreezeRule) -> int:
    """How many layers `frozen_prefix` freezes: the closest number, the larger of two that are equally close.

    Raises:
        ModelError: the share is less than half a layer, or leaves none.
    """
    num_layers = 1 + max((unit.layer for unit in units if unit.layer is not None), default=-1)
    share = Fraction(str(rule.frozen_prefix))
    num_frozen = int(share * num_layers + Fraction(1, 2))
    if share and not 0 < num_frozen < num_layers:
        raise ModelError(
            f"freeze.frozen_prefix {rule.frozen_prefix} is {num_frozen} of the model's {num_layers} layers; "
            "it must freeze one or more and leave one or more",
            "set another share, or 0 to turn it off",
        )
    return num_frozen


def choose_in_layers(
    units: Iterable[Unit],
    rule: FreezeRule,
    round_index: int,
    num_frozen_layers: int = 0,
    scores: Mapping[str, float] | None = None,
) -> set[Unit]:
    """The units in the layers that train.

    Pool by pool, a running target follows the share of the weight seen so far, and each group gives the first items of
    its ranking, as many as bring the total closest to the target. What one group gives too much, the next gives too
    little: of three mlp units, two train in a random half of the layers and one in the other half, as in the paper.

    Args:
        num_frozen_layers: the lowest layers, of which nothing trains; the share of their weight is made up for above them.
        scores: see `make_plan`.
    """
    pools: dict[str, dict[str, dict[str, list[Unit]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    below: dict[str, dict[str, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        pool, group, item = GROUPS[rule.group](unit)
        is_below = unit.layer is not None and unit.layer < num_frozen_layers
        items = below[pool] if is_below else pools[pool][group]
        items[item].append(unit)

    # The share as the user wrote it, not the binary fraction closest to it: ties are to be exact.
    share = Fraction(str(rule.trainable_fraction))
    chosen: set[Unit] = set()
    for pool, groups in pools.items():
        weight_above = sum(_weigh(item, rule) for items in groups.values() for item in items.values())
        weight_below = sum(_weigh(item, rule) for item in below[pool].values())
        share_above = raise_share(share, weight_above, weight_above + weight_below)
        seen = taken = 0
        for group in rank_random(groups, rule.seed, round_index):
            items = groups[group]
            ranking = RANKINGS.get(rule.rank, rank_random)(items, rule.seed, round_index)
            if rule.rank not in RANKINGS and scores is not None:
                ranking = rank_scored(ranking, items, scores, rule.freezes_most)
            weights = [_weigh(items[name], rule) for name in ranking]
            seen += sum(weights)
            totals = list(accumulate(weights, initial=taken))
            num_taken = find_closest(totals, share_above * seen)
            taken = totals[num_taken]
            chosen.update(unit for name in ranking[:num_taken] for unit in items[name])
    return chosen


def choose_outside_layers(units: Iterable[Unit], rule: FreezeRule) -> set[Unit]:
    """The units outside the layers that train: embeddings and head as the rule says, the final norm and bridges always.

    A frozen prefix reaches down to the embeddings, whatever the rule says of them, and takes the bridges along.

    Raises:
        ModelError: embeddings and head are one tensor, and one of them is to train and the other not.
    """
    embeddings = "freeze" if rule.frozen_prefix else rule.embeddings
    roles = {unit.role for unit in units}
    if "embedding" in roles and "head" not in roles and embeddings != rule.head:
        cause = (
            f"freeze.frozen_prefix is {rule.frozen_prefix}" if rule.frozen_prefix else f"freeze.embeddings is {embeddings!r}"
        )
        raise ModelError(
            f"{cause} and freeze.head is {rule.head!r}, but embeddings and head are one tensor in this model",
            "set freeze.head: freeze" if rule.frozen_prefix else "set freeze.embeddings and freeze.head alike",
        )
    bridge = "freeze" if rule.frozen_prefix else "train"
    decisions = {"embedding": embeddings, "bridge": bridge, "head": rule.head, "final_norm": "train"}
    return {unit for unit in units if decisions[unit.role] == "train"}


def raise_share(share: Fraction, above: int, total: int) -> Fraction:
    """The share of what is above a frozen prefix that is this share of all, or all that there is."""
    return min(share * total / above, Fraction(1))


def find_closest(totals: Sequence[int], target: Fraction) -> int:
    """Index of the total closest to the target; of two that are equally close, that of the later and larger one."""
    return min(range(len(totals)), key=lambda index: (abs(totals[index] - target), -index))


def rank_random(names: Iterable[str], seed: int, round_index: int) -> list[str]:
    """Names in a random order that depends on the seed, the round and the names alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{round_index}/{name}".encode()).digest())


def rank_scored(
    names: Iterable[str], items: Mapping[str, Sequence[Unit]], scores: Mapping[str, float], freezes_most: bool
) -> list[str]:
    """Names by the mean score of their items' weights, as they came where that is the same or there is none.

    Args:
        items: units by name.
        freezes_most: whether what matters least comes first.
    """

    def average(name: str) -> float:
        scored = [unit for unit in items[name] if unit.name in scores]
        total = sum(scores[unit.name] * unit.num_parameters for unit in scored)
        return total / sum(unit.num_parameters for unit in scored) if scored else 0.0

    return sorted(names, key=average if freezes_most else lambda name: -average(name))


def _weigh(item: Sequence[Unit], rule: FreezeRule) -> int:
    """What an item counts towards the share."""
    return 1 if rule.balance == "units" else sum(unit.num_parameters for unit in item)


def write_plan(
    units: Sequence[Unit],
    trained: set[str],
    rule: FreezeRule,
    round_index: int,
    directions: dict[str, Directions] | None = None,
    columns: dict[str, Columns] | None = None,
    entries: dict[str, Entries] | None = None,
) -> FreezePlan:
    """The plan by which these parameters train, those of `directions`, `columns` and `entries` in a part of theirs."""
    # What holds weights back, or how, is no part of which they are.
    rule = rule.model_copy(update={"pull": None, "average": None, "interpolate": 1.0})
    parts: dict[str, Part] = {**(directions or {}), **(columns or {}), **(entries or {})}
    parameters = [parameter for unit in units for parameter in unit.parameters]
    inside = [unit for unit in units if unit.layer is not None]
    content = {
        "rule": rule,
        "round_index": round_index,
        "trained": tuple(parameter.name for parameter in parameters if parameter.name in trained),
        "frozen": tuple(parameter.name for parameter in parameters if parameter.name not in trained),
        "num_parameters": sum(parameter.num_elements for parameter in parameters),
        "num_trainable": count_trained(units, trained, parts),
        "num_units": len(inside),
        "num_trainable_units": count_trained_units(inside, trained),
        "roles": count_roles(units, trained, parts),
        "directions": directions,
        "columns": columns,
        "entries": entries,
    }
    return FreezePlan(**content, fingerprint=_hash_content(content))


def _hash_content(content: dict[str, Any]) -> str:
    """SHA-256 of a plan's content as canonical JSON."""
    given = {name: value for name, value in content.items() if value is not None}
    text = json.dumps(to_jsonable_python(given), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# What a unit belongs to, from the outside in: the pool over which the share is kept, the group that is halved, and
# the item that trains or is frozen as a whole.
GROUPS: dict[str, Callable[[Unit], tuple[str, str, str]]] = {
    "category": lambda unit: (unit.category, f"{unit.category}/{unit.layer}", unit.name),
    "layer": lambda unit: ("layers", "layers", f"layer/{unit.layer}"),
    "model": lambda unit: ("model", "model", unit.name),
}

# How the items of a group are ordered, first to train first. A ranking gets the items' names, the seed and the round. The ranks
# of the rule that are not here go by scores (`measuring/importance.py`).
RANKINGS: dict[str, Callable[[Iterable[str], int, int], list[str]]] = {"random": rank_random}
