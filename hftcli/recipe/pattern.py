"""Rows with a label as questions with an answer: `data.pattern` (pattern-based fine-tuning, arXiv 2305.16938)."""

from string import Formatter
from typing import Any

from pydantic import ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hftcli.recipe.section import Section


class PatternSection(Section):
    """How rows with a label become questions with an answer."""

    prompt: str
    """The question, with the row's columns in braces: `"{premise}\\nQuestion: {hypothesis} True or False?\\nAnswer:"`. A brace
    that is none of these is written twice."""

    verbalizers: dict[str, str]
    """The word that stands for each label: `{0: "True", 1: "False"}`. It follows the question after a blank."""

    label: str = "label"
    """The column that holds the label, a whole number or a text."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str) -> str:
        try:
            parts = list(Formatter().parse(value))
        except ValueError as error:
            raise PydanticCustomError(
                "braces", "{reason}: double each brace that names no column", {"reason": str(error).lower()}
            ) from None
        columns = [part for part in parts if part[1] is not None]
        if not columns:
            raise PydanticCustomError("no_column", "it names no column of the rows: every question would be the same")
        for _, name, form, conversion in columns:
            if not name or form or conversion or any(mark in name for mark in ".[") or name.isdigit():
                raise PydanticCustomError("column", "braces hold the name of a column and nothing else, as in {premise}")
        return value

    @field_validator("verbalizers", mode="before")
    @classmethod
    def _name_labels(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name_label(label) or str(label): word for label, word in value.items()}

    @field_validator("verbalizers")
    @classmethod
    def _check_words(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        words = [word.strip() for word in value.values()]
        if len(words) < 2:
            raise PydanticCustomError("few_labels", "there are two labels or more to choose from")
        if not all(words):
            raise PydanticCustomError("no_word", "a label has no word")
        if twice := [word for word in words if words.count(word) > 1]:
            raise PydanticCustomError("twice", "two labels have the word '{word}'", {"word": twice[0]})
        return dict(zip(value, words, strict=True))

    @model_validator(mode="after")
    def _check_label(self) -> "PatternSection":
        if self.label in self.columns:
            raise PydanticCustomError(
                "told", "the question has the column '{label}' in it, which is the answer", {"label": self.label}
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the question names, each once."""
        return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None))

    def fill(self, values: dict[str, str]) -> str:
        """The question of a row, whose columns are texts."""
        parts = Formatter().parse(self.prompt)
        return "".join(text + (values[name] if name is not None else "") for text, name, _, _ in parts)

    def answer(self, label: str, question: str) -> str:
        """What follows a question where it has a label; the label must have a word."""
        return ("" if question[-1:].isspace() else " ") + self.verbalizers[label]

    def list_answers(self, question: str) -> tuple[str, ...]:
        """All that may follow a question."""
        return tuple(self.answer(label, question) for label in self.verbalizers)


def name_label(value: Any) -> str | None:
    """A label as the recipe's verbalizers have it; None where it is none: a whole number, a text, true or false."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | str) else None
