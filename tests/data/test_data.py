"""Rows to tokens: what is trained, counted token by token; formats; faults; packing; the cache."""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import pytest
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hftcli import PACKAGE
from hftcli.data.chat import CHAT_TEMPLATES, Template, find_assistant_spans, find_template, set_chat_template
from hftcli.data.prepare import check_positions, decode_samples, default_cache, prepare_dataset, prepare_task
from hftcli.data.rows import FORMATS, convert_row, detect_format, find_sources, load_rows
from hftcli.data.tokens import IGNORED, get_backend, tokenize_examples, tokenize_prompts
from hftcli.errors import DataError, ModelError
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.tasks.examples import Cut, Example, Task

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    ("What is 2 + 2?", "4.\n\n  Always  4"),
    ("用中文说你好", "你好！"),
    ("\nAnd in Greek? ", "Γειά σου 🙂 "),
]
CONVERSATION = [SYSTEM] + [
    message
    for question, answer in TURNS
    for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
]
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, and ChatML's two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = CHAT_TEMPLATES["chatml"]
    return made


@pytest.fixture
def minimind(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "MiniMind2-Small")


def write_jsonl(path: Path, rows: list[Any]) -> DataSection:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return DataSection(path=str(path))


def tokenize(
    rows: list[Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, **options: bool
) -> list[tuple[list[int], list[int]]]:
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset, _ = prepare_dataset(data, TrainSection(**options), tokenizer, tmp_path / "cache")
    return [(row["input_ids"], row["labels"]) for row in dataset]


def read_trained(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)


# ---- What is trained -----------------------------------------------------------------------------


def read_template(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def lay_out_chatml(opening: str = "") -> list[tuple[str, bool]]:
    pieces = [("<|im_start|>system\nBe brief.<|im_end|>\n", False)]
    for question, answer in TURNS:
        pieces.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces += [(f"{opening}{answer}<|im_end|>", True), ("\n", False)]
    return pieces


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
    assert find_assistant_spans(CONVERSATION, plain) == find_assistant_spans(CONVERSATION, marked)


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("qwen3_5_nothink", "{}<|im_end|>"),  # the markers hold an empty thought, which the generation prompt gives
        ("muse_glimmer", " to=user<|message|>{}<|eot|>"),  # the markers hold the header
    ],
)
def test_generation_prompt_inside_the_markers_is_not_trained(name: str, turn: str):
    text, spans = find_assistant_spans(CONVERSATION, Template(read_template(f"{name}_training"), {}))
    answers = [answer.strip() if "qwen" in name else answer for _, answer in TURNS]
    assert [text[start:end] for start, end in spans] == [turn.format(answer) for answer in answers]


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


def test_all_text_is_trained_without_assistant_only_loss(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    [(ids, labels)] = tokenize([ROW], tokenizer, tmp_path, assistant_only_loss=False)
    assert ids == labels
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, "fine<|im_end|>good<|im_end|>"),
        ({"completion_only_loss": False}, "Hello<|im_end|>fine<|im_end|>good<|im_end|>"),
        ({"assistant_only_loss": False}, "fine<|im_end|>\n<|im_start|>user\nOh<|im_end|>\n<|im_start|>assistant\n"
                                         "good<|im_end|>\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_markers", [True, False])
def test_messages_of_a_prompt_are_not_trained(
    options: dict, trained: str, with_markers: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    if not with_markers:
        source = CHAT_TEMPLATES["chatml"]
        tokenizer.chat_template = source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    prompt = [*ROW["messages"], {"role": "user", "content": "How are you?"}]
    completion = [
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "Oh"},
        {"role": "assistant", "content": "good"},
    ]
    [(ids, labels)] = tokenize([{"prompt": prompt, "completion": completion}], tokenizer, tmp_path, **options)
    assert read_trained(ids, labels, tokenizer) == trained


@pytest.mark.parametrize(
    ("model", "prompt", "completion", "untrained", "trained"),
    [
        # A SentencePiece vocabulary: the space before a word is in its token.
        ("stories15M", "Q:", " you", ["<s>", "▁Q", ":"], ["▁you", "</s>"]),
        ("stories15M", "Q: ", "you", ["<s>", "▁Q", ":"], ["▁you", "</s>"]),
        ("stories15M", "Q: 你", "好", ["<s>", "▁Q", ":", "▁", "你"], ["好", "</s>"]),
        ("stories15M", "Q:", "你</s>", ["<s>", "▁Q", ":"], ["你", "</s>"]),
        # The same without these characters: three byte tokens each.
        ("stories260K", "Q:你", "好", ["<s>", "▁", "Q", ":", "<0xE4>", "<0xBD>", "<0xA0>"],
         ["<0xE5>", "<0xA5>", "<0xBD>", "</s>"]),
        # Byte-level: both characters in one token, which straddles the border.
        ("MiniMind2-Small", "Q: 你", "好", ["Q", ":", "Ġ"], ["ä½łå¥½", "<|im_end|>"]),
        ("MiniMind2-Small", "Q: ", "a", ["Q", ":"], ["Ġa", "<|im_end|>"]),
        ("MiniMind2-Small", "Q:", " a\n", ["Q", ":"], ["Ġa", "Ċ", "<|im_end|>"]),
    ],
)  # fmt: skip
def test_border_between_prompt_and_completion(
    model: str, prompt: str, completion: str, untrained: list, trained: list, shared: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    [(ids, labels)] = tokenize([{"prompt": prompt, "completion": completion}], tokenizer, tmp_path)
    assert tokenizer.convert_ids_to_tokens(ids) == untrained + trained
    assert labels == [IGNORED] * len(untrained) + ids[len(untrained) :]


def test_characters_of_several_tokens_stay_whole_at_the_border(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    [(ids, labels)] = tokenize([{"prompt": "é", "completion": "你"}], tokenizer, tmp_path)
    assert len(ids) == 2 + 3 + 1
    assert labels == [IGNORED, IGNORED, *ids[2:]]


def test_whole_plain_text_is_trained_without_completion_only_loss(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    [(ids, labels)] = tokenize([{"prompt": "a", "completion": "b"}], tokenizer, tmp_path, completion_only_loss=False)
    assert labels == ids


def test_end_token_of_the_tokenizer_is_not_doubled(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    [once] = tokenize([{"prompt": "a", "completion": "b"}], tokenizer, tmp_path)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    assert tokenizer("a")["input_ids"][-1] == end
    assert tokenize([{"prompt": "a", "completion": "b"}], tokenizer, tmp_path) == [once]
    assert once[0].count(end) == 1
    assert once[1][-1] == end


def test_answer_is_laid_out_as_in_training(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [
        ROW,
        {"messages": [*ROW["messages"], {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    [first, second] = tokenize(rows, tokenizer, tmp_path)
    examples = (Example(ROW["messages"][:1], "Hello"), Example(rows[1]["messages"][:3], "b"))
    assert tokenize_whole(examples[:1], tokenizer) == [first]
    [_, (ids, labels)] = tokenize_whole(examples, tokenizer)
    assert ids == second[0]
    assert read_trained(ids, labels, tokenizer) == "b<|im_end|>"
    prompts = tokenize_prompts(examples, "middle", 8, tokenizer)  # conversations are not cut
    assert prompts == [first[0][: -len("Hello") - 2], ids[: -len("b") - 2]]  # an end token and a line feed follow
    plain = tokenize([{"prompt": "a:", "answer": " b"}], tokenizer, tmp_path)
    assert tokenize_whole([Example("a:", " b")], tokenizer) == plain


def tokenize_whole(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    return [(ids, labels.tolist()) for ids, labels in tokenize_examples(examples, "middle", 10_000, tokenizer)[0]]


# ---- Tasks ---------------------------------------------------------------------------------------

INSTRUCTION, CUE = "Sum it up.\nText:\n", "\nSummary:"


def make_long(body: str, answer: str = "A") -> Example:
    return Example(INSTRUCTION + body + CUE, answer, (len(INSTRUCTION), len(INSTRUCTION + body)))


BODIES = {
    "words": "".join(f"word{number} " for number in range(900)),
    "unbroken": "abcdefghij" * 400,
    "signs": "你好世界，🙂🙂 Ünïcödé\n" * 200,
}


@pytest.mark.parametrize("cut", get_args(Cut))
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", ["stories260K", "stories15M", "MiniMind2-Small"])
def test_a_cut_keeps_instruction_cue_answer_and_end(name: str, body: str, cut: Cut, shared: Path):
    """Byte-level and SentencePiece vocabularies, characters of several tokens, words that the cut breaks."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    text, max_length = BODIES[body], 100
    [(ids, labels)], [length] = tokenize_examples([make_long(text)], cut, max_length, tokenizer)
    assert length > max_length
    assert max_length - 4 <= len(ids) <= max_length  # no more than a character of several tokens too short
    kept = tokenizer.decode([token for token in ids if token != tokenizer.bos_token_id])
    assert kept.startswith(INSTRUCTION)
    assert kept.endswith(CUE + "A" + tokenizer.eos_token)
    assert read_trained(ids, labels.tolist(), tokenizer) == "A" + tokenizer.eos_token
    left = kept[len(INSTRUCTION) : -len(CUE + "A" + tokenizer.eos_token)]
    half = len(left) // 3
    assert {
        "start": text.endswith(left),
        "middle": text.startswith(left[:half]) and text.endswith(left[-half:]),
        "end": text.startswith(left),
    }[cut]
    [ids] = tokenize_prompts([make_long(text)], cut, max_length, tokenizer)
    assert max_length - 4 <= len(ids) <= max_length
    asked = tokenizer.decode([token for token in ids if token != tokenizer.bos_token_id])
    assert asked.startswith(INSTRUCTION)
    assert asked.endswith(CUE)


def test_a_middle_is_cut_from_the_middle(tokenizer: PreTrainedTokenizerBase):
    """Counted by hand, one token a byte: 2 + 10 + 2 with an answer of 1 and an end."""
    example = Example("[:0123456789:]", "A", (2, 12))
    room = {10: "[:0189:]", 9: "[:089:]", 7: "[:9:]", 6: "[::]", 5: "[::]", 16: "[:0123456789:]"}
    for max_length, prompt in room.items():
        [(ids, _)], [length] = tokenize_examples([example], "middle", max_length, tokenizer)
        assert (tokenizer.decode(ids), length) == (prompt + "A<|im_end|>", 16)
    for cut, prompt in {"start": "[:6789:]", "end": "[:0123:]"}.items():
        [(ids, _)], _ = tokenize_examples([example], cut, 10, tokenizer)
        assert tokenizer.decode(ids) == prompt + "A<|im_end|>"
    [anywhere], _ = tokenize_examples([Example("0123456789", "A")], "middle", 6, tokenizer)
    assert tokenizer.decode(anywhere[0]) == "0189A<|im_end|>"


def test_rows_of_a_task_are_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    whole, long, never = Example("[:]", "A", (2, 2)), make_long("x" * 100), Example("[:]", "A" * 60, (2, 2))
    data = DataSection(max_length=40)
    tokens, report = prepare_task(Task("a/b", (whole, long, never)), data, tokenizer, tmp_path)
    assert tokens["input_ids"] == [ids for ids, _ in tokenize_whole([whole], tokenizer)] + [tokens[1]["input_ids"]]
    assert len(tokens[1]["input_ids"]) == 40
    counts = report.model_dump(exclude={"sources", "key", "length_percentiles"})
    assert counts == {
        "format": "task", "num_rows": 3, "num_used": 2, "num_dropped": 1, "num_truncated": 1, "num_identical": 0,
        "num_sequences": 2, "num_tokens": 5 + 40, "num_trained_tokens": 2 + 2,
    }  # fmt: skip
    assert report.length_percentiles["max"] == len(INSTRUCTION + CUE) + 100 + 2
    assert report.sources[0].path == "a/b"
    with pytest.raises(DataError, match=r"task a/b: none of the 1 questions fits in 40 tokens .* the shortest, row 1, has 64"):
        prepare_task(Task("a/b", (never,)), data, tokenizer, tmp_path)


def test_the_cache_knows_a_task_by_all_that_shapes_its_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    example = make_long("x" * 100)
    other = dataclasses.replace(example, body=(0, 1))

    def key(*examples: Example, cut: Cut = "middle", **values: Any) -> str:
        return prepare_task(Task("a/b", examples, cut=cut), DataSection(max_length=60, **values), tokenizer, tmp_path)[1].key

    first = key(example)
    assert key(example, root="elsewhere") == first
    keys = [key(example, example), key(example, cut="start"), key(dataclasses.replace(example, answer="B"))]
    keys.append(prepare_task(Task("a/b", (other,)), DataSection(max_length=200), tokenizer, tmp_path)[1].key)
    keys.append(prepare_task(Task("a/b", (example,)), DataSection(max_length=200), tokenizer, tmp_path)[1].key)
    assert len({first, *keys}) == 6


def test_turn_without_end_token_is_said(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with caplog.at_level(logging.WARNING, logger="hftcli.data.tokens"):
        rows = tokenize([ROW, ROW], tokenizer, tmp_path)
    assert [read_trained(*row, tokenizer) for row in rows] == ["Hello", "Hello"]
    assert len(caplog.records) == 1
    assert "will not learn to stop" in caplog.text


# ---- Formats -------------------------------------------------------------------------------------

EXAMPLES = {
    "messages": (
        {"messages": [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b"}]},
        "ab",
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"}, "ab"),
    "prompt-completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
    "alpaca": ({"instruction": "a", "input": "i", "output": "b"}, "a\n\nib"),
    "prompt-answer": ({"prompt": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}),
    "question-answer": ({"question": "a", "answer": "b"}, "ab"),
}


@pytest.mark.parametrize("name", [name for name, known in FORMATS.items() if known.objective == "sft"])
def test_format(name: str, tmp_path: Path):
    row, expected = EXAMPLES[name]
    if isinstance(expected, str):
        question, answer = {"role": "user", "content": expected[:-1]}, {"role": "assistant", "content": expected[-1]}
        expected = {"messages": [question, answer]}
    assert detect_format(list(row)) == name
    assert convert_row(row, name) == expected
    rows, found = load_rows(write_jsonl(tmp_path / "rows.jsonl", [row, row]))
    assert (rows.to_list(), found) == ([expected, expected], name)


def test_alpaca_without_input():
    for row in ({"instruction": "a", "output": "b"}, {"instruction": "a", "input": "", "output": "b"}):
        assert convert_row(row, "alpaca")["messages"][0]["content"] == "a"


def test_system_turn_may_be_empty():
    messages = [{"role": "system", "content": ""}, *ROW["messages"]]
    assert convert_row({"messages": messages}, "messages") == {"messages": messages}


def test_all_file_types_give_the_same_rows(tmp_path: Path):
    rows = [{"question": f"q{index}", "answer": "a", "extra": index if index else "text"} for index in range(5)]
    lines = write_jsonl(tmp_path / "lines.jsonl", rows)
    expected = load_rows(lines)[0].to_list()
    (tmp_path / "lines.json").write_text("\n" + Path(lines.path).read_text())
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    Dataset.from_list([{**row, "extra": 0} for row in rows]).to_parquet(tmp_path / "rows.parquet")
    for name in ("lines.json", "array.json", "rows.parquet"):
        assert load_rows(DataSection(path=str(tmp_path / name)))[0].to_list() == expected
    assert len(load_rows(lines.model_copy(update={"max_examples": 2}))[0]) == 2


def test_folder_has_a_file_for_each_split(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    assert len(load_rows(DataSection(path=str(tmp_path), split="anything"))[0]) == 1  # the only file there is
    write_jsonl(tmp_path / "test.jsonl", [ROW, ROW])
    assert len(load_rows(DataSection(path=str(tmp_path)))[0]) == 1
    assert len(load_rows(DataSection(path=str(tmp_path), split="test"))[0]) == 2
    with pytest.raises(DataError, match=r"not one file for data\.split dev, it holds: test\.jsonl, train\.jsonl"):
        load_rows(DataSection(path=str(tmp_path), split="dev"))


@pytest.mark.skipif(not (PACKAGE / "tinyworld").is_dir(), reason="tinyworld is not built")
def test_tinyworld_comes_with_the_package():
    rows, name = load_rows(DataSection(path="tinyworld/skill"))
    assert name == "messages"
    assert len(rows) > len(load_rows(DataSection(path="tinyworld/skill", split="test"))[0]) > 0


# ---- Faults --------------------------------------------------------------------------------------

USER, ASSISTANT = ROW["messages"]


@pytest.mark.parametrize(
    ("format_name", "row", "message"),
    [
        ("prompt-answer", {"prompt": "a", "answer": None}, "field 'answer' is missing"),
        ("prompt-answer", {"prompt": "a"}, "field 'answer' is missing"),
        ("prompt-answer", {"prompt": "a", "answer": " \n"}, "field 'answer' is empty"),
        ("prompt-answer", {"prompt": "a", "answer": 4}, "field 'answer' is of type int, expected str"),
        ("prompt-answer", {"prompt": "a", "answer": "\ud83d"}, "field 'answer' holds a broken character at position 0"),
        ("messages", ["a"], "a row is of type list, expected dict"),
        ("messages", {"messages": "Hi"}, "field 'messages' is of type str, expected list"),
        ("messages", {"messages": []}, "field 'messages' is empty"),
        ("messages", {"messages": ["Hi"]}, "messages[0] is of type str, expected dict"),
        ("messages", {"messages": [{"content": "Hi"}]},
         "field 'messages[0].role' is None, expected one of system, user, assistant"),
        ("messages", {"messages": [USER, {"role": "bot", "content": "a"}]}, "field 'messages[1].role' is 'bot', expected"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "field 'messages[1].content' is empty"),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]},
         "messages[1] has tool_calls, which hft does not render"),
        ("messages", {"messages": [USER, ASSISTANT, USER]}, "the conversation ends with the user's turn"),
        ("messages", {"messages": [SYSTEM]}, "the conversation ends with the system's turn"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "field 'conversations[0].value' is missing"),
        ("sharegpt", {"conversations": [{"from": "ai", "value": "a"}]},
         "field 'conversations[0].from' is 'ai', expected one of system, user, assistant, human, gpt"),
        ("alpaca", {"instruction": "a", "output": ""}, "field 'output' is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "field 'input' is of type int"),
        ("question-answer", {"question": "a", "answer": ["b"]}, "field 'answer' is of type list"),
        ("prompt-completion", {"prompt": [USER], "completion": [USER, ASSISTANT]},
         "field 'completion' starts with the user's turn"),
        ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]}, "it holds messages, and row 1 plain text"),
    ],
)  # fmt: skip
def test_bad_row_is_named(format_name: str, row: Any, message: str, tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([EXAMPLES[format_name][0], row]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_rows(DataSection(path=str(file)))
    assert caught.value.message.startswith(f"{file}: row 2: {message}")


def test_unknown_columns_are_listed_with_the_known_ones(tmp_path: Path):
    with pytest.raises(DataError, match="row 1: the columns input, target are of no known format") as caught:
        load_rows(write_jsonl(tmp_path / "rows.jsonl", [{"input": "a", "target": "b"}]))
    assert all(name in caught.value.fix for name in EXAMPLES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n\n{"question": "a",\n', ":3: not JSON: "),
        ("rows.json", b'[\n{"question": "a" "answer": "b"}]', ":2: not JSON: Expecting ',' delimiter"),
        ("rows.jsonl", b'{"question": "\xff"}', ": not UTF-8: invalid start byte at byte 14"),
        ("rows.jsonl", b"\n", ": there are no rows in it"),
        ("rows.json", b"[]", ": there are no rows in it"),
        ("rows.parquet", b"PAR", ": not a Parquet file: "),
        ("rows.csv", b"a,b", " is of no type that hft reads"),
    ],
)
def test_bad_file_is_named(name: str, content: bytes, message: str, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(DataSection(path=str(file)))
    assert caught.value.message.startswith(f"{file}{message}")


def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("train.jsonl"), [ROW])
    for path in (str(tmp_path / "trian.jsonl"), "trian.jsonl", "./trian.jsonl"):
        with pytest.raises(DataError, match="no such file or folder") as caught:
            find_sources(DataSection(path=path))
        assert caught.value.fix.startswith("did you mean")
        assert caught.value.fix.endswith("train.jsonl?")
    with pytest.raises(DataError) as caught:
        find_sources(DataSection(path="none/of/these"))
    assert caught.value.fix == "there is no folder none/of either"
    with pytest.raises(DataError, match="no such file or folder, and the hub does not give it"):
        find_sources(DataSection(path="nobody/nothing"))
    with pytest.raises(DataError, match=r"data\.name is main, a configuration of a hub dataset"):
        find_sources(DataSection(path="train.jsonl", name="main"))


def test_conversation_needs_a_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template") as caught:
        tokenize([ROW], tokenizer, tmp_path)
    assert caught.value.fix == "set model.chat_template to chatml, tulu or a Jinja file"


def test_plain_text_needs_an_end_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        tokenize([{"prompt": "a", "completion": "b"}], tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
         "none of its tokens is trained"),
        ("{% generation %}{% for m in messages %}{{ m.content + '\n' }}{% endfor %}{% endgeneration %}",
         "all of its tokens are trained"),
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


def test_tokenizer_without_character_positions_is_refused():
    class Slow(PreTrainedTokenizerBase):
        is_fast = False

    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        get_backend(Slow())


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


def test_check_positions():
    check_positions(256, 256)
    check_positions(256, None)
    with pytest.raises(DataError, match=r"data\.max_length is 257, but the model has 256 positions"):
        check_positions(257, 256)


# ---- Cutting and packing -------------------------------------------------------------------------


def test_rows_are_cut_and_dropped_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [{"prompt": "p" * length, "completion": "c" * 5} for length in (2, 8, 10, 12)]  # and the end: 8, 14, 16, 18
    data = write_jsonl(tmp_path / "rows.jsonl", rows).model_copy(update={"max_length": 10})
    calls = []
    dataset, report = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache", lambda *count: calls.append(count))
    assert [len(row["input_ids"]) for row in dataset] == [8, 10]
    assert [label != IGNORED for label in dataset[1]["labels"]] == [False] * 8 + [True] * 2
    assert report.model_dump(exclude={"sources", "key"}) == {
        "format": "prompt-completion",
        "num_rows": 4,
        "num_used": 2,
        "num_dropped": 2,
        "num_truncated": 1,
        "num_identical": 0,
        "num_sequences": 2,
        "num_tokens": 18,
        "num_trained_tokens": 6 + 2,
        "length_percentiles": {"p50": 16, "p90": 18, "p99": 18, "max": 18},
    }
    assert calls == [(0, 4), (4, 4)]


def test_no_row_left_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [ROW]).model_copy(update={"max_length": 8})
    with pytest.raises(DataError, match="none of the 1 rows has a trained token among its first 8 tokens"):
        prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")


def test_packing_keeps_every_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [{"prompt": "p" * (index % 7 + 1), "completion": "c" * (index % 11 + 1)} for index in range(1500)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows).model_copy(update={"max_length": 32})
    single, single_report = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")
    packed, report = prepare_dataset(data, TrainSection(packing=True), tokenizer, tmp_path / "cache")
    unpacked = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 32
        start = 0
        for length in row["seq_lengths"]:
            unpacked.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(unpacked) == sorted((row["input_ids"], row["labels"]) for row in single)
    assert report.num_sequences == len(packed) < len(single) / 2
    same = {"num_rows", "num_used", "num_tokens", "num_trained_tokens", "length_percentiles"}
    assert report.model_dump(include=same) == single_report.model_dump(include=same)


def test_trl_takes_the_rows_as_they_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [ROW, {"messages": CONVERSATION}])
    dataset, _ = prepare_dataset(data, TrainSection(packing=True), tokenizer, tmp_path / "cache")
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(dataset.to_list())
    [lengths] = dataset["seq_lengths"]
    assert batch["cu_seq_lens_q"].tolist() == [0, lengths[0], sum(lengths)]
    assert batch["labels"].tolist() == dataset["labels"][:]


# ---- The cache -----------------------------------------------------------------------------------


def test_second_call_takes_the_cache(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data, cache = write_jsonl(tmp_path / "rows.jsonl", [ROW]), tmp_path / "cache"

    def stamp_files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix != ".lock"}

    first, report = prepare_dataset(data, TrainSection(), tokenizer, cache)
    stamps = stamp_files()
    calls = []
    second, second_report = prepare_dataset(data, TrainSection(), tokenizer, cache, lambda *count: calls.append(count))
    assert (second.to_list(), second_report) == (first.to_list(), report)
    assert stamp_files() == stamps
    assert not calls
    assert (cache / report.key / "report.json").is_file()
    assert second.cache_files, "the tokens are mapped from disk, not held in memory"


def test_same_bytes_elsewhere_take_the_same_entry(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    reports = []
    for name in ("a.jsonl", "b.jsonl"):
        data = write_jsonl(tmp_path / name, [ROW])
        tokenizer(["a", "bbb"], truncation=True, max_length=2)  # leaves a setting behind
        reports.append(prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")[1])
    assert reports[0].key == reports[1].key
    assert [Path(report.sources[0].path).name for report in reports] == ["a.jsonl", "b.jsonl"]


def test_whatever_shapes_the_tokens_changes_the_key(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data, train = write_jsonl(tmp_path / "rows.jsonl", [ROW]), TrainSection()
    keys = []

    def add_key(data: DataSection, train: TrainSection) -> None:
        keys.append(prepare_dataset(data, train, tokenizer, tmp_path / "cache")[1].key)

    add_key(data, train)
    for change in ({"max_length": 64}, {"max_examples": 1}, {"split": "test"}):
        add_key(data.model_copy(update=change), train)
    for name in ("packing", "assistant_only_loss", "completion_only_loss"):
        add_key(data, train.model_copy(update={name: not getattr(train, name)}))
    add_key(write_jsonl(tmp_path / "others.jsonl", [ROW, ROW]), train)
    tokenizer.chat_template += " "
    add_key(data, train)
    tokenizer.bos_token = "<|im_start|>"
    add_key(data, train)
    tokenizer.add_tokens(["Hello"])
    add_key(data, train)
    assert len(set(keys)) == len(keys) == 11

    add_key(data, train.model_copy(update={"learning_rate": 1.0}))
    assert keys[-1] == keys[-2]


def test_damaged_entry_is_made_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    data, cache = write_jsonl(tmp_path / "rows.jsonl", [ROW]), tmp_path / "cache"
    first, report = prepare_dataset(data, TrainSection(), tokenizer, cache)
    expected = first.to_list()
    for file in (cache / report.key).iterdir():
        os.truncate(file, 0) if file.name != "report.json" else file.unlink()
    second, second_report = prepare_dataset(data, TrainSection(), tokenizer, cache)
    assert (second.to_list(), second_report) == (expected, report)


def test_default_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HFT_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere/tokens")
    monkeypatch.delenv("HFT_CACHE")
    assert default_cache() == Path.home() / ".cache/hft/tokens"


# ---- Reading it back -----------------------------------------------------------------------------


def test_sample_is_the_whole_text_in_pieces(minimind: PreTrainedTokenizerBase, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CONVERSATION}])
    dataset, _ = prepare_dataset(data, TrainSection(), minimind, tmp_path / "cache")
    pieces = groupby(lay_out_chatml(), key=lambda piece: piece[1])
    expected = [("".join(text for text, _ in group), trained) for trained, group in pieces]
    assert decode_samples(dataset, minimind, 0) == {"sample": expected}


@pytest.mark.parametrize("model", ["stories15M", "stories260K"])
def test_sample_of_a_sentencepiece_vocabulary(model: str, shared: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Once: 你", "completion": " upon  a 好"}])
    dataset, _ = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")
    assert decode_samples(dataset, tokenizer, 0) == {"sample": [("<s> Once: 你", False), (" upon  a 好</s>", True)]}


# ---- Real data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format_name", "num_rows"),
    [
        ("sft/alpaca_en_demo.jsonl", "messages", 999),
        ("sft/oasst1_zh.jsonl", "messages", 766),
        ("sft/dolly3k.jsonl", "messages", 2996),
        ("sft/gsm8k_train.jsonl", "question-answer", 7473),
        ("trace/C-STANCE", "prompt-answer", 500),
        ("trace/FOMC", "prompt-answer", 500),
        ("trace/MeetingBank", "prompt-answer", 375),
        ("trace/Py150", "prompt-answer", 500),
        ("trace/ScienceQA", "prompt-answer", 500),
        ("trace/NumGLUE-cm", "prompt-answer", 282),
        ("trace/NumGLUE-ds", "prompt-answer", 500),
        ("trace/20Minuten", "prompt-answer", 500),
        ("trace/Lima", "prompt-answer", 300),
    ],
)
def test_real_data(name: str, format_name: str, num_rows: int, shared: Path, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    data = DataSection(path=str(shared / "data" / name), max_length=512)
    dataset, report = prepare_dataset(data, TrainSection(), minimind, tmp_path)
    assert (report.format, report.num_rows) == (format_name, num_rows)
    assert report.num_used == report.num_sequences == len(dataset)
    assert report.num_used + report.num_dropped == num_rows
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert max(lengths) <= 512
    assert sum(lengths) == report.num_tokens
    trained = [sum(label != IGNORED for label in labels) for labels in dataset["labels"]]
    assert min(trained) > 0
    assert sum(trained) == report.num_trained_tokens < report.num_tokens
    is_cut = report.length_percentiles["max"] > 512
    assert bool(report.num_truncated + report.num_dropped) == is_cut


def test_template_of_an_unknown_model_is_kept(minimind: PreTrainedTokenizerBase):
    assert find_template(minimind).source == minimind.chat_template
    minimind.chat_template = read_template("qwen3")
    assert find_template(minimind).source == read_template("qwen3_training")
