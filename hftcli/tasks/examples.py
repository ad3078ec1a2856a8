"""One question of a benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question and the answer that counts as right.

    Attributes:
        prompt: plain text, or messages of a conversation that ends with the user's.
        answer: what the model must say, without an end token.
    """

    prompt: str | list[dict[str, str]]
    answer: str
