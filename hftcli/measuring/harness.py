"""lm-evaluation-harness's tasks, where it is installed: `harness:TASK`, or `harness:FILE.yaml` for a task of your own.

Where there is no network, a task's rows come from a local file: in its YAML, `dataset_path: json` and
`dataset_kwargs: {data_files: {test: rows.jsonl}}`.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.errors import DataError, InputError
from hftcli.measuring.evaluation import PREFIX
from hftcli.runs.scores import Prediction, Score

BATCH_SIZE = 16  # rows in a pass


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, or several that it has under one name.

    Attributes:
        name: with the prefix.
        parts: the harness's own objects.
    """

    name: str
    parts: list[Any]


def find_harness_tasks(names: Sequence[str]) -> dict[str, HarnessTask]:
    """Load tasks with their rows.

    Args:
        names: with the prefix.

    Raises:
        InputError: the harness is not installed, has no such task, or cannot load its rows.
    """
    if not names:
        return {}
    try:
        with redirect_stdout(sys.stderr):  # where results go, there is no place for what it says
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"{names[0]} is lm-evaluation-harness's, which is not installed ({error})", "pip install 'hftcli[eval]'"
        ) from None
    found = {}
    for name in names:
        try:
            with redirect_stdout(sys.stderr):
                found[name] = HarnessTask(name, list(TaskManager().load([name.removeprefix(PREFIX)])["tasks"].values()))
        except KeyError as error:
            raise InputError(f"{name}: {error.args[0]}", "`lm_eval ls tasks` lists them") from None
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{name}: its rows do not load: {str(error).strip().partition(chr(10))[0]}",
                "where there is no network, give a file of your own: `<path>.jsonl`, or harness:FILE.yaml with "
                "dataset_path: json",
            ) from None
    return found


def score_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: HarnessTask, max_examples: int | None
) -> tuple[Score, list[Prediction]]:
    """Let the harness score a model: zero-shot unless the task says otherwise, and with no chat template.

    Args:
        max_examples: the first so many rows of each part; None takes all.

    Returns:
        The score by the task's first metric, with all of them in `others`, over the questions of all parts; and what became
        of each question.
    """
    with redirect_stdout(sys.stderr):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        results = simple_evaluate(model=wrapped, tasks=task.parts, limit=max_examples, bootstrap_iters=0)
    predictions: list[Prediction] = []
    values: list[tuple[int, dict[str, float]]] = []
    for part, samples in results["samples"].items():
        # A task that reads answers in several ways has its samples once for each; the first is the usual one.
        way = samples[0]["filter"]
        own = [sample for sample in samples if sample["filter"] == way]
        found = results["results"][part].items()
        values.append((len(own), {key.partition(",")[0]: value for key, value in found if key.endswith(f",{way}")}))
        predictions += [_make_prediction(sample, len(predictions) + place) for place, sample in enumerate(own)]
    num_examples = len(predictions)
    # A part without a metric that the others have leaves no mean of it.
    names = [name for name in values[0][1] if all(_is_number(part.get(name)) for _, part in values)]
    others = {
        name: math.fsum(number * part[name] for number, part in values) / num_examples
        for name in names
        if not name.endswith("_stderr")
    }
    first = next(iter(others), None)
    score = others[first] if first is not None and all(prediction.score is not None for prediction in predictions) else None
    return Score(score=score, lenient=None, nll=None, num_examples=num_examples, others=others), predictions


def _make_prediction(sample: dict[str, Any], index: int) -> Prediction:
    """The harness keeps (log-likelihood, is greedy) for each request of a likelihood, and text for what is generated."""
    others = {name: float(sample[name]) for name in sample["metrics"] if _is_number(sample[name])}
    response = sample["filtered_resps"]
    likelihoods, text = None, None
    if isinstance(response[0], str):
        text = response[0]
    elif all(isinstance(each, Sequence) and len(each) == 2 for each in response):
        likelihoods = tuple(float(value) for value, _ in response)
    value = others.get(sample["metrics"][0])
    return Prediction(
        index=index, prediction=text, score=value if value is not None and 0 <= value <= 1 else None, lenient=None, nll=None,
        num_tokens=None, others=others, log_likelihoods=likelihoods,
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
