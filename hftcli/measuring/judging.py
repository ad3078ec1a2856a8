"""Judging what a model answered: from likelihoods and texts to a score, and to what became of each question.

By likelihood: greedy decoding gives an answer to the letter exactly when, with the right answer fed in, every one of its tokens
(the end token included) is the most likely at its place. So one forward pass gives both the exact match and the likelihood.

Shapes: N questions of a task.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data.tokens import Progress, ignore_progress
from hftcli.measuring.asking import generate_answers, read_answers
from hftcli.measuring.grading import Grade, grade_answer
from hftcli.measuring.options import read_options
from hftcli.measuring.questions import TokenizedTask
from hftcli.runs.scores import Prediction, Score
from hftcli.tasks.examples import Example


@torch.no_grad()
def score_task(
    model: PreTrainedModel,
    asked: TokenizedTask,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    temperature: float = 0.0,
    is_read_only: bool = False,
    on_batch: Progress = ignore_progress,
) -> tuple[Score, list[Prediction]]:
    """Score a model on a task; the questions are dealt out over the ranks, which must all call this together.

    Args:
        model: left in the mode it came in. Where answers are generated, its weights are whole and it makes passes of its own on
            each rank.
        temperature: at which answers are drawn; 0 takes the likeliest token at every place.
        is_read_only: whether only the likelihood of the right answers is measured.
        on_batch: called with batches done and in all.

    Returns:
        The score, and what became of each question, in order; the same on all ranks.
    """
    task = asked.task
    was_training = model.training
    model.eval()
    if asked.questions:
        found = read_options(model, asked.questions + asked.bare_questions, device, rank, num_ranks, on_batch)
    elif asked.rows:
        readings_N3 = read_answers(model, asked.rows, device, rank, num_ranks, on_batch)
    grades: list[Grade | None] = [None] * len(asked.rows or asked.questions or asked.layouts)
    if asked.layouts and not is_read_only:
        answers = generate_answers(model, asked, device, rank, num_ranks, temperature, on_batch)
        written = zip(task.examples, asked.layouts, answers, strict=True)
        grades = [grade_answer(task, *one, tokenizer, asked.num_new_tokens) for one in written]
    model.train(was_training)
    if asked.bare_questions:
        predictions = _judge_choices(asked, found, is_read_only)
    elif asked.questions:
        predictions = _judge_several(asked, found, grades)
    elif asked.rows:
        predictions = _judge_answers(readings_N3, grades, is_read_only)
    else:
        predictions = [Prediction(index=index, nll=None, num_tokens=None, **_keep(grade)) for index, grade in enumerate(grades)]
    described = (
        [
            prediction.model_copy(update=describe_question(asked, example, prediction.index))
            for prediction, example in zip(predictions, task.examples, strict=True)
        ]
        if task.examples
        else predictions
    )
    score = summarize(described).model_copy(update={"way": task.way, "left_out": dict(task.left_out)})
    return score, described


def describe_question(asked: TokenizedTask, example: Example, index: int) -> dict[str, Any]:
    """What a prediction says of its question."""
    answers = example.options if example.options and not asked.bare_questions else (example.answer,)
    prompt = example.prompt if isinstance(example.prompt, str) else "\n\n".join(turn["content"] for turn in example.prompt)
    return {"question": prompt, "answers": answers, "fault": asked.faults.get(index)}


def summarize(predictions: Sequence[Prediction]) -> Score:
    """The score of a task out of what became of its questions, at least one."""
    read = [(one.nll, one.num_tokens) for one in predictions if one.nll is not None and one.num_tokens is not None]
    return Score(
        score=_average([prediction.score for prediction in predictions]),
        lenient=_average([prediction.lenient for prediction in predictions]),
        nll=math.fsum(nll * num_tokens for nll, num_tokens in read) / sum(num for _, num in read) if read else None,
        num_examples=len(predictions),
        num_impossible=sum(prediction.fault is not None for prediction in predictions),
        num_cut=sum(cut) if (cut := [one.is_cut for one in predictions if one.is_cut is not None]) else None,
        others={name: _average([prediction.others[name] for prediction in predictions]) for name in predictions[0].others},
    )


def _average(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if len(known) == len(scores) else None


def _judge_answers(readings_N3: torch.Tensor, grades: Sequence[Grade | None], is_read_only: bool) -> list[Prediction]:
    """Of tasks with one right answer: what is written counts, or whether greedy decoding gives the answer."""
    predictions = []
    for index, ((nats, num_tokens, is_exact), grade) in enumerate(zip(readings_N3.tolist(), grades, strict=True)):
        judged = _keep(grade) if grade else {"prediction": None, "score": None if is_read_only else is_exact, "lenient": None}
        predictions.append(Prediction(index=index, nll=nats / num_tokens, num_tokens=int(num_tokens), **judged))
    return predictions


def _judge_several(asked: TokenizedTask, found: list[list[float]], grades: Sequence[Grade | None]) -> list[Prediction]:
    """Of questions with several right answers: the one that the model knows best says how well it knows."""
    predictions = []
    for index, (question, likelihoods, grade) in enumerate(zip(asked.questions, found, grades, strict=True)):
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        num_tokens = question.nums_scored[best]
        predictions.append(
            Prediction(
                index=index, nll=-likelihoods[best] / num_tokens, num_tokens=num_tokens, log_likelihoods=tuple(likelihoods),
                **_keep(grade),
            )
        )  # fmt: skip
    return predictions


def _keep(grade: Grade | None) -> dict[str, Any]:
    if grade is None:
        return {"prediction": None, "score": None, "lenient": None}
    return {"prediction": grade.text, "score": grade.score, "lenient": grade.lenient, "is_cut": grade.is_cut}


def _judge_choices(asked: TokenizedTask, found: list[list[float]], is_read_only: bool) -> list[Prediction]:
    """Of multiple choice.

    Args:
        found: log-likelihoods of the choices of each question, then those after the prompt that asks nothing.
    """
    num_questions = len(asked.questions)
    predictions = []
    for index, (example, question) in enumerate(zip(asked.task.examples, asked.questions, strict=True)):
        options, likelihoods, bare = example.options, found[index], found[num_questions + index]
        right = options.index(example.answer)
        text, score, others = None, None, {}
        if not is_read_only:
            best, *compared = rank_choices(options, likelihoods, bare)
            text, score = best.removeprefix(" "), float(best == example.answer)
            others = {
                name: float(choice == example.answer)
                for name, choice in zip(("acc_norm", "acc_content"), compared, strict=True)
            }
        predictions.append(
            Prediction(
                index=index, prediction=text, score=score, lenient=None, nll=-likelihoods[right] / question.nums_scored[right],
                num_tokens=question.nums_scored[right], others=others, log_likelihoods=tuple(likelihoods),
                bare_log_likelihoods=tuple(bare),
            )
        )  # fmt: skip
    return predictions


def rank_choices(options: Sequence[str], likelihoods: Sequence[float], bare: Sequence[float]) -> tuple[str, str, str]:
    """The best choice by log-likelihood, by that per character, and by how much the question raises it.

    Args:
        options: with the blank that stands before each, which is no character of it.
        bare: log-likelihoods after a prompt that asks nothing, in nats.
    """
    per_character = [value / len(option.removeprefix(" ")) for option, value in zip(options, likelihoods, strict=True)]
    raised = [value - without for value, without in zip(likelihoods, bare, strict=True)]
    best, best_per_character, best_raised = (
        options[max(range(len(options)), key=values.__getitem__)] for values in (likelihoods, per_character, raised)
    )
    return best, best_per_character, best_raised
