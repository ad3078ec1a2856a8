"""Every content of a row is in the text that trains, under every template that TRL ships, or the row is refused.

What to expect is read off transformers' own rendering.
"""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from data.written_rows import read_trained, write_jsonl
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, supports_tool_calling

from hftcli.data.prepare import prepare_dataset
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError
from hftcli.recipe.sections import TrainSection

TEMPLATES = sorted(
    file.stem for file in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if not file.stem.endswith("_training")
)


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


DAY = datetime(2024, 7, 26)  # that every template prints as today
QUESTION, ANSWER = say("user", "How much is 6 x 7?"), say("assistant", "Forty-two, says Ada.")
SECOND, LAST = say("user", "u"), say("assistant", "s")  # letters that every header has too
THOUGHT = say("assistant", "<think>\nSix sevens, then.\n</think>\nIt is 42.")
REASONED = say("assistant", "It is 42.", reasoning_content="Six sevens, then.")
CALL = say("assistant", "", tool_calls=[{"type": "function", "function": {"name": "look_up", "arguments": {"word": "heron"}}}])
RESULT = say("tool", 'A "bird".\nIt wades.', name="look_up")
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "finds a meaning",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "to be found"}}},
    },
}
CONVERSATIONS = {
    "two turns": [QUESTION, ANSWER, SECOND, LAST],
    "system": [say("system", "Be curt."), QUESTION, ANSWER],
    "assistant first": [ANSWER, say("user", "Why so?"), LAST],
    "thought": [QUESTION, THOUGHT],
    "earlier thought": [QUESTION, THOUGHT, SECOND, LAST],
    "reasoning": [QUESTION, REASONED],
    "earlier reasoning": [QUESTION, REASONED, SECOND, LAST],
    "developer": [say("developer", "Be curt."), QUESTION, ANSWER],
    "white space": [say("user", "  How \n"), say("assistant", "\n So. \n\n")],
}


@pytest.fixture
def speaker(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One token per byte, and a token of each kind that a template may print."""
    tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    return tokenizer


def read(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: Any) -> str | None:
    """What transformers makes of a conversation, by the template that TRL would train with; None where that is nothing."""
    try:
        variant = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        variant = tokenizer.chat_template
    variant = re.sub(r"strftime_now\(['\"](.*?)['\"]\)", lambda found: repr(DAY.strftime(found[1])), variant)
    for shape in (lambda content: content, lambda content: [{"type": "text", "text": content}]):
        shaped = [{**message, "content": shape(message["content"])} for message in messages]
        try:
            text = tokenizer.apply_chat_template(shaped, tokenize=False, chat_template=variant, **options)
        except (jinja2.TemplateError, TypeError):
            continue
        if all(message["content"].strip() in text for message in messages if message["role"] == "user"):
            return text
    return None


def prepare(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, folder: Path, **columns: Any
) -> tuple[list[int], list[int]]:
    data = write_jsonl(folder / "rows.jsonl", [{"messages": messages, **columns}]).model_copy(update={"max_length": 1 << 15})
    [row] = prepare_dataset(data, TrainSection(), tokenizer, folder / "cache")[0]
    return row["input_ids"], row["labels"]


def list_said(messages: list[dict], role: str) -> list[str]:
    turns = [message for message in messages if message["role"] == role]
    said = [turn[key] for turn in turns for key in ("reasoning_content", "content") if key in turn]
    return [piece.strip() for text in said for piece in re.split("</?think>", text) if piece.strip()]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_all_that_is_said_is_trained_or_refused(name: str, kind: str, speaker: PreTrainedTokenizerBase, tmp_path: Path):
    speaker.chat_template, messages = read(name), CONVERSATIONS[kind]
    text = render(speaker, messages)
    said = list_said(messages, "assistant")
    others = [piece for role in ("system", "developer", "user") for piece in list_said(messages, role)]
    is_whole = text is not None and all(text.count(piece) for piece in said + others)
    if kind == "developer":
        is_whole &= "developer" in speaker.chat_template
    if not is_whole:
        with pytest.raises(DataError, match=r"row 1: (turn \d|the chat template|nothing of it|all of it)"):
            prepare(messages, speaker, tmp_path)
        return
    ids, labels = prepare(messages, speaker, tmp_path)
    assert speaker.decode(ids) == text
    trained = read_trained(ids, labels, speaker)
    position = 0
    for piece in said:
        position = trained.index(piece, position) + len(piece)
    assert not [piece for piece in others if len(piece) > 1 and piece in trained]
    assert trained == trained.rstrip()
    before = [IGNORED, *labels]
    starts = [place for place, label in enumerate(labels) if label != IGNORED and before[place] == IGNORED]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for start, turn in zip(starts, turns, strict=True):
        assert speaker.decode(ids[:start]).startswith(find_given(text, messages[:turn], speaker))


def find_given(text: str, before: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a generation prompt and a text have in common, in whole tokens: the model is given it, and must not be taught it."""
    asked = before and render(tokenizer, before, add_generation_prompt=True)
    if not asked:
        return ""
    common = next((place for place, pair in enumerate(zip(text, asked, strict=False)) if pair[0] != pair[1]), len(asked))
    return re.match(r"(.*[>\]\s])?", asked[:common], re.DOTALL).group()


def test_a_thought_that_is_not_printed_is_missed_though_its_words_stand_in_the_answer(
    speaker: PreTrainedTokenizerBase, tmp_path: Path
):
    speaker.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    kept = say("assistant", "It is 42.")
    prepare([QUESTION, kept], speaker, tmp_path)
    with pytest.raises(DataError, match="turn 2, the assistant's: 'It is 42.' is not in the text"):
        prepare([QUESTION, say("assistant", "<think>42</think>It is 42.")], speaker, tmp_path)


def test_a_template_prints_the_same_date_on_every_day(speaker: PreTrainedTokenizerBase, tmp_path: Path):
    """As Llama 3.2's and gpt-oss's ask for it: otherwise another day would train other rows."""
    speaker.chat_template = (
        "Today: {{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}, {{ strftime_now('%A, %B %-d') }}"
        + CHAT_TEMPLATES["chatml"]
    )
    ids, _ = prepare([QUESTION, say("assistant", "It is 42.")], speaker, tmp_path)
    assert speaker.decode(ids).startswith("Today: 26 Jul 2024, 2024-07-26, Friday, July 26<|im_start|>user\n")


@pytest.mark.parametrize("with_list", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_and_their_results_are_rendered_or_refused(
    name: str, with_list: bool, speaker: PreTrainedTokenizerBase, tmp_path: Path
):
    speaker.chat_template, messages = read(name), [QUESTION, CALL, RESULT, ANSWER]
    columns = {"tools": [TOOL]} if with_list else {}
    text = render(speaker, messages, **columns)
    serves = supports_tool_calling(speaker) and text is not None
    if serves and with_list:
        serves = all(leaf in text for leaf in (TOOL["function"]["description"], "look_up", "word"))
    if not serves:
        with pytest.raises(DataError, match=r"row 1: (turn \d|the chat template|the tool look_up is not in the text)"):
            prepare(messages, speaker, tmp_path, **columns)
        return
    ids, labels = prepare(messages, speaker, tmp_path, **columns)
    assert speaker.decode(ids) == text
    trained = read_trained(ids, labels, speaker)
    assert trained.index("look_up") < trained.index("heron") < trained.index(ANSWER["content"])
    assert not [piece for piece in (QUESTION["content"], "It wades.", TOOL["function"]["description"]) if piece in trained]
