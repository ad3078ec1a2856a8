"""One model scored from beginning to end: its tasks, and how far it has moved from its base."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.comparing.items import compare_items
from hftcli.data.tokens import Progress
from hftcli.errors import InputError, ModelError
from hftcli.measuring.asking import MEASURING_SEED
from hftcli.measuring.drift import draw_answers, draw_texts, measure_drift, read_prompts, read_texts
from hftcli.measuring.evaluation import PREFIX, Drift, Evaluation, Item
from hftcli.measuring.harness import HarnessTask, find_harness_tasks, score_harness
from hftcli.measuring.judging import score_task
from hftcli.measuring.questions import Row, TokenizedTask, add_ends, report_faults, tokenize_task
from hftcli.measuring.ranks import Ranks, leading
from hftcli.models.checkpoint import load_finished
from hftcli.models.configs import read_ends
from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer
from hftcli.recipe.asking import AskingSection
from hftcli.runs.scores import Prediction, Score
from hftcli.tasks.asking import check_acting, put_task

OnProgress = Callable[[str, int, int], None]  # what is being done, and batches done and in all
Texts = tuple[list[Row], list[int]]
Prompts = tuple[list[Row], list[list[int]], list[int]]

USUAL_LENGTH = 2048  # tokens, where neither the user nor a run says how many, and the model has places for them


@dataclass(frozen=True)
class Examination:
    """What is asked of a model.

    Attributes:
        model, base: folders or hub ids; without a base, nothing is measured beside it.
        tasks: names of tasks; those that begin with `harness:` are lm-evaluation-harness's.
        root: `data.root` of the tasks.
        max_examples: the first so many rows of each task and file; None takes all.
        max_length: tokens of a question with its answer; None takes as many as the model has places for, to `USUAL_LENGTH`.
        text: file of base text; None lets the base write some.
        prompts: task or file of prompts; None measures nothing on prompts.
        dtype: data type to compute in, as torch names it.
        asking: how the questions are asked.
    """

    model: str
    tasks: tuple[str, ...]
    base: str | None = None
    root: str | None = None
    max_examples: int | None = None
    max_length: int | None = None
    text: Path | None = None
    prompts: str | None = None
    dtype: str = "float32"
    asking: AskingSection = field(default_factory=AskingSection)


def examine_model(
    asked: Examination, versions: dict[str, str], on_progress: OnProgress, num_ranks: int = 1
) -> tuple[Evaluation, list[Item]]:
    """Score a model; all that can be wrong with tasks and rows is found before the first question is asked.

    Args:
        num_ranks: processes that share the questions of hft's own tasks, each with a device of its own where there are GPUs.

    Returns:
        The evaluation, and an item for each question.

    Raises:
        InputError: a task, a file or a model is not what it should be.
    """
    transformers.utils.logging.disable_progress_bar()  # hft shows its own
    exam = prepare_exam(asked)
    base_scores: dict[str, Score] = {}
    base_answers: dict[str, list[Prediction]] = {}
    on_text = on_prompts = None
    with leading(asked, num_ranks) as ranks:
        model = load_finished(exam.folder, getattr(torch, asked.dtype), ranks.device)
        scores, answers, seconds = ask_all(exam, model, "", on_progress, ranks)
        if exam.base_folder is not None:
            base = load_finished(exam.base_folder, getattr(torch, asked.dtype), ranks.device)
            _check_width(model, base)
            base_scores, base_answers, _ = ask_all(exam, base, ", the base", on_progress, ranks)
            on_text, on_prompts = measure_drifts(exam, base, model, on_progress)
    changes = {name: compare_items(base_answers[name], answers[name]) for name in base_answers}
    evaluation = Evaluation(
        model=asked.model, base=asked.base, dtype=asked.dtype, max_length=exam.max_length, max_examples=asked.max_examples,
        versions=versions, tasks=scores, seconds=seconds, base_tasks=base_scores, base_text=on_text, prompts=on_prompts,
        items={name: change for name, change in changes.items() if change is not None},
    )  # fmt: skip
    return evaluation, [item for name in exam.names for item in _list_items(name, answers[name], base_answers.get(name))]


@dataclass(frozen=True)
class Exam:
    """An examination with its questions ready.

    Attributes:
        own, foreign: tasks of hft and of lm-evaluation-harness, by name.
        texts: base text as tokens, with the text that each row is of; None lets the base write some.
        prompts: prompts with answers, or, where they have none, prompts that ask the base for them and what ends these; None
            measures nothing.
    """

    asked: Examination
    folder: Path
    base_folder: Path | None
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    own: dict[str, TokenizedTask]
    foreign: dict[str, HarnessTask]
    texts: Texts | None
    prompts: Prompts | None

    @property
    def names(self) -> tuple[str, ...]:
        """Each task once, in the order in which they were named."""
        return tuple(dict.fromkeys(self.asked.tasks))


def prepare_exam(asked: Examination) -> Exam:
    """Read and tokenize all that is asked, before a model is loaded."""
    named = _list_foreign(asked)
    folder = fetch_checkpoint(asked.model)
    base_folder = None if asked.base is None else fetch_checkpoint(asked.base)
    folders = [folder] if base_folder is None else [folder, base_folder]
    max_length = find_length(asked.max_length, folders)
    tokenizer = load_tokenizer(folder)
    ends = [end for each in folders for end in read_ends(each)]  # both models stop at the ends of both, as within a run
    own = {}
    for name in dict.fromkeys(name for name in asked.tasks if not name.startswith(PREFIX)):
        task = put_task(name, asked.root, asked.max_examples, asked.asking, tokenizer.chat_template is not None)
        own[name] = add_ends(tokenize_task(task, max_length, tokenizer), ends, tokenizer)
        report_faults(own[name], asked.asking.strict)
    check_acting([questions.task for questions in own.values()], asked.asking)
    foreign = find_harness_tasks(named)
    texts = prompts = None
    if base_folder is not None:
        check_vocabulary(base_folder, tokenizer)
        if asked.text is not None:
            texts = read_texts(asked.text, max_length, asked.max_examples, tokenizer)
        if asked.prompts is not None:
            prompts = read_prompts(asked.prompts, asked.root, max_length, asked.max_examples, tokenizer)
    return Exam(asked, folder, base_folder, max_length, tokenizer, own, foreign, texts, prompts)


def _list_foreign(asked: Examination) -> list[str]:
    """The tasks that lm-evaluation-harness asks.

    Raises:
        InputError: with an option that has no effect on how it asks.
    """
    named = [name for name in asked.tasks if name.startswith(PREFIX)]
    asking = asked.asking
    given = {
        "--no-generate": not asking.generate,
        "--shots": asking.shots,
        "--chat": asking.chat,
        "--max-new-tokens": asking.max_new_tokens is not None,
        "--strict": asking.strict,
    }
    if named and (option := next((option for option, is_given in given.items() if is_given), None)):
        raise InputError(
            f"{option} has no effect on {named[0]}: lm-evaluation-harness asks it in its own way",
            f"drop it or {option}; where other tasks need that, ask the two in commands of their own",
        )
    return named


def ask_along(asked: Examination, ranks: Ranks) -> None:
    """What the other ranks of an examination do: their share of the questions, of the model and of its base."""
    exam = prepare_exam(asked)
    for folder in (exam.folder, exam.base_folder):
        if folder is not None:
            ask_all(exam, load_finished(folder, getattr(torch, asked.dtype), ranks.device), "", lambda *_: None, ranks)


def ask_all(
    exam: Exam, model: PreTrainedModel, note: str, on_progress: OnProgress, ranks: Ranks
) -> tuple[dict[str, Score], dict[str, list[Prediction]], dict[str, float]]:
    """Ask a model every task.

    Args:
        note: what progress says after a task's name.

    Returns:
        By task, the score, what became of each question, and the seconds that it took.
    """
    scores, answers, seconds = {}, {}, {}
    for name in exam.names:
        start, shown = time.perf_counter(), f"{name}{note}"
        on_progress(shown, 0, 0)
        if name in exam.own:
            found = score_task(
                model, exam.own[name], exam.tokenizer, model.device, ranks.rank, ranks.num_ranks,
                on_batch=_name(shown, on_progress),
            )  # fmt: skip
        elif ranks.rank:
            continue  # lm-evaluation-harness asks on the first rank alone
        else:
            found = score_harness(model, exam.tokenizer, exam.foreign[name], exam.asked.max_examples)
        scores[name], answers[name] = found
        seconds[name] = time.perf_counter() - start
    return scores, answers, seconds


def measure_drifts(
    exam: Exam, base: PreTrainedModel, model: PreTrainedModel, on_progress: OnProgress
) -> tuple[Drift, Drift | None]:
    """How far a model has moved from its base, on base text and on prompts."""
    asked, tokenizer, device = exam.asked, exam.tokenizer, model.device
    on_progress("base text", 0, 0)
    source = "samples of the base" if exam.texts is None else str(asked.text)
    rows, owners = exam.texts or _own_all(draw_texts(base, tokenizer, device, seed=MEASURING_SEED))
    on_text = measure_drift(base, model, rows, owners, source, device, _name("base text", on_progress))
    if exam.prompts is None:
        return on_text, None
    answered, asking, ends = exam.prompts
    if not answered:
        assert exam.base_folder is not None  # else nothing is asked of a base
        answered = draw_answers(base, asking, tokenizer, device, ends=(*ends, *read_ends(exam.base_folder)))
    rows, owners = _own_all(answered)
    return on_text, measure_drift(base, model, rows, owners, str(asked.prompts), device, _name("prompts", on_progress))


def _list_items(task: str, answers: Sequence[Prediction], base_answers: Sequence[Prediction] | None) -> list[Item]:
    base_scores = [None] * len(answers) if base_answers is None else [answer.score for answer in base_answers]
    return [
        Item(task=task, base_score=score, **answer.model_dump()) for answer, score in zip(answers, base_scores, strict=True)
    ]


def _own_all(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[int]]:
    """Rows that are a text each."""
    return rows, range(len(rows))


def _name(name: str, on_progress: OnProgress) -> Progress:
    return lambda done, total: on_progress(name, done, total)


def find_length(given: int | None, folders: Sequence[Path]) -> int:
    """Tokens that fit into all of the models.

    Raises:
        ModelError: `given` is more than a model has places for, or a model's config does not load.
    """
    known = {folder: describe_model(str(folder)).max_positions for folder in folders}
    places = {folder: number for folder, number in known.items() if number is not None}
    for folder, number in places.items():
        if given is not None and given > number:
            raise ModelError(f"--max-length is {given}, but {folder} has {number} positions", f"give {number} or less")
    return given or min([USUAL_LENGTH, *places.values()])


def check_vocabulary(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ModelError: the base has other tokens, so that what the two models predict cannot be compared."""
    held, own = load_tokenizer(base_folder).get_vocab(), tokenizer.get_vocab()
    if held != own:
        odd = sorted(set(held.items()) ^ set(own.items()))
        raise ModelError(
            f"{base_folder} has another tokenizer than {tokenizer.name_or_path}: {len(odd)} entries differ, "
            f"the first is {odd[0][0]!r}",
            "give the --base that the model was trained from",
        )


def _check_width(model: PreTrainedModel, base: PreTrainedModel) -> None:
    widths = [each.get_output_embeddings().weight.shape[0] for each in (model, base)]
    if widths[0] != widths[1]:
        raise ModelError(
            f"the model predicts {widths[0]:,} tokens, and its base {widths[1]:,}", "give the --base it was trained from"
        )
