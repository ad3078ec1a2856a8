"""Where the contents of a conversation stand in the text that a chat template makes of it.

None may be lost: a template may drop reasoning, tools, a role, or a whole answer, and the row would then teach something else.
Where the text is the template's layout with the contents in it, they are found exactly. Where the template takes contents
apart, as with reasoning and calls of tools, their pieces are looked for, turn by turn.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from hftcli.data.templates import NO_TEMPLATE_FIX, PROBE, Span, Template, Tools, make_signs, split_layout
from hftcli.data.turns import Message, Messages
from hftcli.errors import DataError

THOUGHTS = re.compile(r"\s*</?think>\s*")
OUTSIDE = "stands outside of what is trained"


def find_contents(
    text: str, messages: Messages, template: Template, tools: Tools | None = None, spans: list[Span] | None = None
) -> list[Span]:
    """The characters of each turn's content, from the first to the last of its pieces.

    Args:
        spans: the characters that the assistant says, in which its contents must stand; None where they do not matter.

    Raises:
        DataError: naming the turn that is not in the text whole, or stands in the wrong part of it.
    """
    for index, message in enumerate(messages):
        if message["role"] == "developer" and "developer" not in template.choose_source(tools):
            raise DataError(
                f"turn {index + 1} is the developer's, and the chat template has no such role", "write 'system' instead"
            )
    layout = template.find_layout(tuple(message["role"] for message in messages))
    is_plain = not tools and all(len(message) == 2 for message in messages)  # a role and a content
    places = _match_layout(text, messages, layout) if layout and is_plain else None
    if places is None:
        places = _search_pieces(text, messages, _find_others(text, messages, template, tools), spans)
    elif spans is not None:
        for index, (message, place) in enumerate(zip(messages, places, strict=True)):
            if message["role"] == "assistant" and not _is_inside(place, spans):
                raise _describe_loss(index, message, OUTSIDE)
    if tools:
        _check_tools(text, tools, places)
    return places


def render_question(messages: Messages, template: Template) -> str:
    """A conversation up to where the assistant begins.

    Of what the assistant said before, templates leave out its thoughts; of what the others say, nothing may be left out.

    Raises:
        DataError: the template does not render it, or not all of it.
    """
    text = template.render(messages, add_generation_prompt=True)
    probe = [
        {"role": "assistant", "content": "Yes."} if message["role"] == "assistant" and "tool_calls" not in message else message
        for message in messages
    ]
    try:
        find_contents(template.render(probe), probe, template)
    except DataError as error:
        raise DataError(error.message, "take it out, or write it into the user's turn") from None
    return text


def render_opening(messages: Messages, template: Template) -> str:
    """A conversation up to where training puts the first character of what the assistant answers.

    Behind the generation prompt, or in place of its end, a template may print a blank, an empty thought or a channel.

    Raises:
        DataError: the template does not render it, or prints no answer.
    """
    return _split_at_answer(messages, template)[0]


def find_answer(text: str, messages: Messages, template: Template) -> Span:
    """The characters of the last turn's content, the assistant's, in the text of a conversation.

    Raises:
        DataError: the content is not in the text whole.
    """
    opening, closing = _split_at_answer(messages[:-1], template)
    content = messages[-1]["content"]
    for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
        if text == opening + variant + closing:
            return len(opening), len(opening) + len(variant)
    return find_contents(text, messages, template)[-1]  # an answer with a thought of its own


def _split_at_answer(messages: Messages, template: Template) -> tuple[str, str]:
    """What the template prints before and after an answer."""
    text = template.render([*messages, {"role": "assistant", "content": PROBE}])
    opening, sign, closing = text.partition(PROBE)
    if not sign:
        raise DataError("the chat template does not print what the assistant answers", NO_TEMPLATE_FIX)
    return opening, closing


def _match_layout(text: str, messages: Messages, layout: tuple[str, ...]) -> list[Span] | None:
    """The contents of a text that is the layout with the contents in it, be they stripped; None where it is not."""
    position, places = len(layout[0]), []
    if not text.startswith(layout[0]):
        return None
    for message, printed in zip(messages, layout[1:], strict=True):
        content = message["content"]
        variants = (content, content.strip(), content.rstrip(), content.lstrip())
        if message["role"] == "tool":  # some templates print a result as JSON
            variants += tuple(json.dumps(content, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
        for variant in variants:
            end = position + len(variant)
            if text.startswith(variant, position) and text.startswith(printed, end):
                places.append((position, end))
                position = end + len(printed)
                break
        else:
            return None
    return places if position == len(text) else None


def _find_others(text: str, messages: Messages, template: Template, tools: Tools | None) -> dict[int, Span]:
    """The contents of the turns that are not the assistant's, by their numbers; none where they cannot be told exactly.

    What the assistant says stays as it is while the others' contents are signs, so that the template does with it what it did.
    """
    others = [index for index, message in enumerate(messages) if message["role"] != "assistant"]
    contents = [messages[index] for index in others]
    signed = list(messages)
    for index, sign in zip(others, make_signs(len(others)), strict=True):
        signed[index] = {**messages[index], "content": sign}
    layout = split_layout(template.render(signed, tools), len(others))
    places = _match_layout(text, contents, layout) if layout else None
    return dict(zip(others, places, strict=True)) if places else {}


def _search_pieces(text: str, messages: Messages, known: dict[int, Span], spans: list[Span] | None) -> list[Span]:
    """The place of every turn: where it is known, or from the first to the last of the pieces that it is printed in."""
    position, places = 0, []
    for index, message in enumerate(messages):
        limit = min((start for other, (start, _) in known.items() if other > index), default=len(text))
        if index in known:
            place = known[index]
        elif found := _find_pieces(text[:limit], message, position, spans, index):
            place = min(start for start, _ in found), max(end for _, end in found)
        else:
            place = position, position
        places.append(place)
        position = place[1]
    return places


def _find_pieces(text: str, message: Message, position: int, spans: list[Span] | None, index: int) -> list[Span]:
    """The places of what a turn says, one after another, and then of its calls, whose arguments come in any order."""
    own, found = spans if message["role"] == "assistant" else None, []
    reached = position
    for piece in _list_said(message, text[position:]):
        found.append(_find_piece(text, piece, reached, own, index, message))
        reached = found[-1][1]
    return found + [_find_piece(text, piece, position, own, index, message) for piece in _list_called(message)]


def _find_piece(
    text: str, piece: tuple[str, ...], position: int, spans: list[Span] | None, index: int, message: Message
) -> Span:
    """The first place of a piece, in any of its forms."""
    places = [(start, start + len(form)) for form in piece for start in _find_all(text, form, position)]
    fitting = [place for place in places if spans is None or _is_inside(place, spans)]
    if not fitting:
        raise _describe_loss(index, message, OUTSIDE if places else "is not in the text that the chat template makes", piece[0])
    return min(fitting)


def _find_all(text: str, form: str, position: int) -> Iterator[int]:
    while (position := text.find(form, position)) >= 0:
        yield position
        position += 1


def _is_inside(place: Span, spans: list[Span]) -> bool:
    return any(start <= place[0] and place[1] <= end for start, end in spans)


def _list_said(message: Message, text: str) -> Iterator[tuple[str, ...]]:
    """What a turn thinks and says, in pieces that a template prints as they are, each in the forms that it may take."""
    for key in ("reasoning_content", "content"):
        said = message.get(key, "").strip()
        if said and said in text:
            yield (said,)
        else:
            yield from ((piece,) for piece in THOUGHTS.split(said) if piece.strip())


def _list_called(message: Message) -> Iterator[tuple[str, ...]]:
    """What a turn calls, in such pieces."""
    for call in message.get("tool_calls", ()):
        yield (call["function"]["name"],)
        yield from _list_leaves(call["function"]["arguments"])


def _list_leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Keys and values of a nested value, each as text, and as JSON and Python write it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _list_leaves(key)
            yield from _list_leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _list_leaves(item)
    elif value != "":
        written = [json.dumps(value, ensure_ascii=is_ascii) for is_ascii in (False, True)]
        yield (str(value), *(form.strip('"') for form in written))


def _check_tools(text: str, tools: Tools, places: list[Span]) -> None:
    """Raises: DataError: the text lacks the list of tools, or a part of it."""
    borders = [0, *(border for place in places for border in place), len(text)]
    printed = "".join(text[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True))
    for tool in tools:
        function = tool["function"]
        named = [function["name"], *function.get("parameters", {}).get("properties", {})]
        for leaf in filter(None, [*named, function.get("description")]):
            if not any(form in printed for form in next(_list_leaves(leaf))):
                raise DataError(
                    f"the tool {function['name']} is not in the text that the chat template makes: {leaf!r} is missing",
                    "set model.chat_template to one that renders tools, or drop the column",
                )


def _describe_loss(index: int, message: Message, reason: str, piece: str | None = None) -> DataError:
    said = (piece or message["content"]).strip()
    shown = repr(said if len(said) <= 40 else said[:37] + "...")
    return DataError(
        f"turn {index + 1}, the {message['role']}'s: {shown} {reason}",
        "set model.chat_template to a template that keeps it, or drop the row",
    )
