"""Rows and questions to tokens: what is trained, the border of prompt and answer, the cut, packing."""

import logging
from pathlib import Path
from typing import get_args

import pytest
from data.written_rows import (
    CONVERSATION,
    CUE,
    INSTRUCTION,
    ROW,
    make_long,
    read_trained,
    tokenize,
    tokenize_whole,
    write_jsonl,
)
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hftcli.data.prepare import prepare_dataset
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.data.tokens import IGNORED, get_backend, tokenize_examples, tokenize_prompts
from hftcli.errors import DataError, ModelError
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.tasks.examples import Cut, Example

# What is trained


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


USER, REPLY = ROW["messages"]
PLAIN = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("row", "options", "name", "fix"),
    [
        (
            {"instruction": "Say hi", "output": "hi"},
            {"completion_only_loss": False},
            "completion",
            "assistant_only_loss: false",
        ),
        ({"question": "Hi?", "answer": "hi"}, {"completion_only_loss": False}, "completion", "assistant_only_loss: false"),
        (
            {"prompt": [USER], "completion": [REPLY]},
            {"completion_only_loss": False},
            "completion",
            "assistant_only_loss: false",
        ),
        (ROW, {"completion_only_loss": False, "assistant_only_loss": False}, "completion", "drop it"),
        (PLAIN, {"assistant_only_loss": False}, "assistant", "completion_only_loss: false"),
        ({"prompt": "a", "answer": "b"}, {"assistant_only_loss": False}, "assistant", "completion_only_loss: false"),
        ({"text": "a"}, {"assistant_only_loss": False}, "assistant", "drop it"),
        ({"text": "a"}, {"completion_only_loss": False}, "completion", "drop it"),
    ],
)
def test_a_switch_without_effect_on_the_rows_is_refused(
    row: dict, options: dict, name: str, fix: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    data, train, cache = write_jsonl(tmp_path / "rows.jsonl", [row]), TrainSection(**options), tmp_path / "cache"
    [held_out], _ = prepare_dataset(data, train, tokenizer, cache, is_held_out=True)  # there it is said of other rows
    for _ in range(2):  # what is held out is not found in their place
        with pytest.raises(DataError, match=rf"train\.{name}_only_loss: false would have no effect on rows of the") as caught:
            prepare_dataset(data, train, tokenizer, cache)
        assert caught.value.fix.endswith(fix)
    [(ids, labels)] = tokenize([row], tokenizer, tmp_path, **options | {f"{name}_only_loss": True})
    assert (held_out["input_ids"], held_out["labels"]) == (ids, labels)  # so it has none


def test_a_switch_acts_where_one_source_has_what_it_is_about(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", [row]).path for number, row in enumerate((PLAIN, ROW))]
    data = DataSection(sources=[{"path": path} for path in paths])
    rows, report = prepare_dataset(
        data, TrainSection(assistant_only_loss=False, completion_only_loss=False), tokenizer, tmp_path / "cache"
    )
    assert report.num_trained_tokens == report.num_tokens == sum(len(row["input_ids"]) for row in rows)


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


def test_turn_without_end_token_is_said(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with caplog.at_level(logging.WARNING, logger="hftcli.data.encoding"):
        rows = tokenize([ROW, ROW], tokenizer, tmp_path)
    assert [read_trained(*row, tokenizer) for row in rows] == ["Hello", "Hello"]
    assert len(caplog.records) == 1
    assert "will not learn to stop" in caplog.text


def test_plain_text_needs_an_end_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        tokenize([{"prompt": "a", "completion": "b"}], tokenizer, tmp_path)


def test_tokenizer_without_character_positions_is_refused():
    class Slow(PreTrainedTokenizerBase):
        is_fast = False

    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        get_backend(Slow())


# Cutting and packing


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
