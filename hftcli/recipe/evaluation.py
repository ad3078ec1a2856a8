"""The sections of a recipe that say what is measured of a model, and what follows from it while it trains."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from hftcli.recipe.asking import AskingSection
from hftcli.recipe.section import HomePath, Section


class HeldOutSection(Section):
    """Rows to measure on that are not trained on."""

    path: HomePath | None = None
    """Held-out rows, as under `data.path`, to measure before and after each round: by the likelihood of what would be trained;
    with `data.pattern`, as multiple choice too; with DPO, by reward accuracy, margin and KL to the reference. Null measures
    none."""

    name: str | None = None
    """Configuration of a hub dataset."""

    split: str = "test"
    """Split of a hub dataset, or of a folder with files for several."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset; null takes the newest."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Use the first so many rows; null uses all."""

    @model_validator(mode="after")
    def _check_path(self) -> "HeldOutSection":
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.path is None and given:
            raise PydanticCustomError(
                "no_rows", f"{' and '.join(given)} would have no effect without rows: give eval.held_out.path, or drop them"
            )
        return self


class EvalSection(AskingSection):
    """What is measured before and after each round."""

    tasks: tuple[HomePath, ...] = ()
    """Tasks to score before and after each round, such as `tinyworld/facts`. With continual learning they stand beside those of
    the sequence: what the model knew besides. One that is of the sequence as well counts as known until its own round."""

    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Ask the first so many questions of each task; null asks all."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Temperature at which answers are drawn; 0 takes the likeliest token at every place. Null is 0, or the protocol's."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Measure within the round too, every so many optimizer steps and at the last: what it was trained on, by the tasks and the
    held-out rows that ask for it, against what was known before. It gives the run's own curve of learning against forgetting,
    and changes nothing of the training. Each point asks all questions again, which `eval.max_examples` makes fewer."""

    num_points: Annotated[int, Field(ge=2)] | None = None
    """The same, so many times at even distances, the last step among them; in place of `eval.every_steps`."""

    held_out: HeldOutSection = HeldOutSection()

    @model_validator(mode="after")
    def _check_steps(self) -> "EvalSection":
        if self.every_steps is not None and self.num_points is not None:
            raise PydanticCustomError("two_ways", "every_steps and num_points both say when to measure: drop one of the two")
        if not self.generate and self.temperature is not None:
            raise PydanticCustomError(
                "nothing_written", "temperature is that of what is written, and generate: false writes nothing"
            )
        return self

    @property
    def measures_within(self) -> bool:
        """Whether something is measured while a round trains."""
        return self.every_steps is not None or self.num_points is not None


class StopSection(Section):
    """When a round ends before its last step, by what is measured within it (`eval.every_steps`)."""

    by: Literal["score", "nll"] = "score"
    """What the limits are of: scores, or the negative log-likelihood of the right answers."""

    max_forgetting: Annotated[float, Field(gt=0)] | None = None
    """The forgetting budget of a round: the mean loss over the tasks that measure what was known before it, which are all of
    `eval.tasks` whose rows are not trained on, and in a sequence the tasks of the rounds before; a dry run names them. By score
    a share, so that 0.02 is 2 points of 100; by nll nats per token. The round ends where the 95 % interval of the loss (over
    the questions, as if those of one task had nothing to do with those of another) lies above it, and goes back to the step
    that `checkpoint.best` names. Where no measured step lies within the budget, the round fails and keeps nothing: measure
    early."""

    min_learning: Annotated[float, Field(gt=0)] | None = None
    """What is enough to learn: the round ends at the first measured step whose mean gain on what it trains on is that large, in
    the same unit."""
