"""Judging what a model answered: from likelihoods and texts to a score, and to what became of each question.

By likelihood: greedy decoding gives an answer to the letter exactly when, with the right answer fed in, every one of its tokens
(the end token included) is the most likely at its place. So one forward pass gives both the exact match and the likelihood.

Shapes: N questions of a task.
"""

import math
import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data.tokens import Progress, ignore_progress
from hftcli.measuring.asking import TokenizedTask, decode_answer, generate_answers, read_answers
from hftcli.measuring.options import read_options
from hftcli.runs.scores import Prediction, Score
from hftcli.tasks.examples import Task
from hftcli.tasks.metrics import METRICS


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
    else:
        readings_N3 = read_answers(model, asked.rows, device, rank, num_ranks, on_batch)
    texts: list[str | None] = [None] * len(asked.rows or asked.questions)
    if asked.prompts and not is_read_only:
        answers = generate_answers(model, asked, device, rank, num_ranks, temperature, on_batch)
        pairs = zip(asked.prompts, answers, strict=True)
        texts = [cut_answer(decode_answer(prompt, answer, tokenizer), task.stops) for prompt, answer in pairs]
    model.train(was_training)
    if asked.bare_questions:
        predictions = _judge_choices(asked, found, is_read_only)
    elif asked.questions:
        predictions = _judge_several(asked, found, texts)
    else:
        predictions = _judge_answers(task, readings_N3, texts, is_read_only)
    return summarize(predictions), predictions


def summarize(predictions: Sequence[Prediction]) -> Score:
    """The score of a task out of what became of its questions, at least one."""
    read = [(one.nll, one.num_tokens) for one in predictions if one.nll is not None and one.num_tokens is not None]
    return Score(
        score=_average([prediction.score for prediction in predictions]),
        lenient=_average([prediction.lenient for prediction in predictions]),
        nll=math.fsum(nll * num_tokens for nll, num_tokens in read) / sum(num_tokens for _, num_tokens in read),
        num_examples=len(predictions),
        others={name: _average([prediction.others[name] for prediction in predictions]) for name in predictions[0].others},
    )


def _average(scores: list[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if len(known) == len(scores) else None


def _judge_answers(task: Task, readings_N3: torch.Tensor, texts: Sequence[str | None], is_read_only: bool) -> list[Prediction]:
    """Of tasks with one right answer: what is written counts, or whether greedy decoding gives the answer."""
    predictions = []
    for index, ((nats, num_tokens, is_exact), text) in enumerate(zip(readings_N3.tolist(), texts, strict=True)):
        score, lenient = _grade(task, index, text) if text is not None else (None if is_read_only else is_exact, None)
        predictions.append(
            Prediction(
                index=index, prediction=text, score=score, lenient=lenient, nll=nats / num_tokens, num_tokens=int(num_tokens)
            )
        )
    return predictions


def _judge_several(asked: TokenizedTask, found: list[list[float]], texts: Sequence[str | None]) -> list[Prediction]:
    """Of questions with several right answers: the one that the model knows best says how well it knows."""
    predictions = []
    for index, (question, likelihoods, text) in enumerate(zip(asked.questions, found, texts, strict=True)):
        score, lenient = _grade(asked.task, index, text) if text is not None else (None, None)
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        num_tokens = question.nums_scored[best]
        predictions.append(
            Prediction(
                index=index, prediction=text, score=score, lenient=lenient, nll=-likelihoods[best] / num_tokens,
                num_tokens=num_tokens, log_likelihoods=tuple(likelihoods),
            )
        )  # fmt: skip
    return predictions


def _grade(task: Task, index: int, text: str) -> tuple[float, float]:
    metric, example = METRICS[task.metric], task.examples[index]
    return metric.strict(text, example), metric.lenient(text, example)


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


def cut_answer(text: str, stops: str) -> str:
    """The text before the first of the characters, without blanks around it; the text itself where nothing stops it."""
    if not stops:
        return text
    return re.split(f"[{re.escape(stops)}]", text, maxsplit=1)[0].strip()
