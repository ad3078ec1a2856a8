"""Keys of a row that mean something beside its question and its answer: what is asked would lose it in silence.

data/formats.py refuses the same in rows to train on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from hftcli.errors import DataError

# What a question is about, or a part of it.
QUESTION_KEYS = (
    "system", "system_prompt", "history", "tools", "functions", "image", "images", "video", "videos", "audio", "audios",
    "documents", "context", "passage", "choices", "options",
)  # fmt: skip
# What is said besides of the answer, or of how it is trained.
ANSWER_KEYS = (
    "reasoning", "reasoning_content", "thinking", "chat_template_kwargs", "function_call", "tool_calls", "weight", "weights",
    "sample_weight", "loss_mask", "mask", "train", "rejected_response", "rejected_messages", "rejected_images", "kto_tag",
)  # fmt: skip


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
