"""Whether a run's tasks ask what they asked before: what was known is only lost or kept by the same questions."""

from collections.abc import Mapping

from hftcli.comparing.answers import find_other_question
from hftcli.data.tokens import IGNORED
from hftcli.errors import InputError
from hftcli.measuring.judging import describe_question
from hftcli.measuring.questions import TokenizedTask
from hftcli.runs.run import Round
from hftcli.runs.scores import Prediction


def check_questions(first: Round, asked: Mapping[str, TokenizedTask]) -> None:
    """Compare tasks with the answers that the untouched model gave them.

    Args:
        first: the round that asked it; a task of which it kept nothing is not compared.

    Raises:
        InputError: a question, or a right answer, is not what it was.
    """
    for name, task in asked.items():
        path = first.predictions_path("before", name)
        if not path.exists():
            continue
        found = find_other_question(first.read_predictions("before", name), list_questions(task))
        if found is not None:
            raise InputError(
                f"{name}: edited since the run began: {found} ({path} has what was asked before training)",
                "put the questions back as they were, or give another --output to begin a run with the new ones",
            )


def list_questions(asked: TokenizedTask) -> list[Prediction]:
    """A task's questions as predictions name them, unanswered; held-out rows have the tokens of their answers alone."""
    blank = Prediction(index=0, prediction=None, score=None, lenient=None, nll=None, num_tokens=None)
    if asked.task.examples:
        return [
            blank.model_copy(update={"index": index, **describe_question(asked, example, index)})
            for index, example in enumerate(asked.task.examples)
        ]
    return [
        blank.model_copy(update={"index": index, "num_tokens": sum(label != IGNORED for label in labels[1:])})
        for index, (_, labels) in enumerate(asked.rows)
    ]
