"""How the questions of tasks are asked, by a recipe under `eval` and by `hft eval`."""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from hftcli.recipe.section import Section


class AskingSection(Section):
    """How the questions of tasks are asked."""

    chat: bool | None = None
    """Ask the questions of files as a user does, through the chat template; null does so where the tokenizer has one.
    Benchmarks and folders are asked as training lays their rows out."""

    shots: Annotated[int, Field(ge=0)] = 0
    """Answered questions before each: of a file the first of the others in it (of MMLU those on its subject), of a benchmark or
    a folder the first training rows."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Where an answer that has not ended is cut, in place of what each task says; null leaves that."""

    generate: bool = True
    """Whether the model writes its answers. False reads the right ones alone, which takes a fraction of the time: their
    likelihood, and as the score, whatever the task's own is, the share that greedy decoding would give to the letter. Of a
    question with several right answers the first is read, and its end; with true, all without their end, and the likeliest
    counts. Multiple choice writes nothing either way, and keeps its own score."""

    strict: bool = False
    """Refuse tasks with a right answer that would not count as right if a model gave it. Otherwise such questions are named and
    counted."""

    allow_code: bool = False
    """Run the programs that the model writes for HumanEval: each in a process of its own, without network and files to write,
    with limits of time and memory."""

    @model_validator(mode="after")
    def _check_written(self) -> "AskingSection":
        if not self.generate and self.max_new_tokens is not None:
            raise PydanticCustomError(
                "nothing_written", "max_new_tokens cuts what is written, and generate: false writes nothing"
            )
        return self

    @property
    def asking(self) -> "AskingSection":
        """These keys alone, of a section that has more."""
        return AskingSection(**{name: getattr(self, name) for name in AskingSection.model_fields})
