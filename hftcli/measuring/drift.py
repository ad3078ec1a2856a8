"""How far a model has moved from its base: the change of cross-entropy, and KL(base || model), on the same texts.

Both models read each batch, so that the divergence at a place is summed over the whole vocabulary instead of estimated from
tokens that one of them drew.

Shapes: B rows of a batch, T tokens, V vocabulary, N places that are measured, R rows in all.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data.asked import say_special, tidy_task
from hftcli.data.chat import Rendering
from hftcli.data.contents import render_question
from hftcli.data.prepare import deal_rows
from hftcli.data.templates import find_template
from hftcli.data.tokens import IGNORED, Layout, Progress, get_backend, ignore_progress, label_tokens, tokenize_prompts
from hftcli.data.turns import read_messages
from hftcli.errors import DataError, ModelError
from hftcli.measuring.asking import SAMPLING_SEED, generate_answers, predict_answers
from hftcli.measuring.evaluation import Drift
from hftcli.measuring.questions import Row, TokenizedTask, find_turn_ends, tokenize_task
from hftcli.models.deltas import hash_checkpoint
from hftcli.tasks import load_task
from hftcli.tasks.examples import Example, Task
from hftcli.tasks.folder import read_json
from hftcli.tasks.general import SUFFIX, read_lines
from hftcli.tasks.keys import ANSWER_KEYS, QUESTION_KEYS, refuse_keys

BATCH_TOKENS = 1024  # padded tokens in a pass of each model: their logits are held at once
NUM_SAMPLES = 64  # texts that the base writes where none is given
NO_BEGINNING = "give its bos_token; hft eval takes a file of --text instead"
SAMPLE_TOKENS = 64  # where a text or an answer of the base that has not ended is cut


@torch.no_grad()
def measure_drift(
    base: PreTrainedModel,
    model: PreTrainedModel,
    rows: Sequence[Row],
    owners: Sequence[int],
    source: str,
    device: torch.device,
    on_batch: Progress = ignore_progress,
) -> Drift:
    """Let both models read rows.

    Args:
        rows: token ids, and labels where something is measured.
        owners: index of the text that each row is a part of: rows of one text are not independent.
    """
    readings_R4 = torch.zeros(len(rows), 4, dtype=torch.float64)  # places, nats of the base, nats of the model, KL
    batches = deal_rows([len(ids) for ids, _ in rows], BATCH_TOKENS, num_ranks=1)
    for index, batch in enumerate(batches):
        own = [rows[row] for row in batch]
        base_NV, targets_N, is_measured_BT = predict_answers(base, own, device)
        model_NV, _, _ = predict_answers(model, own, device)
        base_NV, model_NV = base_NV.log_softmax(-1), model_NV.log_softmax(-1)
        kl_N = torch.nn.functional.kl_div(model_NV, base_NV, log_target=True, reduction="none").sum(-1)
        nats = [-log_probs_NV.gather(-1, targets_N[:, None])[:, 0] for log_probs_NV in (base_NV, model_NV)]
        values_N4 = torch.stack([torch.ones_like(kl_N), *nats, kl_N], dim=-1).cpu().double()
        readings_R4[batch] = torch.zeros(len(batch), 4, dtype=torch.float64).index_add(
            0, is_measured_BT.nonzero()[:, 0].cpu(), values_N4
        )
        on_batch(index + 1, len(batches))
    totals_4 = torch.zeros(max(owners) + 1, 4, dtype=torch.float64).index_add(0, torch.tensor([*owners]), readings_R4)
    num_tokens, base_nats, model_nats, _ = totals_4.sum(0).tolist()
    (change, change_error), (kl, kl_error) = (
        measure_ratio(values, totals_4[:, 0]) for values in (totals_4[:, 2] - totals_4[:, 1], totals_4[:, 3])
    )
    return Drift(
        source=source, base_nll=base_nats / num_tokens, model_nll=model_nats / num_tokens, nll_change=change,
        nll_change_error=change_error, kl=kl, kl_error=kl_error, num_tokens=int(num_tokens), num_texts=len(totals_4),
    )  # fmt: skip


def measure_ratio(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float | None]:
    """The mean per token over texts, and its standard error by the delta method; None for a single text.

    Args:
        sums, counts: of each text, float64.
    """
    ratio, num_texts = (sums.sum() / counts.sum()).item(), len(sums)
    if num_texts == 1:
        return ratio, None
    variance = (sums - ratio * counts).square().sum().item() * num_texts / (num_texts - 1)
    return ratio, math.sqrt(variance) / counts.sum().item()


def read_texts(
    path: Path, max_length: int, max_examples: int | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[int]]:
    """Rows of a file of `{"text": "..."}` on each line, in pieces of `max_length` tokens, and the text that each is a piece of.

    Raises:
        DataError: naming the file and the line that is something else, or a file with nothing to measure.
    """
    lines = read_lines(path)
    for number, line in lines.items():
        if not isinstance(line.get("text"), str):
            raise DataError(f'{path}: row {number}: expected {{"text": "..."}}, got the keys {", ".join(line) or "none"}')
    texts = [line["text"] for line in lines.values() if line["text"]][:max_examples]
    renderings = [Rendering(text, [(0, len(text))], is_plain=True) for text in texts]
    rows: list[Row] = []
    owners: list[int] = []
    for rendering, encoding in zip(renderings, get_backend(tokenizer).encode_batch(texts), strict=True):
        ids, labels = label_tokens(rendering, encoding)
        pieces = [
            (ids[start : start + max_length], [IGNORED, *labels[start + 1 : start + max_length].tolist()])
            for start in range(0, len(ids) - 1, max_length)
        ]
        rows += pieces
        owners += [owners[-1] + 1 if owners else 0] * len(pieces)
    if not rows:
        raise DataError(f"{path}: none of its texts has two tokens")
    return rows, owners


def draw_texts(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, num_texts: int = NUM_SAMPLES,
    num_tokens: int = SAMPLE_TOKENS, seed: int = SAMPLING_SEED,
) -> list[Row]:  # fmt: skip
    """Texts that the base writes from nothing: the same every time.

    Args:
        num_tokens: where one that has not ended is cut.
        seed: of the draws; MEASURING_SEED where a model is measured by the texts, as others choose what it trains.

    Raises:
        ModelError: the tokenizer has no token to begin a text with.
    """
    beginning = find_beginning(tokenizer)
    if not beginning:
        raise ModelError(f"the tokenizer {tokenizer.name_or_path} has no token to begin a text with", NO_BEGINNING)
    return draw_answers(base, [beginning] * num_texts, tokenizer, device, num_tokens, seed=seed)


def find_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a text begins with; none where the tokenizer has nothing that could be one."""
    encoding = get_backend(tokenizer).encode("a")
    if beginning := encoding.ids[: encoding.special_tokens_mask.index(0)]:
        return beginning
    # It puts nothing before a text, so the base writes what comes after one.
    return [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]


def identify_writer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What decides which texts a model writes from nothing: its files, and the tokens with which a text begins and ends."""
    return {"files": hash_checkpoint(folder), "beginning": find_beginning(tokenizer), "end": tokenizer.eos_token_id}


def draw_answers(
    base: PreTrainedModel, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device,
    num_tokens: int = SAMPLE_TOKENS, ends: Sequence[int] = (), seed: int = SAMPLING_SEED,
) -> list[Row]:  # fmt: skip
    """Prompts with what the base draws after them, which has labels.

    Args:
        ends: tokens that end an answer, besides the tokenizer's end token; the one that is drawn is a part of it.
    """
    end_ids = sorted({tokenizer.eos_token_id, *ends} - {None})
    asked = TokenizedTask(
        Task("samples of the base", ()), [], [Layout(prompt, "", []) for prompt in prompts], num_tokens, end_ids
    )
    rows = []
    answers = generate_answers(base, asked, device, temperature=1.0, keeps_end=True, seed=seed)
    for prompt, drawn in zip(prompts, answers, strict=True):
        rows.append((prompt + drawn, [IGNORED] * len(prompt) + drawn))
    return rows


def read_prompts(
    source: str, root: str | None, max_length: int, max_examples: int | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[list[int]], list[int]]:
    """Prompts with their answers, which have labels; or, where a file has none, prompts alone.

    Args:
        source: a task, or a file of rows `{"prompt": "...", "answer": "..."}`: JSON lines, or one JSON array.

    Returns:
        Rows and prompts, one of them empty, and the tokens that end an answer to these prompts.

    Raises:
        InputError: no such task or file, a row of another form, or one that is too long.
    """
    if not Path(source).is_file():
        task = load_task(source, root, max_examples=max_examples)
        bare = tuple(dataclasses.replace(example, options=()) for example in task.examples)
        return tokenize_task(Task(source, bare, cut=task.cut), max_length, tokenizer).rows, [], []
    rows = _read_rows(Path(source))
    answered = "answer" in rows[0]
    examples = tuple(_make_example(row, answered, f"{source}: row {number}") for number, row in enumerate(rows, start=1))
    _check_alike(examples, source)
    examples = examples[:max_examples]
    if answered:
        return tokenize_task(Task(source, examples), max_length, tokenizer).rows, [], []
    room = max_length - SAMPLE_TOKENS
    tidied, found = tidy_task(Task(source, examples), tokenizer)
    say_special(source, found["num_special"], found["special_tokens"])
    prompts = tokenize_prompts(tidied.examples, "middle", room, tokenizer)
    template = find_template(tokenizer)
    for number, example in enumerate(tidied.examples, start=1):
        if template is not None and not isinstance(example.prompt, str):
            try:
                render_question(example.prompt, template)
            except DataError as error:
                raise DataError(f"{source}: row {number}: {error.message}", error.fix) from None
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > room:
            raise DataError(f"{source}: prompt {number} has {len(prompt)} tokens, more than {room}", "raise --max-length")
    return [], prompts, find_turn_ends(tidied, tokenizer)


def _read_rows(path: Path) -> list[Any]:
    if path.suffix == SUFFIX:
        return list(read_lines(path).values())
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise DataError(f'{path}: expected a JSON array of rows {{"prompt": "...", "answer": "..."}}')
    return rows


def _check_alike(examples: Sequence[Example], source: str) -> None:
    """Raises: DataError: a prompt is a text and the first one messages, or the other way round."""
    kinds = ["a text" if isinstance(example.prompt, str) else "messages" for example in examples]
    odd = next((number for number, kind in enumerate(kinds, start=1) if kind != kinds[0]), None)
    if odd is not None:
        raise DataError(
            f"{source}: row {odd}: its prompt is {kinds[odd - 1]}, and the first row's {kinds[0]}", "give all rows the one kind"
        )


def _make_example(row: Any, answered: bool, place: str) -> Example:
    keys = ("prompt", "answer") if answered else ("prompt",)
    kinds = {"prompt": str | list, "answer": str}
    if not isinstance(row, dict) or not all(isinstance(row.get(key), kinds[key]) and row[key] for key in keys):
        form = ", ".join(f'"{key}": "..."' for key in keys)
        raise DataError(f"{place}: expected {{{form}}}, where the prompt is a text or messages; got {str(row)[:60]}")
    if "answer" in row and not answered:
        raise DataError(f"{place} has an answer, and the first row has none", "give all rows an answer, or none")
    refuse_keys(row, (*QUESTION_KEYS, *(ANSWER_KEYS if answered else ())), place)
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        try:
            prompt = read_messages(prompt, "prompt")
        except DataError as error:
            raise DataError(f"{place}: {error.message}", error.fix) from None
    return Example(prompt, row["answer"] if answered else "")
