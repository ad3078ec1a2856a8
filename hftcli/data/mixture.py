"""Several sources as one mixture of rows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from hftcli.data.shards import count_tokens
from hftcli.data.streaming import Tally


def mix(tokens: Sequence[Dataset], weights: Sequence[float | None], seed: int) -> tuple[Dataset, list[Dataset]]:
    """The sequences of several sources in a random order, and what was drawn of each."""
    drawn = [
        part.select(rows) for part, rows in zip(tokens, draw_rows([len(part) for part in tokens], weights, seed), strict=True)
    ]
    order = np.random.default_rng(seed).permutation(sum(map(len, drawn)))
    return concatenate_datasets(drawn).select(order), drawn


def draw_rows(sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> list[np.ndarray]:
    """Rows of each source, in their order.

    Without weights they are all of them; with weights, as many as the shares allow without a row standing twice, and one at
    least.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [np.arange(size) for size in sizes]
    shares = np.array(given) / sum(given)
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    drawn = []
    for place, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        num_rows = min(max(round(total * share), 1), size)
        drawn.append(np.sort(np.random.default_rng((seed, place)).choice(size, num_rows, replace=False)))
    return drawn


def sum_counts(tallies: Sequence[Tally], names: Sequence[str]) -> dict[str, Any]:
    """The counts of a `DataReport` that are sums over the sources."""
    several = len(tallies) > 1
    doubled, special = (
        sum((tally.doubled for tally in tallies), Counter()),
        sum((tally.special_tokens for tally in tallies), Counter()),
    )
    fields = ("num_rows", "num_used", "num_truncated", "num_identical", "num_special", "num_bad")
    counts = {name: sum(getattr(tally, name) for tally in tallies) for name in fields}
    bad_rows = [message for tally in tallies for message in tally.bad_rows]
    unused = [f"{name}: {key}" if several else key for name, tally in zip(names, tallies, strict=True) for key in tally.unused]
    return {
        **counts,
        "format": " + ".join(dict.fromkeys(tally.format for tally in tallies)),
        "num_dropped": counts["num_rows"] - counts["num_bad"] - counts["num_used"],
        "bad_rows": bad_rows,
        "doubled": dict(sorted(doubled.items())),
        "special_tokens": dict(special.most_common()),
        "unused_columns": unused,
    }


def describe_draw(tally: Tally, drawn: Dataset) -> dict[str, Any]:
    """What the report says of one source."""
    num_tokens, num_trained = count_tokens(drawn)
    return {
        "format": tally.format,
        "num_rows": tally.num_rows,
        "num_used": tally.num_used,
        "num_sequences": len(drawn),
        "num_tokens": num_tokens,
        "num_trained_tokens": num_trained,
    }
