"""A row as text, and which of its characters are trained.

What is trained is settled on the characters, where it can be read and checked, and not on the tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hftcli.data.rows import Messages, Row, is_conversation
from hftcli.errors import DataError, ModelError
from hftcli.recipe.sections import TrainSection

Span = tuple[int, int]  # characters [start, end)


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
class Template:
    """A chat template with the special tokens it may print."""

    source: str
    special_tokens: dict[str, str]

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text, and the characters between generation markers."""
        return self._render(messages, return_assistant_tokens_mask=True)

    def _render(self, messages: Messages, **options: bool) -> tuple[str, list[Span]]:
        try:
            texts, marked = render_jinja_template([messages], chat_template=self.source, **options, **self.special_tokens)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template does not render the conversation: {error}") from None
        return texts[0], marked[0] if marked else []


def find_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The tokenizer's chat template, or TRL's variant of it that marks what the assistant says; None if it has none."""
    if tokenizer.chat_template is None:
        return None
    try:
        variant = get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none for this template
        variant = None
    return Template(variant or tokenizer.get_chat_template(), tokenizer.special_tokens_map)


def render_row(row: Row, tokenizer: PreTrainedTokenizerBase, template: Template | None, train: TrainSection) -> Rendering:
    """Render a canonical row.

    Raises:
        DataError: the template does not render it, or not so that the assistant's part can be told.
        ModelError: the tokenizer has no chat template for a conversation, or no end token for plain text.
    """
    if not is_conversation(row):
        if tokenizer.eos_token is None:
            raise ModelError("the tokenizer has no end token, so a model could not learn to stop", "give its eos_token")
        return render_plain(row["prompt"], row["completion"], tokenizer.eos_token, train)
    if template is None:
        raise ModelError(
            "the rows are conversations, but the tokenizer has no chat template",
            f"set model.chat_template to {', '.join(CHAT_TEMPLATES)} or a Jinja file",
        )
    if "messages" in row:
        return render_conversation([], row["messages"], template, train)
    return render_conversation(row["prompt"], row["completion"], template, train)


def render_plain(prompt: str, completion: str, eos_token: str, train: TrainSection) -> Rendering:
    text = prompt + completion.removesuffix(eos_token) + eos_token
    start = len(prompt) if train.completion_only_loss else 0
    return Rendering(text, [(start, len(text))], is_plain=True)


def render_conversation(prompt: Messages, completion: Messages, template: Template, train: TrainSection) -> Rendering:
    """Render messages; those of the prompt, where there is one, are not trained under `completion_only_loss`."""
    messages = prompt + completion
    if train.assistant_only_loss:
        text, spans = find_assistant_spans(messages, template)
    else:
        text = template.render(messages)
        spans = [(0, len(text))]
    if prompt and train.completion_only_loss:
        border = _measure_prefix(text, template.render(prompt, add_generation_prompt=True))
        spans = [(max(start, border), end) for start, end in spans if end > border]
    return Rendering(text, spans, is_plain=False)


def find_assistant_spans(messages: Messages, template: Template) -> tuple[str, list[Span]]:
    """The text, and in it the contents of the assistant's turns with their end tokens.

    Neither what the generation prompt gives the model, nor white space after the end token, is part of a span.
    """
    if has_generation_markers(template.source):
        return _find_marked_spans(messages, template)
    return _find_turns(messages, template)


def _find_marked_spans(messages: Messages, template: Template) -> tuple[str, list[Span]]:
    text, marked = template.render_marked(messages)
    header = _render_header(messages, template)
    spans = []
    for start, end in _join_adjacent(marked):
        # Some templates put their markers around the header as well, or around a part of it.
        found = text.rfind(header, max(start - len(header), 0), start + len(header))
        start = start if found < 0 else found + len(header)
        if spoken := text[start:end].rstrip():
            spans.append((start, start + len(spoken)))
    return text, spans


def _render_header(messages: Messages, template: Template) -> str:
    """What the generation prompt adds before the assistant's first turn."""
    roles = [message["role"] for message in messages]
    before = messages[: roles.index("assistant")]
    if not before:
        return ""
    asked = template.render(before, add_generation_prompt=True)
    return asked.removeprefix(template.render(before))


def _join_adjacent(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start, _ = joined.pop()
        joined.append((start, end))
    return joined


def _find_turns(messages: Messages, template: Template) -> tuple[str, list[Span]]:
    """Without markers: a turn lies between the generation prompt before it and the end of the conversation up to it."""
    text = template.render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _measure_prefix(text, template.render(messages[:index], add_generation_prompt=True))
            end = _measure_prefix(text, template.render(messages[: index + 1]).rstrip())
            spans.append((start, end))
    return text, spans


def _measure_prefix(text: str, prefix: str) -> int:
    if not text.startswith(prefix):
        raise DataError(
            "the chat template renders the beginning of a conversation differently when more turns follow, so what the "
            "assistant says cannot be told apart",
            "set model.chat_template to a Jinja file with {% generation %} and {% endgeneration %} around that part",
        )
    return len(prefix)


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
