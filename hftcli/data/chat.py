"""A row as text, and which of its characters are trained.

What is trained is settled on the characters, where it can be read and checked, and not on the tokens.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import has_generation_markers

from hftcli.data.contents import find_contents
from hftcli.data.formats import Row, is_conversation
from hftcli.data.templates import NO_TEMPLATE_FIX, Span, Template, Tools
from hftcli.data.turns import Messages
from hftcli.errors import DataError, ModelError
from hftcli.recipe.sections import TrainSection

PART_TOKEN = re.compile(r"[^>\]\s]*\Z")  # what follows the last place of a text at which a special token may end


@dataclass(frozen=True)
class Rendering:
    """The text of a row.

    Attributes:
        spans: the trained characters.
        is_plain: no chat template made it, so the tokenizer adds what it puts before every text.
    """

    text: str
    spans: list[Span]
    is_plain: bool


@dataclass(frozen=True)
class Conversation:
    """The text of a conversation.

    Attributes:
        spans: what the assistant says, with the tokens that end its turns.
        places: the content of each turn.
    """

    text: str
    spans: list[Span]
    places: list[Span]


def find_switches(row: Row, train: TrainSection) -> set[str]:
    """The switches of `train` that say what is trained of a canonical row: turned round, they would train another part."""
    found = {"assistant_only_loss"} if is_conversation(row) else set()
    prompt = row.get("prompt", [])
    # Of a prompt's turns, without `completion_only_loss`, only the assistant's may be trained.
    is_reached = not found or not train.assistant_only_loss or any(turn["role"] == "assistant" for turn in prompt)
    return found | {"completion_only_loss"} if prompt and is_reached else found


def render_row(row: Row, tokenizer: PreTrainedTokenizerBase, template: Template | None, train: TrainSection) -> Rendering:
    """Render a canonical row.

    Raises:
        DataError: the template does not render it, or not so that the assistant's part can be told, or not all of it.
        ModelError: the tokenizer has no chat template for a conversation, or no end token for plain text.
    """
    if not is_conversation(row):
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no end token, so a model could not learn to stop", "give its eos_token")
        if "text" in row:
            return render_plain("", row["text"], tokenizer.eos_token, train)
        return render_plain(row["prompt"], row["completion"], tokenizer.eos_token, train)
    if template is None:
        raise ModelError("the rows are conversations, but the tokenizer has no chat template", NO_TEMPLATE_FIX)
    prompt = row.get("prompt", [])
    messages = prompt + row["completion"] if prompt else row["messages"]
    return render_conversation(messages, len(prompt), template, train, row.get("tools"), row.get("untrained", []))


def render_plain(prompt: str, completion: str, eos_token: str, train: TrainSection) -> Rendering:
    """Render plain text, of which the prompt is not trained under `completion_only_loss`."""
    text = prompt + strip_end(completion, eos_token) + eos_token
    start = len(prompt) if train.completion_only_loss else 0
    return Rendering(text, [(start, len(text))], is_plain=True)


def strip_end(text: str, end_token: str) -> str:
    """A text without the end token that it brings, and the white space after that."""
    stripped = text.rstrip()
    return strip_end(stripped.removesuffix(end_token), end_token) if stripped.endswith(end_token) else text


def render_conversation(
    messages: Messages,
    num_prompt: int,
    template: Template,
    train: TrainSection,
    tools: Tools | None = None,
    untrained: list[int] | None = None,
) -> Rendering:
    """Render messages.

    Args:
        num_prompt: how many of them are the prompt's, which are not trained under `completion_only_loss`.
        untrained: those that are marked as not to be trained.
    """
    num_left_out = num_prompt if train.completion_only_loss else 0
    marked = [
        index
        for index in untrained or ()
        if index >= num_left_out and (messages[index]["role"] == "assistant" or not train.assistant_only_loss)
    ]  # the others are not trained as it is
    if train.assistant_only_loss or marked:
        conversation = lay_out(messages, template, tools)
    else:
        text = template.render(messages, tools)
        conversation = Conversation(text, [(0, len(text))], find_contents(text, messages, template, tools))
    text = conversation.text
    spans = conversation.spans if train.assistant_only_loss else [(0, len(text))]
    if num_left_out:
        asked = template.render(messages[:num_prompt], tools, add_generation_prompt=True)
        border = len(asked) if text.startswith(asked) else _find_turn(conversation, num_prompt)[0]
        spans = [(max(start, border), end) for start, end in spans if end > border]
    for index in marked:
        spans = _cut_out(spans, _find_turn(conversation, index))
    return Rendering(text, spans, is_plain=False)


def _find_turn(conversation: Conversation, index: int) -> Span:
    """What the assistant says in a turn with its end token; of another's turn, its content.

    Raises:
        DataError: the template does not part it from the assistant's turn before or after it.
    """
    first, last = conversation.places[index]
    turn = next(((start, end) for start, end in conversation.spans if start <= first and last <= end), (first, last))
    others = conversation.places[:index] + conversation.places[index + 1 :]
    if any(turn[0] < end and start < turn[1] for start, end in others):
        raise DataError(
            f"turn {index + 1}: the chat template does not part it from the assistant's turn beside it", "join the two turns"
        )
    return turn


def _cut_out(spans: list[Span], gone: Span) -> list[Span]:
    parts = [part for start, end in spans for part in ((start, min(end, gone[0])), (max(start, gone[1]), end))]
    return [(start, end) for start, end in parts if start < end]


def lay_out(messages: Messages, template: Template, tools: Tools | None = None) -> Conversation:
    """The text, and in it the contents of the assistant's turns with their end tokens.

    Neither what the generation prompt gives the model, nor white space after the end token, is part of a span.

    Raises:
        DataError: the assistant's part cannot be told, or something that the row says is not in the text.
    """
    if has_generation_markers(template.choose_source(tools)):
        return _lay_out_marked(messages, template, tools)
    return _lay_out_turns(messages, template, tools)


def _lay_out_marked(messages: Messages, template: Template, tools: Tools | None) -> Conversation:
    text, marked = template.render_marked(messages, tools)
    marked = _join_adjacent(marked)
    places = find_contents(text, messages, template, tools, marked)
    header = _render_header(messages, template, tools)
    spans = []
    for start, end in marked:
        start = _skip_header(text, start, header)
        if spoken := text[start:end].rstrip():
            spans.append((start, start + len(spoken)))
    return Conversation(text, spans, places)


def _skip_header(text: str, start: int, header: str) -> int:
    """Where a marked turn begins without what the generation prompt gives.

    Some templates put their markers around the header as well, or around a part of it, and some prompts open a thought that the
    turn has none of, or another one.
    """
    found = text.rfind(header, max(start - len(header), 0), start + len(header))
    if found >= 0:
        return found + len(header)
    first = next(place for place in range(max(start - len(header), 0), start + 1) if header.startswith(text[place:start]))
    num_common = next(
        (place for place, pair in enumerate(zip(text[first:], header, strict=False)) if pair[0] != pair[1]), len(header)
    )
    # Two tokens that begin alike are not the same token.
    return max(start, first + len(PART_TOKEN.sub("", header[:num_common])))


def _render_header(messages: Messages, template: Template, tools: Tools | None) -> str:
    """What the generation prompt adds before the assistant's first turn."""
    roles = [message["role"] for message in messages]
    before = messages[: roles.index("assistant")]
    if not before:
        return template.header
    asked = template.render(before, tools, add_generation_prompt=True)
    return asked.removeprefix(template.render(before, tools))


def _join_adjacent(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start, _ = joined.pop()
        joined.append((start, end))
    return joined


def _lay_out_turns(messages: Messages, template: Template, tools: Tools | None) -> Conversation:
    """Without markers: a turn lies between the generation prompt before it and the end of the conversation up to it."""
    text = template.render(messages, tools)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _find_start(text, messages[:index], template, tools)
            end = _measure_prefix(text, template.render(messages[: index + 1], tools).rstrip())
            spans.append((start, end))
    return Conversation(text, spans, find_contents(text, messages, template, tools, spans))


def _find_start(text: str, before: Messages, template: Template, tools: Tools | None) -> int:
    """Where the assistant's turn begins after these, or at the beginning of a conversation that it opens."""
    if before:
        return _measure_prefix(text, template.render(before, tools, add_generation_prompt=True))
    return max(text.find(template.header), 0) + len(template.header)


def _measure_prefix(text: str, prefix: str) -> int:
    if not text.startswith(prefix):
        raise DataError(
            "the chat template renders the beginning of a conversation differently when more turns follow, so what the "
            "assistant says cannot be told apart",
            "set model.chat_template to a Jinja file with {% generation %} and {% endgeneration %} around that part",
        )
    return len(prefix)
