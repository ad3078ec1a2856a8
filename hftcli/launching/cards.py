"""Whether a plan fits on one card of the usual sizes, by which settings, and how many cards full fine-tuning takes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hftcli.freezing.activations import Arithmetic
from hftcli.freezing.budget import Budget, Limits

CARD_GB = (16, 24, 48, 80, 141)  # of 1e9 bytes, of which a card has some more, for the driver and the allocator's holes
MOST_CARDS = 1024
AS_GIVEN, CHECKPOINTED, OFFLOADED = "as it is", "checkpointed, one row at a time", "so and with launch.offload: optimizer"


@dataclass(frozen=True)
class Verdict:
    """What one card of a size carries.

    Attributes:
        card_gb: its memory, in 1e9 bytes.
        setting: with what the plan fits, the first of those that cost least; None where nothing helps.
        needed_gb: what it then takes; where it does not fit, the least that it could take.
        host_gb: what it then takes of the host.
        full_setting: with what full fine-tuning fits.
        full_host_gb: what that takes of the host.
        num_full_cards: cards of this size that full fine-tuning takes at ZeRO 3, without offloading; None for more than a
            thousand.
    """

    card_gb: int
    setting: str | None
    needed_gb: float
    host_gb: float
    full_setting: str | None
    full_host_gb: float
    num_full_cards: int | None

    @property
    def words(self) -> str:
        """One line."""
        if self.setting is None:
            found = f"does not fit on one {self.card_gb} GB card: {self.needed_gb:.1f} GB at the least"
        else:
            found = f"fits on one {self.card_gb} GB card, {self.setting}: {self.needed_gb:.1f} of {self.card_gb} GB"
        host = f", and {self.host_gb:.0f} GB of the host's" if self.host_gb else ""
        cards = "more than a thousand cards" if self.num_full_cards is None else f"{self.num_full_cards} cards"
        full = "one card" if self.num_full_cards == 1 else f"{cards} at ZeRO 3"
        offloaded = f", or one with offloading and {self.full_host_gb:.0f} GB of the host's" if self.full_host_gb else ""
        return f"{found}{host}; full fine-tuning takes {full}{offloaded}"


def judge_cards(budget: Budget) -> tuple[Verdict, ...]:
    """For each size of card, by what the plan expects; empty where activations are not counted."""
    if budget.half_step is None:
        return ()
    full = make_full(budget)
    ways, full_ways = dict(list_ways(budget)), dict(list_ways(full))
    found = []
    for card_gb in CARD_GB:
        setting, full_setting = choose_way(ways, card_gb), choose_way(full_ways, card_gb)
        least = min(way.half.total_bytes for way in ways.values())
        found.append(
            Verdict(
                card_gb=card_gb,
                setting=setting,
                needed_gb=(ways[setting].half.total_bytes if setting else least) / 1e9,
                host_gb=count_host(ways, setting),
                full_setting=full_setting,
                full_host_gb=count_host(full_ways, full_setting),
                num_full_cards=count_cards(full, card_gb),
            )
        )
    return tuple(found)


def make_full(budget: Budget) -> Budget:
    """Full fine-tuning in a plan's place: every matrix trains, without methods, and DPO's reference is precomputed."""
    plan = budget.plan
    whole = plan.model_copy(
        update={
            "trained": (*plan.trained, *plan.frozen),
            "frozen": (),
            "num_trainable": plan.num_parameters,
            "directions": None,
            "columns": None,
            "entries": None,
        }
    )
    reference = None if budget.asks_start else budget.reference and "precompute"
    return replace(
        budget, plan=whole, adapters=None, reference=reference, asks_start=False, held_bytes=0, limits=Limits()
    )  # fmt: skip


def list_ways(budget: Budget) -> Iterator[tuple[str, Budget]]:
    """A plan on one card, from that which costs no time to that which costs most."""
    own: Arithmetic = "autocast" if budget.precision == "mixed" and not budget.offload else budget.work.arithmetic
    alone = replace(budget, num_processes=1, work=replace(budget.work, arithmetic=own))
    yield AS_GIVEN, alone
    least, loss = 2 if budget.reference and not budget.asks_start else 1, budget.limits.least_loss
    checked = replace(alone, work=replace(alone.work, num_sequences=least, checkpoint_every=1, loss=loss))
    yield CHECKPOINTED, checked
    if budget.adapters is None and not budget.offload and budget.limits.can_offload:
        arithmetic: Arithmetic = "bfloat16" if budget.precision == "mixed" else "float32"
        yield OFFLOADED, replace(checked, offload=True, work=replace(checked.work, arithmetic=arithmetic))


def choose_way(ways: dict[str, Budget], card_gb: int) -> str | None:
    """The first that fits."""
    return next((setting for setting, way in ways.items() if way.half.total_bytes <= 1e9 * card_gb), None)


def count_host(ways: dict[str, Budget], setting: str | None) -> float:
    """GB of the host's memory."""
    host = ways[setting].host if setting is not None else None
    return host.host_bytes / 1e9 if host else 0.0


def count_cards(full: Budget, card_gb: int) -> int | None:
    """The smallest number of cards on which full fine-tuning fits at ZeRO 3 with all layers checkpointed."""
    *_, (_, way) = (found for found in list_ways(replace(full, offload=False)) if found[0] != OFFLOADED)

    def fits(num_cards: int) -> bool:
        arithmetic: Arithmetic = "bfloat16" if way.precision == "mixed" and num_cards > 1 else way.work.arithmetic
        spread = replace(way, num_processes=num_cards, zero_stage=3, work=replace(way.work, arithmetic=arithmetic))
        return spread.half.total_bytes <= 1e9 * card_gb

    if fits(1):
        return 1
    if not fits(MOST_CARDS):
        return None
    few, many = 1, MOST_CARDS
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(middle) else (middle, many)
    return many
