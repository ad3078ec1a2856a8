"""Special tokens that a row's own text brings: a second beginning or end, and borders of turns that somebody wrote out.

What the tokenizer or the template adds anyway is taken out of the text, so that there is one of each. Any other special token
in a text is counted, and where that is asked for refused, or made plain text.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from hftcli.data.chat import strip_end
from hftcli.data.formats import Row, is_conversation
from hftcli.data.templates import Template
from hftcli.errors import DataError

HIDDEN, SHOWN = 0x100000, 0xF0000  # where Unicode's private characters for special tokens begin: of a text, of a template
TEXT_KEYS = ("content", "reasoning_content", "tool_calls")  # of a message


@dataclass
class Findings:
    """What a row brought: `beginning`, `end`, `prompt` where one of them was there twice, and special tokens in its text."""

    doubled: set[str] = field(default_factory=set)
    special: set[str] = field(default_factory=set)


class SpecialTokens:
    """The special tokens of a tokenizer, and those that begin and end its texts.

    Attributes:
        pattern: matches any of them.
        beginning: what the tokenizer puts before plain text; nothing where it does not.
        opening: the beginning token where the template prints it before a conversation.
        ends: by role, the special token with which the template ends a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None):
        self.tokenizer = tokenizer
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        printed = _print_borders(template)
        names = [name for name, special in added.items() if special or _is_border(name, printed, added)]
        self.names = sorted(names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        self.end = tokenizer.eos_token or ""
        begins = tokenizer.bos_token and tokenizer.backend_tokenizer.encode("a").ids[:1] == [tokenizer.bos_token_id]
        self.beginning = tokenizer.bos_token if begins else ""
        # A token that opens every turn too, as MiniMind2's <|im_start|> does, is no beginning of the whole.
        once = printed and "".join(printed).count(tokenizer.bos_token or " ") == 1
        self.opening = tokenizer.bos_token if once and self._match_start(printed[0]) == tokenizer.bos_token else ""
        ends = zip(("system", "user", "assistant"), printed[1:], strict=False)
        self.ends = {role: end for role, text in ends if (end := self._match_start(text.lstrip()))}

    def _match_start(self, text: str) -> str:
        found = self.pattern.match(text)
        return found.group() if found else ""

    def tidy(self, row: Row) -> tuple[Row, Findings]:
        """A canonical row without what would stand in it twice, and what was found in it.

        Raises:
            DataError: nothing else is in one of its texts.
        """
        findings = Findings()
        if is_conversation(row):
            parts = {
                name: value for name, value in row.items() if name in ("messages", "prompt", "completion", "chosen", "rejected")
            }
            tidied = {name: self.tidy_turns(value, name in ("messages", "prompt"), findings) for name, value in parts.items()}
        else:
            tidied = self._tidy_plain(row, findings)
        for text in list_texts({**row, **tidied}):
            findings.special.update(self.pattern.findall(text))
        return {**row, **tidied}, findings

    def _tidy_plain(self, row: Row, findings: Findings) -> Row:
        row = _strip_prompt(row, findings)
        tidied = {}
        for name, text in row.items():
            stripped = self.tidy_opening(text, findings) if name in ("prompt", "text") else text
            if name != "prompt" and self.end and stripped.rstrip().endswith(self.end):
                stripped = strip_end(stripped, self.end)
                findings.doubled.add("end")
            if not stripped and name != "prompt":
                raise DataError(f"field '{name}' is nothing but special tokens: {text!r}")
            tidied[name] = stripped
        return tidied

    def tidy_opening(self, text: str, findings: Findings) -> str:
        """Plain text without the beginning that the tokenizer puts before it."""
        if not self.beginning or not text.startswith(self.beginning):
            return text
        findings.doubled.add("beginning")
        return text.removeprefix(self.beginning)

    def tidy_turns(self, messages: Any, opens: bool, findings: Findings) -> Any:
        """Messages without the ends that the template prints; where they open a conversation, without its beginning.

        Raises:
            DataError: nothing else is in one of them.
        """
        tidied = []
        for index, message in enumerate(messages):
            content = message["content"]
            end = self.ends.get(message["role"])
            if opens and not index and self.opening and content.startswith(self.opening):
                content = content.removeprefix(self.opening)
                findings.doubled.add("beginning")
            if end and content.rstrip().endswith(end):
                content = strip_end(content, end)
                findings.doubled.add("end")
            if message["content"] and not content.strip():
                raise DataError(f"turn {index + 1} is nothing but special tokens: {message['content']!r}")
            tidied.append({**message, "content": content} if content != message["content"] else message)
        return tidied


def _strip_prompt(row: Row, findings: Findings) -> Row:
    """A plain pair without the prompt with which both of its answers begin; a single word may well be said again."""
    if "chosen" not in row or len(row["prompt"].split()) < 2:
        return row
    answers = {name: row[name].removeprefix(row["prompt"]) for name in ("chosen", "rejected")}
    if any(not rest.strip() or rest == row[name] for name, rest in answers.items()):
        return row
    findings.doubled.add("prompt")
    return {**row, **answers}


class Escaping:
    """Tokenizing a text so that the special tokens which its row wrote are plain text, and those of the template are not.

    Before the template sees a row, each special token in its texts is hidden behind private characters, as many as it has. In
    the rendered text those that are left are the template's. They get private characters of their own, which a twin of the
    tokenizer knows as its special tokens, and the hidden ones come back as text. All characters keep their places.
    """

    def __init__(self, special: SpecialTokens):
        self.special = special
        self.hidden = {name: chr(HIDDEN + index) * len(name) for index, name in enumerate(special.names)}
        self.shown = {name: chr(SHOWN + index) * len(name) for index, name in enumerate(special.names)}
        self.hiding = re.compile("|".join(self.hidden.values()) or "(?!)")
        self.originals = {sign: name for name, sign in self.hidden.items()}

    def hide(self, row: Row) -> Row:
        """A row with the special tokens of its texts hidden."""
        return _change_texts(row, lambda text: self.special.pattern.sub(lambda found: self.hidden[found.group()], text))

    def is_hidden_in(self, text: str) -> bool:
        """Whether a rendered text has one of them."""
        return self.hiding.search(text) is not None

    def encode(self, text: str, add_special_tokens: bool) -> "Encoded":
        """The tokens of a text in which special tokens are hidden.

        Raises:
            DataError: the tokenizer makes a special token of plain text.
        """
        places = [found.span() for found in self.hiding.finditer(text)]
        text = self.special.pattern.sub(lambda found: self.shown[found.group()], text)
        text = self.hiding.sub(lambda found: self.originals[found.group()], text)
        twin, originals = self._twin
        encoding = twin.encode(text, add_special_tokens=add_special_tokens)
        ids = [originals.get(token, token) for token in encoding.ids]
        for token, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token in self._ids and any(first <= start and end <= last for first, last in places if start < end):
                raise DataError(
                    f"the special token {text[start:end]!r} in its text cannot be made plain text: the tokenizer has no other "
                    "tokens for it",
                    "take it out of the row",
                )
        return Encoded(ids, encoding.offsets, encoding.special_tokens_mask)

    @cached_property
    def _ids(self) -> set[int]:
        return set(self.special.tokenizer.convert_tokens_to_ids(self.special.names))

    @cached_property
    def _twin(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer with the shown signs as its special tokens, and what each of its ids is in the original."""
        original = self.special.tokenizer.backend_tokenizer
        made = json.loads(original.to_str())
        for added in made["added_tokens"]:
            added["content"] = self.shown.get(added["content"], added["content"])
        twin = tokenizers.Tokenizer.from_str(json.dumps(made))
        ids = original.get_vocab()
        names = {sign: ids[name] for name, sign in self.shown.items()}
        return twin, {token: names[content] for content, token in twin.get_vocab().items() if content in names}


@dataclass(frozen=True)
class Encoded:
    """What is read of a `tokenizers.Encoding`."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special_tokens_mask: list[int]


def _change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A row's part with all text changed but the roles of its turns, and the names that stand beside them."""
    if isinstance(value, dict) and "role" in value:
        return {key: _change_all(item, change) if key in TEXT_KEYS else item for key, item in value.items()}
    if isinstance(value, dict):
        return {key: (_change_all if key == "tools" else _change_texts)(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_change_texts(item, change) for item in value]
    return _change_all(value, change)


def _change_all(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it changed, of tools and their calls the names too: a template prints them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _change_all(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_change_all(item, change) for item in value]
    return value


def _print_borders(template: Template | None) -> tuple[str, ...]:
    """What a template prints before a conversation, and after its system's, user's and assistant's turns."""
    if template is None:
        return ()
    for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
        if layout := template.find_layout(roles):
            after = layout[1:-1]
            return (layout[0], *(("", *after) if len(roles) == 3 else after))
    return ()


def _is_border(name: str, printed: Sequence[str], added: dict[str, bool]) -> bool:
    """Whether a token that is not declared special is one all the same.

    The template prints it, and it is no tag, as <think> is with its </think>, that people write on purpose.
    """
    partners = (name.replace("<", "</", 1), name.replace("</", "<", 1))
    return any(name in text for text in printed) and not any(other != name and other in added for other in partners)


def list_texts(value: Any) -> list[str]:
    """The texts that `Escaping.hide` changes."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _change_texts(value, note)
    return found
