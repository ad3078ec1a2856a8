"""Scoring one model on tasks and on preference pairs.

By likelihood: greedy decoding gives an answer to the letter exactly when, with the right answer fed in, every one of its tokens
(the end token included) is the most likely at its place. So one forward pass gives both the exact match and the likelihood.

By generation, where a task's metric reads what the model writes: left-padded batches with a cache, which a row leaves once its
answer has ended.

By options, where a question lists what may be said: the likeliest choice, the likelihood of every right answer (options.py).

Shapes: B rows of a batch, T tokens, V vocabulary, N places of answers or rows of a task, S tokens that are generated.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data import (
    IGNORED,
    Progress,
    Tokens,
    deal_pairs,
    deal_rows,
    get_backend,
    ignore_progress,
    tokenize_examples,
    tokenize_prompts,
)
from hftcli.errors import DataError, ModelError
from hftcli.options import Question, read_options, tokenize_questions
from hftcli.run import HELD_OUT, PairScore, Prediction, Score
from hftcli.tasks import Task
from hftcli.tasks.metrics import METRICS

logger = logging.getLogger(__name__)

BATCH_TOKENS = 8192  # padded tokens in a forward pass
CACHED_TOKENS = 16384  # places in the cache of a batch that is generated: 8 GiB for Llama-2-7B in 16 bits
NUM_DRAWS = 8  # tokens that the reference draws at every place of an answer, to estimate its KL to the model
SAMPLING_SEED = 0  # of the draws of answers: a temperature gives the same answers every time
NOTHING = -1  # where an answer has ended

Row = tuple[list[int], list[int]]  # token ids, and labels that are ids where the answer is


@dataclass(frozen=True)
class TokenizedTask:
    """A task as a model meets it.

    Attributes:
        rows: the questions with their answers, laid out as in training.
        prompts: the questions alone, with room left for an answer; none where nothing is generated.
        num_new_tokens: where an answer that has not ended is cut; 0 where nothing is generated.
        end_ids: tokens that end an answer.
        questions: the questions with all that may be said, in place of `rows`; none where nothing is listed.
        bare_questions: of multiple choice: the same after a prompt that asks nothing.
    """

    task: Task
    rows: list[Row]
    prompts: list[list[int]]
    num_new_tokens: int
    end_ids: list[int]
    questions: list[Question] = field(default_factory=list)
    bare_questions: list[Question] = field(default_factory=list)


def tokenize_task(task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase) -> TokenizedTask:
    """Tokenize a task's questions.

    Args:
        max_length: tokens of a plain question with its answer, be it the right one or the model's. The body is cut to it, then
            the end of a right answer, whose likelihood is that of the tokens left. What is generated takes at most half of it.

    Raises:
        DataError: a question does not fit, even without its body.
        ModelError: the task asks in conversations, and the tokenizer has no chat template.
    """
    if task.examples[0].options:
        return _tokenize_options(task, max_length, tokenizer)
    try:
        tokens, _ = tokenize_examples(task.examples, task.cut, max_length, tokenizer)
    except ModelError as error:
        raise ModelError(f"task {task.name}: {error.message}", error.fix) from None
    num_new_tokens = 0 if task.max_new_tokens is None else min(task.max_new_tokens, max_length // 2)
    room = max_length - num_new_tokens
    if num_new_tokens < (task.max_new_tokens or 0):
        logger.warning(
            "%s: answers are cut at %d tokens, half of data.max_length, and not at %d",
            task.name, num_new_tokens, task.max_new_tokens,
        )  # fmt: skip
    prompts = tokenize_prompts(task.examples, task.cut, room, tokenizer) if num_new_tokens else []
    rows = []
    for example, (ids, labels) in zip(task.examples, tokens, strict=True):
        length = max_length if isinstance(example.prompt, str) else len(ids)
        rows.append((ids[:length], labels[:length].tolist()))
    for number, (_, labels) in enumerate(rows, start=1):
        if labels.count(IGNORED) == len(labels):
            raise _describe_overlong(task, number, f"is longer than data.max_length, {max_length} tokens")
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > room:
            raise _describe_overlong(
                task, number, f"has {len(prompt)} tokens, and data.max_length {max_length} leaves {room} beside the answer"
            )
    return TokenizedTask(task, rows, prompts, num_new_tokens, find_ends(tokens, tokenizer))


def hold_out(rows: Dataset) -> TokenizedTask:
    """Rows, as `prepare_dataset` gives them, as a task of which only the likelihood of the trained tokens is measured."""
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    return TokenizedTask(Task(HELD_OUT, examples=()), pairs, prompts=[], num_new_tokens=0, end_ids=[])


def _tokenize_options(task: Task, max_length: int, tokenizer: PreTrainedTokenizerBase) -> TokenizedTask:
    num_new_tokens = min(task.max_new_tokens or 0, max_length // 2)
    room = max_length - num_new_tokens
    bare_rows = [(task.bare_prompt, row.options) for row in task.examples] if task.bare_prompt else []
    return TokenizedTask(
        task=task,
        rows=[],
        prompts=tokenize_prompts(task.examples, task.cut, room, tokenizer) if num_new_tokens else [],
        num_new_tokens=num_new_tokens,
        end_ids=sorted(find_stops(task.stops, tokenizer) | ({tokenizer.eos_token_id} - {None})) if num_new_tokens else [],
        questions=tokenize_questions([(row.prompt, row.options) for row in task.examples], max_length, tokenizer),
        bare_questions=tokenize_questions(bare_rows, max_length, tokenizer),
    )


def find_stops(characters: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens with one of the characters, and nothing but blanks before it that would be lost where the token ends an answer."""
    if not characters:
        return set()
    backend, stop = get_backend(tokenizer), re.compile(rf"\s*[{re.escape(characters)}]")
    return {token for token in range(backend.get_vocab_size()) if stop.match(backend.decode([token]))}


def _describe_overlong(task: Task, number: int, fault: str) -> DataError:
    return DataError(f"task {task.name}: question {number}, even without its body, {fault}", "raise data.max_length")


def find_ends(rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, and what ends an answer in training where that is a special token too."""
    _, labels = rows[0]
    last = int(labels[labels != IGNORED][-1])
    special = {last} & set(tokenizer.get_added_vocab().values())
    return sorted(special | ({tokenizer.eos_token_id} - {None}))


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
    nats = math.fsum(prediction.nll * prediction.num_tokens for prediction in predictions)
    return Score(
        score=_average([prediction.score for prediction in predictions]),
        lenient=_average([prediction.lenient for prediction in predictions]),
        nll=nats / sum(prediction.num_tokens for prediction in predictions),
        num_examples=len(predictions),
        others={name: _average([prediction.others[name] for prediction in predictions]) for name in predictions[0].others},
    )


def _average(scores: list[float | None]) -> float | None:
    return None if None in scores else math.fsum(scores) / len(scores)


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


def read_answers(
    model: torch.nn.Module,
    rows: Sequence[Row],
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    on_batch: Progress = ignore_progress,
) -> torch.Tensor:
    """Feed a model the right answers.

    Args:
        model: maps `input_ids` and `attention_mask` (B, T) to `logits` (B, T, V).

    Returns:
        (N, 3) in float64, on all ranks: nats of each answer, its tokens, and 1 where greedy decoding gives it exactly.
    """
    readings_N3 = torch.zeros(len(rows), 3, dtype=torch.float64, device=device)
    batches = deal_rows([len(ids) for ids, _ in rows], BATCH_TOKENS, num_ranks)
    for index, batch in enumerate(batches):
        own = batch[rank::num_ranks]
        # A rank that has no row of its own passes only so that ZeRO 3 can gather.
        logits_NV, targets_N, is_answer_BT = predict_answers(model, [rows[row] for row in own or batch[:1]], device)
        if own:
            place_N = is_answer_BT.nonzero()[:, 0]
            nats_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").double()
            nats_B = nats_N.new_zeros(len(own)).index_add(0, place_N, nats_N)
            is_right_BT = torch.ones_like(is_answer_BT)
            is_right_BT[is_answer_BT] = logits_NV.argmax(-1) == targets_N
            readings_N3[own] = torch.stack([nats_B, is_answer_BT.sum(-1).double(), is_right_BT.all(-1).double()], dim=-1)
        on_batch(index + 1, len(batches))
    if num_ranks > 1:
        torch.distributed.all_reduce(readings_N3)
    return readings_N3.cpu()


def generate_answers(
    model: PreTrainedModel,
    asked: TokenizedTask,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    temperature: float = 0.0,
    on_batch: Progress = ignore_progress,
) -> list[list[int]]:
    """Let a model answer a task's questions, with nothing of its `generation_config`, so that no checkpoint brings rules along.

    Returns:
        Token ids of each answer without its end, on all ranks.
    """
    answers_NS = torch.zeros(len(asked.prompts), asked.num_new_tokens, dtype=torch.long, device=device)
    # One number for each place of each answer: what is drawn does not depend on the batch or the rank.
    generator = torch.Generator().manual_seed(SAMPLING_SEED)
    uniforms_NS = torch.rand(answers_NS.shape, dtype=torch.float64, generator=generator).to(device)
    batches = deal_rows([len(prompt) + asked.num_new_tokens for prompt in asked.prompts], CACHED_TOKENS, num_ranks)
    for index, batch in enumerate(batches):
        if own := batch[rank::num_ranks]:
            prompts = [asked.prompts[row] for row in own]
            answers_NS[own] = _generate_batch(model, prompts, asked.end_ids, uniforms_NS[own], temperature)
        on_batch(index + 1, len(batches))
    if num_ranks > 1:
        torch.distributed.all_reduce(answers_NS)
    return [[token for token in answer if token != NOTHING] for answer in answers_NS.tolist()]


def _generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], end_ids: list[int], uniforms_BS: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Answers (B, S): token ids, and `NOTHING` from the end token on."""
    device, longest = uniforms_BS.device, max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    ends = torch.tensor(end_ids, device=device)
    answers_BS = torch.full(uniforms_BS.shape, NOTHING, device=device)
    going = torch.arange(len(prompts), device=device)  # rows whose answer has not ended
    cache = DynamicCache(config=model.config)
    for step in range(uniforms_BS.shape[1]):
        logits_BTV = model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        tokens_B = choose_tokens(logits_BTV[:, -1].float(), uniforms_BS[going, step], temperature)
        goes_on_B = ~torch.isin(tokens_B, ends)
        if not goes_on_B.all():
            going, tokens_B, mask_BT, positions_BT = (
                part[goes_on_B] for part in (going, tokens_B, mask_BT, positions_BT)
            )  # fmt: skip
            if not len(going):
                break
            cache.batch_select_indices(goes_on_B.nonzero()[:, 0])
        answers_BS[going, step] = tokens_B
        ids_BT, positions_BT = tokens_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
    return answers_BS


def choose_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """Token ids (B,): the likeliest, or drawn by the inverse of the distribution function.

    Args:
        uniforms_B: in [0, 1), float64; one number decides one draw.
        temperature: what the logits are divided by; 0 takes the likeliest.
    """
    if not temperature:
        return logits_BV.argmax(-1)
    reached_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    drawn_B1 = torch.searchsorted(reached_BV, uniforms_B[:, None] * reached_BV[:, -1:], right=True)
    return drawn_B1[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def decode_answer(prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that an answer adds to its prompt: alone, it would lose the space that some decoders take from a beginning."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode(prompt + answer)[len(decode(prompt)) :]


def predict_answers(
    model: torch.nn.Module, rows: list[Row], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model says at the N places before answer tokens: logits (N, V) in float32, targets (N,), and where they are."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, (ids, labels) in enumerate(rows):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, : len(ids)] = torch.tensor(labels)
        mask_BT[row, : len(ids)] = 1
    # Places before the first answer of the batch need no logits, which would take most of the time and memory.
    first = (labels_BT != IGNORED).any(0).nonzero()[0, 0].item()
    logits_BTV = model(
        input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False,
        logits_to_keep=longest - first + 1,
    ).logits  # fmt: skip
    targets_BT = labels_BT[:, first:].to(device)
    is_answer_BT = targets_BT != IGNORED
    return logits_BTV[:, :-1][is_answer_BT].float(), targets_BT[is_answer_BT], is_answer_BT


@dataclass(frozen=True)
class Reading:
    """What a model says of the answers of one batch of pairs.

    Attributes:
        log_probs_B2: of the chosen and the rejected answer, float64.
        drawn_NK: tokens that the reference drew at the N places of the answers.
        drawn_log_probs_NK: how likely the model finds them.
    """

    log_probs_B2: torch.Tensor
    drawn_NK: torch.Tensor
    drawn_log_probs_NK: torch.Tensor


@torch.no_grad()
def read_pairs(
    model: torch.nn.Module,
    pairs: Dataset,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    reference: list[Reading] | None = None,
    on_batch: Progress = ignore_progress,
) -> list[Reading]:
    """Let a model read preference pairs; they are dealt out over the ranks, which must all call this together.

    Args:
        pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, as data.py makes them.
        reference: what the reference read of them; None where the model is the reference.

    Returns:
        The readings of this rank's pairs.
    """
    batches = [[pairs[row] for row in rows] for rows in deal_pairs(pairs, BATCH_TOKENS, num_ranks)]
    readings: list[Reading] = []
    was_training = model.training
    model.eval()
    for index, batch in enumerate(batches):
        own = batch[rank::num_ranks]
        rows = [_label_answer(pair, name) for pair in own or batch[:1] for name in ("chosen_ids", "rejected_ids")]
        logits_NV, targets_N, is_answer_BT = predict_answers(model, rows, device)
        if own:  # a rank without a pair of its own passes only so that ZeRO 3 can gather
            drawn_NK = None if reference is None else reference[len(readings)].drawn_NK.to(device)
            readings.append(_read_batch(logits_NV.log_softmax(-1), targets_N, is_answer_BT, drawn_NK, seed=index))
        on_batch(index + 1, len(batches))
    model.train(was_training)
    return readings


def _label_answer(pair: dict[str, list[int]], name: str) -> Row:
    return pair["prompt_ids"] + pair[name], [IGNORED] * len(pair["prompt_ids"]) + pair[name]


def _read_batch(
    log_probs_NV: torch.Tensor, targets_N: torch.Tensor, is_answer_BT: torch.Tensor, drawn_NK: torch.Tensor | None, seed: int
) -> Reading:
    picked_N = log_probs_NV.gather(-1, targets_N[:, None])[:, 0].double()
    sums_B = picked_N.new_zeros(len(is_answer_BT)).index_add(0, is_answer_BT.nonzero()[:, 0], picked_N)
    if drawn_NK is None:
        generator = torch.Generator(log_probs_NV.device).manual_seed(seed)
        drawn_NK = torch.multinomial(log_probs_NV.exp(), NUM_DRAWS, replacement=True, generator=generator)
    return Reading(sums_B.view(-1, 2).cpu(), drawn_NK.cpu(), log_probs_NV.gather(-1, drawn_NK).double().cpu())


def score_pairs(
    readings: list[Reading], reference: list[Reading], beta: float, device: torch.device, num_ranks: int = 1
) -> PairScore:
    """Compare what the model reads with what the reference read; the ranks must all call this together.

    KL is estimated without bias, and never below zero for a draw, by r - 1 - log r of the likelihood ratios r of tokens that
    the reference drew (estimator k3 of http://joschu.net/blog/kl-approx.html).
    """
    totals = torch.zeros(6, dtype=torch.float64)  # pairs won, margins, likelier answers, pairs, KL, draws
    for model, start in zip(readings, reference, strict=True):
        margins_B = beta * (model.log_probs_B2 - start.log_probs_B2).diff(dim=-1)[:, 0].neg()
        likelier_B = model.log_probs_B2[:, 0] > model.log_probs_B2[:, 1]
        log_ratios_NK = model.drawn_log_probs_NK - start.drawn_log_probs_NK
        kl = (log_ratios_NK.exp() - 1 - log_ratios_NK).sum()
        won = ((margins_B > 0).double() + (margins_B == 0).double() / 2).sum()
        counts = (margins_B.sum(), likelier_B.sum().double(), torch.tensor(len(margins_B)).double(), kl)
        totals += torch.stack([won, *counts, torch.tensor(log_ratios_NK.numel()).double()])
    if num_ranks > 1:
        totals = totals.to(device)
        torch.distributed.all_reduce(totals)
    won, margin, likelier, num_pairs, kl, num_draws = totals.tolist()
    accuracy = won / num_pairs
    return PairScore(
        reward_accuracy=accuracy,
        reward_accuracy_error=math.sqrt(accuracy * (1 - accuracy) / num_pairs),
        reward_margin=margin / num_pairs,
        likelihood_accuracy=likelier / num_pairs,
        kl=kl / num_draws,
        num_pairs=int(num_pairs),
    )
