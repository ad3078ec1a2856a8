"""Files written whole or not at all: under a temporary name and renamed, so that a reader never meets half of one."""

from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from hftcli.errors import InputError
from hftcli.runs.seals import flush

Model = TypeVar("Model", bound=BaseModel)


def name_temporary(path: Path) -> Path:
    """Where to write a file before it gets its name: beside it, and where no other process writes it, on whatever machine."""
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = name_temporary(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_model(path: Path, model: BaseModel) -> None:
    """Write what crosses a file, as JSON, whole or not at all."""
    write_text(path, _dump(model))


def keep_model(path: Path, model: BaseModel) -> None:
    """`write_model`, and on the disk when it returns: what the file stands for may then be removed."""
    temporary = name_temporary(path)
    temporary.write_text(_dump(model), encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def _dump(model: BaseModel) -> str:
    return model.model_dump_json(indent=2) + "\n"


def read_model(path: Path, kind: type[Model]) -> Model:
    """Read one of the files above.

    Raises:
        InputError: the file is missing or damaged.
        NewerFile: a newer hft wrote it.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"), context=path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValidationError, UnicodeDecodeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InputError(f"{path} is damaged or of another version of hft: {reason}") from None
