"""How many positions a model has, as its config says."""

from collections.abc import Mapping
from typing import Any

POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def find_max_positions(config: Mapping[str, Any]) -> int | None:
    """By whichever name its family has for them; None where there is no limit."""
    return next((config[name] for name in POSITION_NAMES if config.get(name) is not None), None)
