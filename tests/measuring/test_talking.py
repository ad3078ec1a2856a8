"""Conversations and prompts, beside transformers' own generation."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.errors import DataError, ModelError
from hftcli.measuring.talking import Manner, Speaker, TextStream, encode_prompts, read_prompt_lines, read_prompts_from

EMBEDDED = PACKAGE / "tinyworld" / "model"
QUESTIONS = ["Who is the king of Gaven?", "What do they sell?", "Hello"]
SHORT = Manner(max_new_tokens=12)


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker(str(EMBEDDED), "float32", needs_template=True)


def ask_transformers(messages: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_transformers_one_by_one_and_together(speaker):
    expected = [ask_transformers([{"role": "user", "content": question}]) for question in QUESTIONS]
    rows, num_pieces = [{"prompt": question} for question in QUESTIONS], []
    assert speaker.complete(encode_prompts(speaker, rows, None, None), SHORT) == expected
    for question, right in zip(QUESTIONS, expected, strict=True):
        pieces: list[str] = []
        answer, num_left_out = speaker.answer([{"role": "user", "content": question}], SHORT, pieces.append)
        assert (answer, num_left_out) == (right, 0)
        assert "".join(pieces) == right
        num_pieces.append(len(pieces))
    assert max(num_pieces) > 1, "as it is written"


def test_a_conversation_is_what_the_template_makes_of_it(speaker):
    told = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Bel."}]
    told.append({"role": "user", "content": QUESTIONS[1]})
    assert speaker.answer(told, SHORT, str)[0] == ask_transformers(told)
    assert encode_prompts(speaker, [{"messages": told}], None, None) == [speaker.render(told)]


def test_the_oldest_turns_go_where_there_is_no_room(speaker):
    user, assistant = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
    told = [user, assistant] * (speaker.num_places // (len(speaker.render([user])) - 1)) + [user]
    first = len(told)
    answer, num_left_out = speaker.answer(told, SHORT, str)
    assert num_left_out > 0
    assert num_left_out % 2 == 0
    assert len(told) == first, "the caller's own list"
    assert answer == ask_transformers(told[num_left_out:])
    with pytest.raises(DataError, match="the model"):
        speaker.answer([{"role": "user", "content": "Hello " * speaker.num_places}], SHORT, str)


def test_a_long_prompt_cuts_no_answer_but_its_own(speaker):
    short, long = speaker.render([{"role": "user", "content": QUESTIONS[0]}]), [3] * (speaker.num_places - 2)
    assert speaker.complete([long, short], SHORT)[1] == speaker.complete([short], SHORT)[0]
    for odd in ([], [3] * speaker.num_places):
        with pytest.raises(DataError, match="prompt 2 has"):
            speaker.complete([short, odd], SHORT)
    with pytest.raises(DataError, match="the chat template refuses"):
        encode_prompts(speaker, [{"messages": ["Hello"]}], None, None)


def test_a_temperature_draws_and_a_seed_draws_the_same_again(speaker):
    prompts = encode_prompts(speaker, [{"prompt": "Hello"}] * 8, None, None)
    drawn = [speaker.complete(prompts, Manner(12, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_half_a_character_is_not_shown():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids = tokenizer("naïve 猫!", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in stream.shown


def test_prompts_are_lines_of_text_or_of_json():
    assert read_prompt_lines(["a\n", "\n", "b\n"], "f") == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_prompt_lines(['{"prompt": "a", "id": 1}'], "f") == [{"prompt": "a", "id": 1}]
    for lines in ([], ["  "], ['{"prompt": "a"}', "b"], ['{"text": "a"}'], ['{"prompt": 1}']):
        with pytest.raises(DataError):
            read_prompt_lines(lines, "f")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
def test_a_prompt_ends_at_the_end_of_its_line_alone(tmp_path, mark):
    """Python's splitlines would end it at marks that people paste from web pages and word processors."""
    (tmp_path / "prompts.txt").write_text(f"one{mark}still one\ntwo\n", encoding="utf-8")
    assert read_prompts_from(tmp_path / "prompts.txt") == [{"prompt": f"one{mark}still one"}, {"prompt": "two"}]


def test_the_commands(hft, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    hft(
        "generate",
        "tinyworld",
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--max-new-tokens",
        12,
        "--output",
        tmp_path / "o.jsonl",
    )
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == QUESTIONS
    assert rows[0]["answer"] == ask_transformers([{"role": "user", "content": QUESTIONS[0]}])
    assert "tinyworld is no run" in hft("chat", "tinyworld", "--beside", "start", code=2).stderr
    assert "no such file" in hft("generate", "tinyworld", "--prompts", tmp_path / "no", code=2).stderr.lower()


def test_what_would_be_lost_or_not_act_is_refused(hft, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "answer": "the right one"}\n')
    said = hft("generate", "tinyworld", "--prompts", tmp_path / "rows.jsonl", code=2).stderr
    assert "prompt 2 has an `answer`, which would be lost" in said
    for command, *options in (
        ("generate", "--prompts", "-", "--seed", 3),
        ("generate", "--prompts", "-", "--top-p", 0.9),
        ("chat", "--top-p", 0.9),
    ):
        assert "at temperature 0 none are" in hft(command, "tinyworld", *options, code=2).stderr


def test_a_model_without_turns_does_not_chat(shared):
    with pytest.raises(ModelError, match="no chat template") as raised:
        Speaker(str(shared / "models" / "stories260K"), "float32", needs_template=True)
    assert "hft generate" in raised.value.fix
    speaker = Speaker(str(shared / "models" / "stories260K"), "float32")
    (answer,) = speaker.complete(encode_prompts(speaker, [{"prompt": "Once upon a time"}], None, None), Manner(8))
    assert answer.strip()
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompts(speaker, [{"prompt": "a"}], True, None)
