"""Talking to a model: a conversation, answer by answer as it is written, and answers to prompts from a file.

Shapes: B prompts of a batch, T tokens of a prompt or of an answer, V vocabulary, S tokens that are generated.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hftcli.data.asked import tokenize_text
from hftcli.data.contents import render_question
from hftcli.data.special import Findings, SpecialTokens
from hftcli.data.templates import find_template
from hftcli.data.tokens import Progress, get_backend, ignore_progress
from hftcli.data.turns import Messages, read_messages
from hftcli.errors import DataError, ModelError
from hftcli.measuring.asking import choose_tokens
from hftcli.measuring.grading import decode_answer
from hftcli.measuring.questions import find_turn_ends
from hftcli.models.checkpoint import load_finished
from hftcli.models.configs import read_ends
from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer
from hftcli.models.device import find_device, find_exact_device
from hftcli.tasks.examples import Example, Task
from hftcli.tasks.keys import QUESTION_KEYS, refuse_keys

Message = dict[str, str]
OnText = Callable[[str], None]

BATCH_PROMPTS = 16  # prompts that are answered at once
TURN = Example([{"role": "user", "content": "Is it so?"}], "Yes.")  # shows what ends an answer under a template
ARRAY = re.compile(r'\s*\[\s*[{"]')  # how a JSON array of prompts begins
BEFORE = 16  # tokens of a prompt that are decoded with an answer: alone it would lose the blank that it begins with
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


@dataclass(frozen=True)
class Manner:
    """How answers are drawn.

    Attributes:
        max_new_tokens: where an answer that has not ended is cut.
        temperature: what the logits are divided by; 0 takes the likeliest token.
        top_p: the share of probability that the tokens to draw from hold, the likeliest first.
        seed: of the draws, which do not depend on the prompts beside; None draws others every time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Attributes:
        is_cut: whether it had not ended where the limit of tokens, or the model's places, cut it.
    """

    text: str
    is_cut: bool


class Draw:
    """A processor of logits as transformers calls it: leaves the one of the token that is drawn.

    Args:
        uniforms_BS: in [0, 1): what decides each token of each answer.
        start: tokens of the prompts.
    """

    def __init__(self, manner: Manner, uniforms_BS: torch.Tensor, start: int):
        self.temper, self.narrow = TemperatureLogitsWarper(manner.temperature), TopPLogitsWarper(manner.top_p)
        self.uniforms_BS, self.start = uniforms_BS, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) that are minus infinity but for one token of each row."""
        likely_BV = self.narrow(input_ids, self.temper(input_ids, scores.float()))
        uniforms_B = self.uniforms_BS[:, input_ids.shape[1] - self.start].to(find_exact_device(scores.device))
        tokens_B = choose_tokens(likely_BV, uniforms_B, temperature=1.0)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B[:, None], 0.0)


class TextStream:
    """A streamer as transformers calls it: hands on the text of an answer as its tokens come, never half a character.

    Args:
        end_ids: tokens that end an answer, and are no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, end_ids: Sequence[int] = ()):
        self.tokenizer, self.on_text, self.end_ids = tokenizer, on_text, end_ids
        self.prompt: list[int] | None = None
        self.ids: list[int] = []
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first that come are the prompt's."""
        if self.prompt is None:
            self.prompt = value.flatten().tolist()[-BEFORE:]
            return
        self.ids += value.flatten().tolist()
        text = self._decode()
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._show(self._decode())

    def _decode(self) -> str:
        return decode_answer(self.prompt or [], cut_end(self.ids, self.end_ids), self.tokenizer)

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


class Speaker:
    """A model that answers.

    Args:
        path: a folder or a hub id.
        needs_template: whether it must be one that takes turns.
        tuned: what was made of it, whose tokenizer and chat template it is asked with.

    Attributes:
        has_template: whether the tokenizer has a chat template.
        special: the tokenizer's special tokens.
        num_places: tokens that a prompt and its answer may have together; None where the model does not bound them.

    Raises:
        ModelError: the model does not load, or has no chat template where one is needed.
    """

    def __init__(self, path: str, dtype: str, needs_template: bool = False, tuned: str | None = None):
        transformers.utils.logging.disable_progress_bar()
        folder = fetch_checkpoint(path)
        self.tokenizer = load_tokenizer(folder if tuned is None else fetch_checkpoint(tuned))
        get_backend(self.tokenizer)
        self.template = find_template(self.tokenizer)
        self.special = SpecialTokens(self.tokenizer, self.template)
        self.has_template = self.template is not None
        if needs_template and not self.has_template:
            raise ModelError(
                f"{path} has no chat template: it goes on with a text, and knows no turns",
                f"hft generate {path} --prompts - has it go on; model.chat_template: chatml trains one that takes turns",
            )
        self.num_places = describe_model(str(folder)).max_positions
        self.model: PreTrainedModel = load_finished(folder, getattr(torch, dtype), find_device())
        eos = self.tokenizer.eos_token_id
        turn_ends = find_turn_ends(Task("chat", (TURN,)), self.tokenizer) if self.has_template else []
        self.end_ids = sorted({*read_ends(folder), *turn_ends, *([eos] if eos is not None else [])})

    def render(self, messages: Messages) -> list[int]:
        """A conversation as tokens, up to where the assistant begins, without what the template prints anyway.

        Raises:
            DataError: the chat template does not render it, or not all of it; or a turn is nothing but special tokens.
        """
        assert self.template is not None
        text = render_question(self.special.tidy_turns(messages, True, Findings()), self.template)
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def answer(self, messages: list[Message], manner: Manner, on_text: OnText) -> tuple[Answer, int]:
        """Answer the last message, handing on each piece of text as it comes.

        Returns:
            The answer, which a KeyboardInterrupt ends and does not cut; and the number of the oldest messages that had no room.

        Raises:
            DataError: not even the last message has room.
        """
        first = 1 if messages[0]["role"] == "system" else 0
        kept, num_left_out = list(messages), 0
        while (room := self._find_room(prompt := self.render(kept))) < min(manner.max_new_tokens, 16):
            if len(kept) <= first + 1:
                raise DataError(f"the message has {len(prompt):,} tokens, the model {self.num_places:,} places", "shorten it")
            del kept[first : first + 2]
            num_left_out += 2
        stream, limit, is_cut = TextStream(self.tokenizer, on_text, self.end_ids), min(room, manner.max_new_tokens), False
        try:
            (ids,) = self._generate({0: prompt}, manner, limit, stream)
            is_cut = len(ids) == limit
        except KeyboardInterrupt:
            stream.end()
        return Answer(stream.shown, is_cut), num_left_out

    def complete(self, prompts: Sequence[list[int]], manner: Manner, on_batch: Progress = ignore_progress) -> list[Answer]:
        """Answer prompts, those of like length together.

        Raises:
            DataError: a prompt leaves no room for an answer.
        """
        for number, prompt in enumerate(prompts, start=1):
            if not prompt:
                raise DataError(f"prompt {number} has no token", "write something, or leave it out")
            if self._find_room(prompt) < 1:
                raise DataError(f"prompt {number} has {len(prompt):,} tokens, the model {self.num_places:,} places", "cut it")
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        # A prompt that leaves less room is answered alone, so that no other answer is cut for it.
        roomy = [index for index in order if self._find_room(prompts[index]) >= manner.max_new_tokens]
        batches = [roomy[start : start + BATCH_PROMPTS] for start in range(0, len(roomy), BATCH_PROMPTS)]
        batches += [[index] for index in order[len(roomy) :]]
        answers, num_done = [Answer("", is_cut=False)] * len(prompts), 0
        for batch in batches:
            limit = min(manner.max_new_tokens, *(self._find_room(prompts[index]) for index in batch))
            found = self._generate({index: prompts[index] for index in batch}, manner, limit)
            for index, ids in zip(batch, found, strict=True):
                answers[index] = Answer(decode_answer(prompts[index], ids, self.tokenizer), len(ids) == limit)
            num_done += len(batch)
            on_batch(num_done, len(order))
        return answers

    def _find_room(self, prompt: list[int]) -> int:
        return self.num_places - len(prompt) if self.num_places is not None else 2**31

    def _generate(
        self, prompts: Mapping[int, list[int]], manner: Manner, num_tokens: int, stream: TextStream | None = None
    ) -> list[list[int]]:
        """Token ids of each answer. Of the checkpoint's own rules of generation only its ends count.

        Args:
            prompts: by their places among all, which decide with the seed what is drawn.
        """
        longest, device = max(map(len, prompts.values())), self.model.device
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts.values()], device=device)
        mask_BT = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()], device=device
        )
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=self.end_ids or None,
            pad_token_id=self.end_ids[0] if self.end_ids else 0,
        )  # fmt: skip
        drawing = [Draw(manner, draw_uniforms(manner.seed, list(prompts), num_tokens), longest)] if manner.temperature else []
        self.model.generation_config = config
        found_BT = self.model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, streamer=stream,
            logits_processor=LogitsProcessorList(drawing),
        )  # fmt: skip
        return [cut_end(row[longest:], self.end_ids) for row in found_BT.tolist()]


def draw_uniforms(seed: int | None, places: Sequence[int], num_tokens: int) -> torch.Tensor:
    """Numbers in [0, 1), (B, S) in float64: of each prompt its own, whatever prompts stand beside it."""
    streams = (np.random.default_rng(None if seed is None else (seed, place)) for place in places)
    return torch.from_numpy(np.stack([stream.random(num_tokens) for stream in streams]))


def cut_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """An answer's tokens before its end."""
    return next((ids[:place] for place, token in enumerate(ids) if token in end_ids), ids)


def read_prompt_lines(lines: Iterable[str], source: str) -> list[dict[str, Any]]:
    """Prompts: JSON objects with `prompt` or `messages`, one on each line or in one array, or else a plain text on each line.

    Raises:
        DataError: there is none, a line is not what the first is, or a prompt says more than would be asked.
    """
    given = [line.rstrip("\n") for line in lines if line.strip("\ufeff \t\r\n")]
    if not given:
        raise DataError(f"{source} has no prompt", 'write one on each line: plain text, or {"prompt": "..."}')
    given[0] = given[0].removeprefix("\ufeff")  # the mark that some editors put before a file
    if ARRAY.match("\n".join(given)):
        rows = _read_json("\n".join(given))
        if not isinstance(rows, list):
            raise DataError(f"{source} begins like a JSON array, and is none", 'write {"prompt": "..."} on each line')
        rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    elif given[0].lstrip().startswith("{"):
        rows = [_read_json(line) for line in given]
    else:
        return [{"prompt": line} for line in given]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt", row.get("messages")), str | list):
            raise DataError(f"{source}, prompt {number}: neither prompt nor messages", 'write {"prompt": "..."} on each line')
        if row.keys() >= {"prompt", "messages"}:
            raise DataError(
                f"{source}, prompt {number}: prompt and messages, and one alone would be asked", "drop one of the two"
            )
        refuse_keys(row, QUESTION_KEYS, f"{source}, prompt {number}")
    return rows


def _read_json(text: str) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def encode_prompts(
    speaker: Speaker, rows: Sequence[dict[str, Any]], as_chat: bool | None, system: str | None
) -> list[list[int]]:
    """Prompts as tokens: as a user's turn where the model has a chat template, else as they are.

    Args:
        rows: each with `messages`, or with a `prompt` that is a text or messages.
        as_chat: whether to take the template for a text; None takes it where there is one.

    Raises:
        ModelError: it is to be taken, and there is none.
        DataError: naming the prompt that is no conversation, has another system turn, or that the template does not render
            whole.
    """
    asked = [row.get("messages", row.get("prompt")) for row in rows]
    needs_turns = as_chat or system is not None or any(not isinstance(one, str) for one in asked)
    if needs_turns and not speaker.has_template:
        raise ModelError("the model has no chat template", "give plain prompts, without --chat, --system and messages")
    is_chat = speaker.has_template if as_chat is None else as_chat
    opening = [{"role": "system", "content": system}] if system is not None else []
    prompts = []
    for number, one in enumerate(asked, start=1):
        try:
            if not isinstance(one, str):
                prompts.append(speaker.render(_open(read_messages(one, "messages"), opening)))
            elif is_chat:
                prompts.append(speaker.render([*opening, {"role": "user", "content": one}]))
            else:
                prompts.append(tokenize_text(one, speaker.special))
        except DataError as error:
            raise DataError(f"prompt {number}: {error.message}", error.fix) from None
    return prompts


def _open(messages: Messages, opening: Messages) -> Messages:
    """Messages after the system turn that all are to have.

    Raises:
        DataError: they have one of their own, and it says something else.
    """
    if not opening or messages[0]["role"] not in ("system", "developer"):
        return [*opening, *messages]
    if messages[0]["content"] != opening[0]["content"]:
        raise DataError("--system and the conversation's own system turn differ", "drop one of the two")
    return messages


def read_prompts_from(path: Path) -> list[dict[str, Any]]:
    """Prompts of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_prompt_lines(path.read_text(encoding="utf-8").split("\n"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: {error}", "give a file of prompts, or - for standard input") from None
