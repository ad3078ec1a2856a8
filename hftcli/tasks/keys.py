"""Keys of a row that mean something beside its question and its answer: what is asked would lose it in silence.

data/formats.py refuses the same in rows to train on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from hftcli.errors import DataError

# What a question is about, a part of it, or how it is asked.
QUESTION_KEYS = (
    "system", "system_prompt", "history", "tools", "functions", "image", "images", "video", "videos", "audio", "audios",
    "documents", "context", "passage", "choices", "options", "instruction", "input", "chat_template_kwargs",
)  # fmt: skip
# What is said besides of the answer, or of how it is trained.
ANSWER_KEYS = (
    "reasoning", "reasoning_content", "thinking", "function_call", "function_calls", "tool_call", "tool_calls", "weight",
    "weights", "sample_weight", "loss_mask", "mask", "train", "rejected_response", "rejected_messages", "rejected_images",
    "kto_tag",
)  # fmt: skip


class DoubledKey(ValueError):
    """A key stands twice in one object; its value would be lost."""


def take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `json` hands it to its `object_pairs_hook`.

    Raises:
        DoubledKey: one of its keys stands twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DoubledKey(next(key for key in keys if keys.count(key) > 1))
    return row


def describe_doubled(place: str, error: DoubledKey) -> DataError:
    """What to say of it."""
    return DataError(f"{place}: the key {str(error)!r} stands twice in one object", "one of the two values would be lost")


def refuse_keys(row: Mapping[str, Any], keys: Iterable[str], place: str) -> None:
    """Raises: DataError: one of the keys is there, and says something."""
    for key in keys:
        if key in row and not _is_empty(row[key]):
            raise DataError(
                f"{place}: the key {key!r} carries meaning that would not be asked",
                "write it into the question, or take it out of the rows",
            )


def _is_empty(value: Any) -> bool:
    """The number 0 says something."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())
