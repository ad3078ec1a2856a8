"""A section of a recipe: a frozen model without unknown keys, in which the docstring under a field documents it."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of what crosses a file: frozen, with no unknown keys, and a docstring under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def open_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, be it an optional one; None where it holds a value."""
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
