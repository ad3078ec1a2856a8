"""How many positions a model has, as its config says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hftcli.errors import ModelError

POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def read_config(file: Path) -> dict[str, Any]:
    """What a config.json holds.

    Raises:
        ModelError: it is no JSON object, as where its copying was cut off.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}", "copy or download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is damaged: it holds no object", "copy or download it again")
    return config


def find_max_positions(config: Mapping[str, Any]) -> int | None:
    """By whichever name its family has for them; None where there is no limit."""
    return next((config[name] for name in POSITION_NAMES if config.get(name) is not None), None)
