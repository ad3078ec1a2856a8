"""Conversations as their template renders them, the assistant's turns found in them, and templates that do not serve."""

import json
from pathlib import Path

import pytest
from data.written_rows import CONVERSATION, ROW, TURNS, lay_out_chatml, read_template, read_trained, tokenize
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hftcli.data.chat import lay_out
from hftcli.data.templates import CHAT_TEMPLATES, Template, find_template, set_chat_template
from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError, ModelError


def lay_out_llama3() -> list[tuple[str, bool]]:
    head, middle = "<|start_header_id|>", "<|end_header_id|>\n\n"
    pieces = [(f"<|begin_of_text|>{head}system{middle}Be brief.<|eot_id|>", False)]
    for question, answer in TURNS:
        pieces.append((f"{head}user{middle}{question.strip()}<|eot_id|>{head}assistant{middle}", False))
        pieces.append((f"{answer.strip()}<|eot_id|>", True))
    return pieces


def lay_out_tulu() -> list[tuple[str, bool]]:
    pieces = [("<|begin_of_text|><|system|>\nBe brief.\n", False)]
    for question, answer in TURNS:
        pieces.append((f"<|user|>\n{question}\n<|assistant|>\n", False))
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return pieces


LAYOUTS = {
    "MiniMind2's own": (None, lay_out_chatml()),
    "Llama 3": (read_template("llama3"), lay_out_llama3()),
    "Qwen 2.5": (read_template("qwen2_5"), lay_out_chatml()),
    "Qwen 3": (read_template("qwen3"), lay_out_chatml("<think>\n\n</think>\n\n")),
    "chatml": (CHAT_TEMPLATES["chatml"], lay_out_chatml()),
    "tulu": (CHAT_TEMPLATES["tulu"], lay_out_tulu()),
}


def spell_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of each token of a byte-level tokenizer, read off its vocabulary."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added = tokenizer.get_added_vocab()
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [token.encode() if token in added else bytes(byte_of[letter] for letter in token) for token in tokens]


@pytest.mark.parametrize("name", LAYOUTS)
def test_trained_tokens_are_the_assistants_turns_and_their_ends(name: str, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    template, pieces = LAYOUTS[name]
    added = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    minimind.add_special_tokens({"additional_special_tokens": added})
    if template is not None:
        minimind.bos_token = "<|begin_of_text|>"
        minimind.chat_template = template

    [(ids, labels)] = tokenize([{"messages": CONVERSATION}], minimind, tmp_path)

    spelled = spell_tokens(ids, minimind)
    assert b"".join(spelled) == "".join(text for text, _ in pieces).encode()
    is_trained_byte = [trained for text, trained in pieces for _ in text.encode()]
    position = 0
    for token, label, spelling in zip(ids, labels, spelled, strict=True):
        trained = any(is_trained_byte[position : position + len(spelling)])
        assert label == (token if trained else IGNORED), (spelling, position)
        position += len(spelling)
    assert read_trained(ids, labels, minimind) == "".join(text for text, trained in pieces if trained)


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"])
def test_markers_and_prefixes_find_the_same(name: str):
    plain, marked = (Template(read_template(name + end), {"bos_token": "<s>"}) for end in ("", "_training"))
    assert "endgeneration" in marked.source
    assert "endgeneration" not in plain.source
    assert lay_out(CONVERSATION, plain) == lay_out(CONVERSATION, marked)


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("qwen3_5_nothink", "{}<|im_end|>"),  # the markers hold an empty thought, which the generation prompt gives
        ("muse_glimmer", " to=user<|message|>{}<|eot|>"),  # the markers hold the header
    ],
)
def test_generation_prompt_inside_the_markers_is_not_trained(name: str, turn: str):
    found = lay_out(CONVERSATION, Template(read_template(f"{name}_training"), {}))
    answers = [answer.strip() if "qwen" in name else answer for _, answer in TURNS]
    assert [found.text[start:end] for start, end in found.spans] == [turn.format(answer) for answer in answers]


def test_markers_agree_with_transformers_on_real_conversations(minimind: PreTrainedTokenizerBase, shared: Path, tmp_path: Path):
    minimind.chat_template = CHAT_TEMPLATES["chatml"]
    lines = (shared / "data/sft/oasst1_zh.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    rows = [json.loads(line) for line in lines]
    for row, (ids, labels) in zip(rows, tokenize(rows, minimind, tmp_path), strict=True):
        theirs = minimind.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        expected = [
            token if mask else IGNORED for token, mask in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        ]
        assert (ids, labels) == (theirs["input_ids"][:1024], expected[:1024])


def test_template_of_an_unknown_model_is_kept(minimind: PreTrainedTokenizerBase):
    assert find_template(minimind).source == minimind.chat_template
    minimind.chat_template = read_template("qwen3")
    assert find_template(minimind).source == read_template("qwen3_training")


def test_conversation_needs_a_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template") as caught:
        tokenize([ROW], tokenizer, tmp_path)
    assert caught.value.fix == "set model.chat_template to chatml, tulu or a Jinja file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
         "turn 2, the assistant's: '4.\\n\\n  Always  4' stands outside of what is trained"),
        ("{% generation %}{% for m in messages %}{{ m.content + '\n' }}{% endfor %}{% endgeneration %}",
         "all of it is trained"),
        ("{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}",
         "the chat template renders the beginning of a conversation differently when more turns follow"),
        ("{{ raise_exception('no Greek, please') }}",
         "the chat template does not render the conversation: no Greek, please"),
    ],
)  # fmt: skip
def test_template_that_does_not_serve(template: str, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    serving = CHAT_TEMPLATES["chatml"]
    if "{% generation %}" not in template:  # then the assistant's turns are found the other way
        serving = serving.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    tokenizer.chat_template = "{% if messages[0].content == 'Hi' %}" + serving + "{% else %}" + template + "{% endif %}"
    with pytest.raises(DataError) as caught:
        tokenize([ROW, {"messages": CONVERSATION[1:]}], tokenizer, tmp_path)
    assert f"rows.jsonl: row 2: {message}" in caught.value.message


def test_set_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    own = tokenizer.chat_template
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == own
    set_chat_template(tokenizer, "tulu")
    assert tokenizer.chat_template == CHAT_TEMPLATES["tulu"]
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    with pytest.raises(ModelError, match=r"model\.chat_template tulip: no such file"):
        set_chat_template(tokenizer, "tulip")
    file.write_text("\n{% for %}")
    with pytest.raises(ModelError, match=r"mine\.jinja:2: not a Jinja template"):
        set_chat_template(tokenizer, str(file))
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    for name in CHAT_TEMPLATES:
        with pytest.raises(ModelError, match="the tokenizer has none"):
            set_chat_template(bare, name)
