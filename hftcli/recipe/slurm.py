"""What a recipe asks of Slurm."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from hftcli.recipe.section import Section


def _refuse_sexagesimal(value: Any) -> Any:
    """YAML 1.1 reads 8:00:00 as the number 28800, which sbatch would take for minutes."""
    if isinstance(value, int):
        raise ValueError("write it in quotes, such as '8:00:00', since YAML reads a time as a number")
    return value


SlurmWord = Annotated[str, Field(pattern=r"^\S+$")]


class SlurmSection(Section):
    """What the batch script of `--slurm` asks of Slurm. Nodes and processes are those of `launch`."""

    partition: SlurmWord | None = None
    """Partition to run in; null takes the site's own choice."""

    account: SlurmWord | None = None
    """Account to charge; null takes the user's own."""

    time: Annotated[SlurmWord | None, BeforeValidator(_refuse_sexagesimal)] = None
    """Time limit, as sbatch takes it (`8:00:00`, `2-00:00:00`); null takes the partition's."""

    gres: SlurmWord | None = None
    """Devices of each node, as sbatch's `--gres` takes them; null asks for `gpu:N`, one for each process, and `none` for CPU
    ranks."""

    signal_seconds: Annotated[int, Field(ge=10, le=65535)] = 300
    """Seconds before the time limit at which the run is told to write a checkpoint, stop and queue again: more than a step and
    a step checkpoint take. With both intervals of `checkpoint` null it stops and is not queued again: it would begin anew."""

    options: tuple[Annotated[str, Field(pattern=r"^-.*$")], ...] = ()
    """Other options of sbatch, each as on its command line: `--qos=long`."""

    @model_validator(mode="after")
    def _leave_time_to_train(self) -> "SlurmSection":
        """Slurm would signal such a job when it begins, and the job would be queued again and again."""
        if self.time is not None and (limit := _count_seconds(self.time)) is not None and self.signal_seconds >= limit:
            raise PydanticCustomError(
                "no_time", f"signal_seconds is {self.signal_seconds}, and time gives {limit} seconds in all: lower it"
            )
        return self


def _count_seconds(time: str) -> int | None:
    """A time limit as sbatch reads it; None where it is not one of numbers."""
    days, _, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")) or len(parts) > 3:
        return None
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
