"""Talking to a model: a conversation, answer by answer as it is written, and answers to prompts from a file.

Shapes: T tokens of a prompt or of an answer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hftcli.data.templates import find_template
from hftcli.data.tokens import Progress, ignore_progress
from hftcli.errors import DataError, ModelError
from hftcli.measuring.questions import find_turn_ends
from hftcli.models.checkpoint import load_finished
from hftcli.models.configs import read_ends
from hftcli.models.description import describe_model, fetch_checkpoint, load_tokenizer
from hftcli.models.device import find_device
from hftcli.tasks.examples import Example, Task

Message = dict[str, str]
OnText = Callable[[str], None]

BATCH_PROMPTS = 16  # prompts that are answered at once
TURN = Example([{"role": "user", "content": "Is it so?"}], "Yes.")  # shows what ends an answer under a template
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


@dataclass(frozen=True)
class Manner:
    """How answers are drawn.

    Attributes:
        max_new_tokens: where an answer that has not ended is cut.
        temperature: what the logits are divided by; 0 takes the likeliest token.
        top_p: the share of probability that the tokens to draw from hold, the likeliest first.
        seed: of the draws; None draws others every time.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class TextStream:
    """A streamer as transformers calls it: hands on the text of an answer as its tokens come, never half a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.shown = ""
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first that come are the prompt's."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith(UNFINISHED):
            self._show(text)

    def end(self) -> None:
        """Hand on what is left."""
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


class Speaker:
    """A model that answers.

    Args:
        path: a folder or a hub id.
        needs_template: whether it must be one that takes turns.

    Attributes:
        has_template: whether the tokenizer has a chat template.
        num_places: tokens that a prompt and its answer may have together; None where the model does not bound them.

    Raises:
        ModelError: the model does not load, or has no chat template where one is needed.
    """

    def __init__(self, path: str, dtype: str, needs_template: bool = False):
        transformers.utils.logging.disable_progress_bar()
        folder = fetch_checkpoint(path)
        self.tokenizer = load_tokenizer(folder)
        self.has_template = find_template(self.tokenizer) is not None
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

    def render(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as tokens, up to where the assistant begins."""
        try:
            found: list[int] = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except (TypeError, ValueError, jinja2.TemplateError) as error:
            raise DataError(f"the chat template refuses {str(messages)[:80]}: {error}", "see the model's template") from None
        return found

    def answer(self, messages: list[Message], manner: Manner, on_text: OnText) -> tuple[str, int]:
        """Answer the last message, handing on each piece of text as it comes.

        Returns:
            The answer, up to where a KeyboardInterrupt came; and the number of the oldest messages that had no room.

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
        stream = TextStream(self.tokenizer, on_text)
        try:
            self._generate([prompt], manner, min(room, manner.max_new_tokens), stream)
        except KeyboardInterrupt:
            stream.end()
        return stream.shown, num_left_out

    def complete(self, prompts: Sequence[list[int]], manner: Manner, on_batch: Progress = ignore_progress) -> list[str]:
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
        answers, num_done = [""] * len(prompts), 0
        for batch in batches:
            room = min(self._find_room(prompts[index]) for index in batch)
            found = self._generate([prompts[index] for index in batch], manner, min(room, manner.max_new_tokens))
            for index, ids in zip(batch, found, strict=True):
                answers[index] = self.tokenizer.decode(ids, skip_special_tokens=True)
            num_done += len(batch)
            on_batch(num_done, len(order))
        return answers

    def _find_room(self, prompt: list[int]) -> int:
        return self.num_places - len(prompt) if self.num_places is not None else 2**31

    def _generate(
        self, prompts: Sequence[list[int]], manner: Manner, num_tokens: int, stream: TextStream | None = None
    ) -> list[list[int]]:
        """Token ids of each answer. Of the checkpoint's own rules of generation only its ends count."""
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        is_drawn = manner.temperature > 0
        drawing = {"temperature": manner.temperature, "top_p": manner.top_p, "top_k": 0} if is_drawn else {}
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=is_drawn, eos_token_id=self.end_ids or None,
            pad_token_id=self.end_ids[0] if self.end_ids else 0, **drawing,
        )  # fmt: skip
        if manner.seed is not None:
            torch.manual_seed(manner.seed)
        self.model.generation_config = config
        found_BT = self.model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, streamer=stream)
        return [cut_end(row[longest:], self.end_ids) for row in found_BT.tolist()]


def cut_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """An answer's tokens before its end."""
    return next((ids[:place] for place, token in enumerate(ids) if token in end_ids), ids)


def read_prompt_lines(lines: Iterable[str], source: str) -> list[dict[str, Any]]:
    """Prompts, one on each line: JSON objects with `prompt` or `messages`, or, where the first line is none, plain text.

    Raises:
        DataError: there is none, or a line is not what the first is.
    """
    given = [line.rstrip("\n") for line in lines if line.strip()]
    if not given:
        raise DataError(f"{source} has no prompt", 'write one on each line: plain text, or {"prompt": "..."}')
    if not given[0].lstrip().startswith("{"):
        return [{"prompt": line} for line in given]
    rows = []
    for number, line in enumerate(given, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("prompt", row.get("messages")), str | list):
            raise DataError(f"{source}, prompt {number}: neither prompt nor messages", 'write {"prompt": "..."} on each line')
        rows.append(row)
    return rows


def encode_prompts(
    speaker: Speaker, rows: Sequence[dict[str, Any]], as_chat: bool | None, system: str | None
) -> list[list[int]]:
    """Prompts as tokens: as a user's turn where the model has a chat template, else as they are.

    Args:
        as_chat: whether to take the template; None takes it where there is one.

    Raises:
        ModelError: it is to be taken, and there is none.
    """
    needs_turns = as_chat or system is not None or any("messages" in row for row in rows)
    if needs_turns and not speaker.has_template:
        raise ModelError("the model has no chat template", "give plain prompts, without --chat, --system and messages")
    is_chat = speaker.has_template if as_chat is None else as_chat
    opening = [{"role": "system", "content": system}] if system is not None else []
    prompts = []
    for row in rows:
        if "messages" in row:
            prompts.append(speaker.render([*opening, *row["messages"]]))
        elif is_chat:
            prompts.append(speaker.render([*opening, {"role": "user", "content": row["prompt"]}]))
        else:
            prompts.append(speaker.tokenizer(row["prompt"])["input_ids"])
    return prompts


def read_prompts_from(path: Path) -> list[dict[str, Any]]:
    """Prompts of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_prompt_lines(path.read_text(encoding="utf-8").split("\n"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: {error}", "give a file of prompts, or - for standard input") from None
