"""Chat templates: which one a tokenizer has, and what it prints.

What a template prints around the contents of a conversation is its layout. It is learned by rendering the same turns with
signs in place of their contents, and tells what a row says from what the template says itself.
"""

from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

from hftcli.data.turns import Message, Messages
from hftcli.errors import DataError, ModelError

Span = tuple[int, int]  # characters [start, end)
Tools = list[dict[str, Any]]

SIGN_START, SIGN_END = "\ue000", "\ue001"  # around a sign: no template knows them, and none takes them for white space
PROBE = f"{SIGN_START}?{SIGN_END}"
# Templates that print today's date would teach another text on every day: they print this one, Llama 3.2's own default.
DAY = datetime(2024, 7, 26)
DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", *"aAbBdDeFHIjmMpSTuwyY")
DATED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('%{directive}', '{DAY.strftime(f'%{directive}')}')" for directive in DIRECTIVES)
    + " }}{%- endmacro -%}"
)
NO_TEMPLATE_FIX = "set model.chat_template to chatml, tulu or a Jinja file"


@dataclass(frozen=True)
class Template:
    """A chat template with the special tokens it may print.

    Attributes:
        tool_source: the template for conversations with tools, where the tokenizer has one of its own for them.
    """

    source: str
    special_tokens: dict[str, str]
    tool_source: str | None = None
    _layouts: dict[tuple[str, ...], tuple[str, ...] | None] = field(default_factory=dict, compare=False, repr=False)

    def render(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = False) -> str:
        """Raises: DataError: the template does not render such a conversation."""
        return self._print(self._shape(messages), tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: Messages, tools: Tools | None = None) -> tuple[str, list[Span]]:
        """The text, and the characters between generation markers."""
        return self._print(self._shape(messages), tools, return_assistant_tokens_mask=True)

    def choose_source(self, tools: Tools | None) -> str:
        """The template's text for a conversation with these tools, or with none."""
        return (self.tool_source if tools else None) or self.source

    def find_layout(self, roles: tuple[str, ...]) -> tuple[str, ...] | None:
        """What is printed before, between and after the contents of turns with these roles; None where that cannot be told."""
        if roles not in self._layouts:
            self._layouts[roles] = self._learn_layout(roles)
        return self._layouts[roles]

    @cached_property
    def header(self) -> str:
        """What the generation prompt adds after a user's turn; nothing where the template does not say."""
        user = [{"role": "user", "content": PROBE}]
        try:
            return self.render(user, add_generation_prompt=True).removeprefix(self.render(user))
        except DataError:
            return ""

    def _print(self, messages: Messages, tools: Tools | None = None, **options: bool) -> tuple[str, list[Span]]:
        source = self.choose_source(tools)
        if "strftime_now" in source:
            source = DATED + source
        try:
            texts, marked = render_jinja_template([messages], tools, chat_template=source, **options, **self.special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(f"the chat template does not render the conversation: {error}") from None
        return texts[0], marked[0] if marked else []

    def _shape(self, messages: Messages) -> Messages:
        if self._takes_parts:
            messages = [{**message, "content": _make_parts(message["content"])} for message in messages]
        return messages

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether a content is printed only where it is a list of parts."""
        return not self._prints(PROBE) and self._prints(_make_parts(PROBE))

    def _prints(self, content: Any) -> bool:
        try:
            return PROBE in self._print([{"role": "user", "content": content}])[0]
        except DataError:
            return False

    def _learn_layout(self, roles: tuple[str, ...]) -> tuple[str, ...] | None:
        messages = [{"role": role, "content": sign} for role, sign in zip(roles, make_signs(len(roles)), strict=True)]
        try:
            return split_layout(self.render(messages), len(roles))
        except DataError:
            return None


def make_signs(num_signs: int) -> list[str]:
    """What stands for so many contents, each another."""
    return [f"{SIGN_START}{index}{SIGN_END}" for index in range(num_signs)]


def split_layout(text: str, num_signs: int) -> tuple[str, ...] | None:
    """What stands before, between and after the signs of a text; None where one of them does not stand once, and in order."""
    layout = []
    for sign in make_signs(num_signs):
        printed, found, text = text.partition(sign)
        if not found or sign in text:
            return None
        layout.append(printed)
    return (*layout, text)


def _make_parts(content: str) -> list[Message]:
    return [{"type": "text", "text": content}]


def find_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The tokenizer's chat template, or TRL's variant of it that marks what the assistant says; None if it has none.

    Raises:
        ModelError: it has several, and none is the one to take.
    """
    given = tokenizer.chat_template
    if given is None:
        return None
    if isinstance(given, dict) and "default" not in given:
        raise ModelError(
            f"the tokenizer has the chat templates {', '.join(sorted(given))}, and none of them is called default",
            f"set model.chat_template to {', '.join(CHAT_TEMPLATES)} or a Jinja file with the one to train with",
        )
    try:
        variant = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none for this template
        variant = None
    tool_source = given.get("tool_use") if isinstance(given, dict) else None
    return Template(variant or tokenizer.get_chat_template(), tokenizer.special_tokens_map, tool_source)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, value: str | None) -> None:
    """Give the tokenizer a template of `CHAT_TEMPLATES`, or one from a Jinja file; None leaves its own.

    Raises:
        ModelError: there is no such template, it is not Jinja, or the tokenizer lacks its end token.
    """
    if value is None:
        return
    if value in CHAT_TEMPLATES:
        end_token = "<|im_end|>" if value == "chatml" else tokenizer.eos_token
        if end_token not in tokenizer.get_added_vocab():
            raise ModelError(
                f"model.chat_template {value} ends turns with {end_token or 'an end token'}; the tokenizer has none",
                "take another template",
            )
        tokenizer.chat_template = CHAT_TEMPLATES[value]
        return
    if not Path(value).is_file():
        known = ", ".join(CHAT_TEMPLATES)
        raise ModelError(f"model.chat_template {value}: no such file", f"give a Jinja file, or one of: {known}")
    source = Path(value).read_text(encoding="utf-8")
    try:
        render_jinja_template([], chat_template=source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{value}:{error.lineno}: not a Jinja template: {error.message}") from None
    tokenizer.chat_template = source


CHAT_TEMPLATES = {
    "chatml": r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    # As Tulu 2 was trained: the beginning token first, where the model has one.
    "tulu": r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}""",
}
