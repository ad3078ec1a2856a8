"""What the ranks must have alike, though each computed it or read it for itself, on machines with files of their own."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hftcli.data.cache import hash_tokens
from hftcli.errors import InputError, TrainingError
from hftcli.freezing.selection import FreezePlan
from hftcli.training.stages import Rows


@dataclass(frozen=True)
class Holding:
    """What one rank has.

    Attributes:
        host: the machine that it is on.
        fingerprint: of its freeze plan.
        tokens: hashes of what it read, by what that is.
    """

    host: str
    fingerprint: str
    tokens: dict[str, str]


def agree(plan: FreezePlan, rows: Rows, num_ranks: int) -> tuple[str, ...]:
    """The plan's fingerprint as each rank computed it, where all have one half and the same tokens; all together.

    Raises:
        InputError: the ranks read different files.
        TrainingError: they drew different halves.
    """
    if num_ranks == 1:
        return (plan.fingerprint,)
    found = [Holding(socket.gethostname(), plan.fingerprint, hash_rows(rows))] * num_ranks
    torch.distributed.all_gather_object(found, found[0])
    check_holdings(found)
    return tuple(holding.fingerprint for holding in found)


def hash_rows(rows: Rows) -> dict[str, str]:
    """Hashes of all that a rank read, by what it is."""
    return {
        "the rows that are trained on": rows.tokens_digest,
        "the questions": hashlib.sha256(repr(rows.asked).encode()).hexdigest(),
        "the held-out pairs": hash_tokens(rows.pairs) if rows.pairs is not None else "",
        "the rows of freeze.keep": rows.kept_digest,
        "the rows of freeze.importance": rows.scored_digest,
    }


def check_holdings(found: Sequence[Holding]) -> None:
    """Compare what the ranks have, in their order: one with another half, or other rows, would train without an error.

    Raises:
        InputError: other tokens than rank 0; it says which, on which machine.
        TrainingError: another half.
    """
    first = found[0]
    for what, digest in first.tokens.items():
        others = [f"rank {rank} on {one.host}" for rank, one in enumerate(found) if one.tokens[what] != digest]
        if others:
            raise InputError(
                f"{what} are not the same on all machines: {', '.join(others)} read others than rank 0 on {first.host}",
                "give every machine the same files, or put them, and the cache (HFT_CACHE), on a file system that all share",
            )
    fingerprints = [one.fingerprint for one in found]
    if len(set(fingerprints)) > 1:
        raise TrainingError(f"the ranks drew different halves: {', '.join(fingerprints)}", "install the same hft on all")
