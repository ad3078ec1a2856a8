"""A section of a recipe: a frozen model without unknown keys, in which the docstring under a field documents it."""

from os.path import expanduser
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from hftcli.errors import NewerFile

Version = Annotated[int, Field(strict=True, ge=1)]
HomePath = Annotated[str, AfterValidator(expanduser)]  # a path, or a name that is none: `~` is the user's home


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


def list_kinds(annotation: Any) -> set[Any]:
    """The plain types of which a field takes a value, however they are combined."""
    parts = get_args(annotation)
    return set().union(*map(list_kinds, parts)) if parts else {annotation} if isinstance(annotation, type) else set()


def open_nulls(values: Any, model: type[BaseModel]) -> Any:
    """What was written of a section, with empty sections where a null stands for one that is always there."""
    if not isinstance(values, dict):
        return values
    opened = {}
    for name, value in values.items():
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        section = open_section(annotation)
        is_section = isinstance(annotation, type)
        opened[name] = open_nulls({} if value is None and is_section else value, section) if section else value
    return opened
