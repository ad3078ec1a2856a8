"""What a step of the check finds, on the disk as soon as it is known."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Recorder:
    """The rows of one step, in FOLDER/step-LETTER.json.

    Attributes:
        folder: of the whole check.
        letter: the step's.
        rehearse: tiny shapes, on the CPU.
        fault: plant the step's fault, which its rows must then show.
    """

    folder: Path
    letter: str
    rehearse: bool
    fault: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def room(self) -> Path:
        """A folder of the step's own, for what it has no further need of."""
        room = self.folder / "work" / self.letter
        room.mkdir(parents=True, exist_ok=True)
        return room

    def add(self, name: str, passed: bool | None = None, **figures: Any) -> None:
        """Keep a row.

        Args:
            passed: whether it is as it should be; None for a figure that is right as it is.
            figures: numbers and words.
        """
        self.rows.append({"name": name, "passed": passed, "at_s": round(time.monotonic() - self.started, 1), **figures})
        self.write()

    def write(self) -> None:
        path = self.folder / f"step-{self.letter}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1, default=str), encoding="utf-8")
        os.replace(temporary, path)

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Where the body fails, that is a row, and the step goes on with the next."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(name, passed=False, **explain(error))


def explain(error: Exception) -> dict[str, str]:
    """What a reader far from the machine needs of an error: its own words and the last places it passed."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    said = f"{lines[0]} ... {lines[-1]}" if len(lines) > 1 else "".join(lines)
    return {"error": f"{type(error).__name__}: {said}"[:600], "where": " > ".join(places)}
