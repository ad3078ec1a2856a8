"""Conversations that a model writes whole: what a chat template prints before a user's first word, and the model goes on.

The user's turn is drawn to the token that ends it, the template goes on to the answer, and that is drawn as well, as in Magpie
(arXiv 2406.08464). What is drawn has labels, the template's own tokens have none.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data.templates import NO_TEMPLATE_FIX, Template, find_template
from hftcli.data.tokens import IGNORED, Layout, get_backend
from hftcli.errors import ModelError
from hftcli.measuring.asking import generate_answers
from hftcli.measuring.questions import Row, TokenizedTask
from hftcli.tasks.examples import Task


@dataclass(frozen=True)
class BareTurn:
    """A chat template without a conversation, in tokens.

    Attributes:
        before: what stands before a user's first word.
        after: from the token that ends the user's turn to the answer's first word.
        answer_end: the token that ends an answer.
        end: the token that ends any text; -1 where there is none.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    answer_end: int
    end: int


def find_bare_turn(tokenizer: PreTrainedTokenizerBase) -> BareTurn:
    """Raises: ModelError: there is no template, or none by which it can be told where a user's turn begins and ends."""
    template = find_template(tokenizer)
    if template is None:
        raise ModelError("method.self_replay.begin: chat needs a chat template, and the tokenizer has none", NO_TEMPLATE_FIX)
    backend = get_backend(tokenizer)
    before, after, answered = (
        backend.encode(text, add_special_tokens=False).ids if text else [] for text in _find_borders(template)
    )
    marks = backend.get_added_tokens_decoder()
    if not before or not after or after[0] not in marks:
        raise ModelError(
            "method.self_replay.begin: chat draws a user's turn to the token that ends it, and the tokenizer's chat template "
            + ("prints nothing before one" if not before else "ends one with plain text"),
            "set model.chat_template: chatml where the model knows it, or method.self_replay.begin: nothing",
        )
    end = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    answer_end = answered[0] if answered and answered[0] in marks else end
    return BareTurn(tuple(before), tuple(after), answer_end, end)


def _find_borders(template: Template) -> tuple[str, str, str]:
    """What stands before a user's turn, between it and the answer, and after the answer; empty where it cannot be told."""
    asked = template.find_layout(("user",))
    answered = template.find_layout(("user", "assistant"))
    if asked is None:
        return "", "", ""
    return asked[0], asked[1] + template.header, answered[2] if answered is not None else ""


def draw_conversations(model: PreTrainedModel, turn: BareTurn, device: torch.device, num_texts: int, length: int) -> list[Row]:
    """Questions with their answers, both the model's own: the same every time.

    Args:
        length: tokens at which a conversation is cut; a question that has not ended by then has no answer.
    """
    questions = _draw(model, [[*turn.before]] * num_texts, turn.after[0], turn.end, length - len(turn.before), device)
    rows = [([*turn.before, *drawn], [IGNORED] * len(turn.before) + drawn) for drawn in questions]
    # The end that was drawn is the first token of what follows.
    prompts = {row: [*ids, *turn.after[1:]] for row, (ids, _) in enumerate(rows) if ids[-1] == turn.after[0]}
    prompts = {row: prompt for row, prompt in prompts.items() if len(prompt) < length}
    if not prompts:
        return rows
    room = length - min(map(len, prompts.values()))
    answers = _draw(model, [*prompts.values()], turn.answer_end, turn.end, room, device)
    for (row, prompt), answer in zip(prompts.items(), answers, strict=True):
        drawn = answer[: length - len(prompt)]
        rows[row] = (prompt + drawn, rows[row][1] + [IGNORED] * (len(turn.after) - 1) + drawn)
    return rows


def _draw(
    model: PreTrainedModel, prompts: list[list[int]], end: int, text_end: int, num_tokens: int, device: torch.device
) -> list[list[int]]:
    """What a model draws after prompts, with the end that it comes to."""
    layouts = [Layout(prompt, "", []) for prompt in prompts]
    asked = TokenizedTask(Task("turns of the model's own", ()), [], layouts, num_tokens, [end])
    found = []
    for answer in generate_answers(model, asked, device, temperature=1.0):
        drawn = answer if len(answer) == num_tokens else [*answer, end]
        found.append(drawn[: drawn.index(text_end) + 1] if text_end in drawn else drawn)
    return found
