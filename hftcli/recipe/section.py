"""A section of a recipe: a frozen model without unknown keys, in which the docstring under a field documents it."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from hftcli.errors import NewerFile

Version = Annotated[int, Field(strict=True, ge=1)]


class Section(BaseModel):
    """Base of what crosses a file: frozen, with no unknown keys, and a docstring under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class FileSection(Section):
    """A section that is a file of its own and names the version of its form.

    The version goes up, by another default in the class, where an hft that knows only the form before would misread the file or
    could not read it. Readers give the file's path as the context of the validation.

    Raises:
        NewerFile: the file has a later version than this hft knows.
    """

    version: Version = 1
    """Version of the file's form; a file without one is of the first."""

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        if info.mode == "json":
            values = {"version": 1, **values}
        newest = cls.model_fields["version"].default
        if isinstance(version := values.get("version"), int) and version > newest:
            raise NewerFile(
                f"{info.context or cls.__name__} was written by a newer hft: its form has version {version}, and this hft "
                f"knows none after {newest}",
                "upgrade hft",
            )
        return values


def open_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, be it an optional one; None where it holds a value."""
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
