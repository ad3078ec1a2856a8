"""Conversations and prompts, beside transformers' own generation."""

import json
import shutil

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.commands.talk import check_rows, talk
from hftcli.data.templates import Template
from hftcli.errors import DataError, InputError, ModelError
from hftcli.measuring.talking import (
    Draw,
    Manner,
    Speaker,
    TextStream,
    draw_uniforms,
    encode_prompts,
    read_prompt_lines,
    read_prompts_from,
)

EMBEDDED = PACKAGE / "tinyworld" / "model"
QUESTIONS = ["Who is the king of Gaven?", "What do they sell?", "Hello"]
SHORT = Manner(max_new_tokens=12)


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker(str(EMBEDDED), "float32", needs_template=True)


def generate_greedily(messages: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return found[0, ids.shape[1] :].tolist()


def ask_transformers(messages: list[dict[str, str]]) -> str:
    return AutoTokenizer.from_pretrained(EMBEDDED).decode(generate_greedily(messages), skip_special_tokens=True)


def test_answers_are_those_of_transformers_one_by_one_and_together(speaker):
    expected = [ask_transformers([{"role": "user", "content": question}]) for question in QUESTIONS]
    rows, num_pieces = [{"prompt": question} for question in QUESTIONS], []
    assert [answer.text for answer in speaker.complete(encode_prompts(speaker, rows, None, None), SHORT)] == expected
    for question, right in zip(QUESTIONS, expected, strict=True):
        pieces: list[str] = []
        answer, num_left_out = speaker.answer([{"role": "user", "content": question}], SHORT, pieces.append)
        assert (answer.text, num_left_out) == (right, 0)
        assert "".join(pieces) == right
        num_pieces.append(len(pieces))
    assert max(num_pieces) > 1, "as it is written"


def test_an_answer_of_a_conversation_that_was_cut_is_said_to_be(speaker, monkeypatch, capsys):
    """Of each of two models; one that ends with its last token is whole, and one that Ctrl-C stopped was not cut."""
    told = [{"role": "user", "content": QUESTIONS[0]}]
    length = generate_greedily(told).index(AutoTokenizer.from_pretrained(EMBEDDED).eos_token_id)
    assert 0 < length < 11
    assert [speaker.answer(told, Manner(limit), str)[0].is_cut for limit in (length, length + 1)] == [True, False]

    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 1:
            raise KeyboardInterrupt

    assert not speaker.answer(told, Manner(length), interrupt)[0].is_cut
    assert pieces
    for limit, names in ((length, ["[before] ", "[model] "]), (length + 1, [])):
        lines = iter([QUESTIONS[0], "/quit"])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        talk({"before": speaker, "model": speaker}, Manner(limit), None)
        said = capsys.readouterr().err.splitlines()
        cut = "(the answer was cut before it ended: see --max-new-tokens, or /new where the model has no more places)"
        assert said == [f"{name}{cut}" for name in names]


def test_a_conversation_is_what_the_template_makes_of_it(speaker):
    told = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Bel."}]
    told.append({"role": "user", "content": QUESTIONS[1]})
    assert speaker.answer(told, SHORT, str)[0].text == ask_transformers(told)
    assert encode_prompts(speaker, [{"messages": told}], None, None) == [speaker.render(told)]


def test_the_oldest_turns_go_where_there_is_no_room(speaker):
    user, assistant = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
    told = [user, assistant] * (speaker.num_places // (len(speaker.render([user])) - 1)) + [user]
    first = len(told)
    answer, num_left_out = speaker.answer(told, SHORT, str)
    assert num_left_out > 0
    assert num_left_out % 2 == 0
    assert len(told) == first, "the caller's own list"
    assert answer.text == ask_transformers(told[num_left_out:])
    with pytest.raises(DataError, match="the model"):
        speaker.answer([{"role": "user", "content": "Hello " * speaker.num_places}], SHORT, str)


def test_a_long_prompt_cuts_no_answer_but_its_own(speaker):
    short, long = speaker.render([{"role": "user", "content": QUESTIONS[0]}]), [3] * (speaker.num_places - 2)
    assert speaker.complete([long, short], SHORT)[1] == speaker.complete([short], SHORT)[0]
    for odd in ([], [3] * speaker.num_places):
        with pytest.raises(DataError, match="prompt 2 has"):
            speaker.complete([short, odd], SHORT)
    with pytest.raises(DataError, match=r"prompt 1: messages\[0\] is of type str"):
        encode_prompts(speaker, [{"messages": ["Hello"]}], None, None)


def test_a_temperature_draws_and_a_seed_draws_the_same_again(speaker):
    prompts = encode_prompts(speaker, [{"prompt": "Hello"}] * 8, None, None)
    drawn = [speaker.complete(prompts, Manner(12, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_what_is_drawn_does_not_depend_on_the_prompts_beside(speaker):
    """Answers of 1 to 16 came again as 17 to 32 where each batch began the draws anew."""
    (prompt,) = encode_prompts(speaker, [{"prompt": "Hello"}], None, None)
    manner = Manner(12, temperature=3.0, seed=1)
    drawn = speaker.complete([prompt] * 32, manner)
    assert drawn[:16] != drawn[16:]
    assert len(set(drawn)) > 24
    longer = speaker.render([{"role": "user", "content": "Hello, who is the king?"}])
    assert speaker.complete([prompt, longer, prompt], manner)[::2] == [drawn[0], drawn[2]]


def test_draws_follow_the_distribution():
    """Of 0.6, 0.3 and 0.1, the likeliest two hold 0.8: the third is never drawn."""
    logits_BV = torch.tensor([0.6, 0.3, 0.1]).log().expand(3000, 3)
    for temperature, top_p, expected in (
        (1.0, 1.0, (0.6, 0.3, 0.1)),
        (0.5, 1.0, (36 / 46, 9 / 46, 1 / 46)),
        (1.0, 0.8, (2 / 3, 1 / 3, 0)),
    ):
        draw = Draw(Manner(temperature=temperature, top_p=top_p), draw_uniforms(5, range(3000), 1), start=7)
        tokens_B = draw(torch.zeros(3000, 7, dtype=torch.long), logits_BV).argmax(-1)
        shares = tokens_B.bincount(minlength=3) / 3000
        assert shares.tolist() == pytest.approx(expected, abs=0.03)


def test_messages_are_turns_under_either_name(speaker):
    turns = [{"role": "user", "content": "Hello"}]
    assert encode_prompts(speaker, [{"prompt": turns}], None, None) == encode_prompts(
        speaker, [{"prompt": "Hello"}], True, None
    )
    with pytest.raises(DataError, match=r"prompt 2: field 'messages\[0\].role' is 'sir'"):
        encode_prompts(speaker, [{"prompt": turns}, {"prompt": [{"role": "sir", "content": "a"}]}], None, None)
    answered = {"messages": [*turns, {"role": "assistant", "content": "Hello to you."}]}
    with pytest.raises(
        DataError, match=r"prompt 2: messages\[1\], the last turn, is the assistant's: the answer would be shown"
    ):
        encode_prompts(speaker, [{"prompt": turns}, answered], None, None)


def test_a_conversation_has_one_system_turn(speaker):
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert encode_prompts(speaker, [{"messages": own}], None, "Be brief.") == [speaker.render(own)]
    assert encode_prompts(speaker, [{"messages": own[1:]}], None, "Be brief.") == [speaker.render(own)]
    with pytest.raises(DataError, match="prompt 2: --system and the conversation's own system turn differ"):
        encode_prompts(speaker, [{"messages": own[1:]}, {"messages": own}], None, "Be loud.")


PARTS = "{% for m in messages %}{{ m.role }}: {% if m.content is not string %}{{ m.content[0].text }}{% endif %}\n{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_prints_all_that_is_asked(speaker, monkeypatch):
    monkeypatch.setattr(speaker, "template", Template(PARTS, {}))
    user = {"role": "user", "content": "Hello"}
    assert speaker.tokenizer.decode(speaker.render([user])) == "user: Hello"
    monkeypatch.setattr(speaker, "template", Template(NO_SYSTEM, {}))
    told = [user, {"role": "assistant", "content": "<think>Who?</think>Bel."}, user]  # templates leave out earlier thoughts
    assert speaker.tokenizer.decode(speaker.render(told)) == "user: Hello\nassistant: Bel.\nuser: Hello\nassistant:"
    with pytest.raises(DataError, match=r"prompt 1: turn 1, the system's: 'Be brief\.' is not in the text"):
        encode_prompts(speaker, [{"prompt": "Hello"}], None, "Be brief.")


def test_an_end_that_is_no_special_token_is_not_shown(speaker, monkeypatch):
    """As a conversation has it on the screen, and is told again in the next turn."""
    told = [{"role": "user", "content": QUESTIONS[0]}]
    (answer,) = speaker.complete([speaker.render(told)], SHORT)
    (first,) = speaker.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(speaker, "end_ids", [*speaker.end_ids, first])
    pieces: list[str] = []
    assert answer.text
    assert speaker.answer(told, SHORT, pieces.append)[0].text == "".join(pieces) == ""


def test_half_a_character_is_not_shown():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids = tokenizer("naïve 猫!", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces) or "\N{REPLACEMENT CHARACTER}" in stream.shown


def test_an_answer_is_shown_as_it_was_written(shared):
    """A special token in it, and the blank that it begins with, which decoders take from a text of its own."""
    speaker = Speaker(str(shared / "models" / "stories260K"), "float32")
    (prompt,) = encode_prompts(speaker, [{"prompt": "Once upon a"}], None, None)
    ids = torch.tensor([prompt])
    found = speaker.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    whole, before = (speaker.tokenizer.decode(ids, skip_special_tokens=False) for ids in (found[0].tolist(), prompt))
    (answer,) = speaker.complete([prompt], Manner(max_new_tokens=4))
    assert answer.text.startswith(" ")
    assert before + answer.text == whole
    pieces: list[str] = []
    stream = TextStream(speaker.tokenizer, pieces.append, [speaker.tokenizer.eos_token_id])
    spoken = speaker.tokenizer.convert_tokens_to_ids(["\u2581time", "<unk>", "\u2581there", "</s>"])
    for ids in (prompt, *([token] for token in spoken)):
        stream.put(torch.tensor([ids]))
    stream.end()
    assert "".join(pieces) == stream.shown == " time<unk> there"


def test_a_prompt_has_one_beginning_and_no_end(speaker, shared):
    """As rows and questions have it, whatever the tokenizer puts around a text and the prompt brings along."""
    plain = Speaker(str(shared / "models" / "stories260K"), "float32")
    ids = plain.tokenizer("Once upon", add_special_tokens=False)["input_ids"]
    plain.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert plain.tokenizer("Once upon")["input_ids"] == [1, *ids, 2]
    rows = [{"prompt": "Once upon"}, {"prompt": "<s>Once upon"}, {"prompt": ""}]
    assert encode_prompts(plain, rows, None, None) == [[1, *ids], [1, *ids], [1]]
    rows = [{"prompt": "Hello"}, {"prompt": "<|bos|>Hello<|end|>"}]
    first, second = encode_prompts(speaker, rows, None, None)
    assert first == second


def test_prompts_are_lines_of_text_or_of_json():
    assert read_prompt_lines(["a\n", "\n", "b\n"], "f") == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_prompt_lines(['{"prompt": "a", "id": 1}'], "f") == [{"prompt": "a", "id": 1}]
    assert read_prompt_lines(["\ufeff" + '{"prompt": "a"}\n', '{"prompt": "b"}\n'], "f") == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_prompt_lines(["\ufeffa\n"], "f") == [{"prompt": "a"}]
    assert read_prompt_lines(["[\n", '{"prompt": "a"},\n', "\n", '{"prompt": "b"}\n', "]"], "f") == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]
    assert read_prompt_lines(["[INST] a [/INST]\n"], "f") == [{"prompt": "[INST] a [/INST]"}]
    for key in ("tools", "system", "history", "context", "chat_template_kwargs"):
        with pytest.raises(DataError, match=f"f, prompt 2: the key '{key}' carries meaning that would not be asked"):
            read_prompt_lines(['{"prompt": "a"}', json.dumps({"prompt": "b", key: ["c"]})], "f")
    for lines in (
        [],
        ["  "],
        ["\ufeff\n"],
        ['[{"prompt": "a"},'],
        ['[{"text": "a"}]'],
        ['{"prompt": "a"}', "b"],
        ['{"text": "a"}'],
        ['{"prompt": 1}'],
        ['{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}'],
    ):
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
    short = hft("generate", "tinyworld", "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 2)
    written = [generate_greedily([{"role": "user", "content": question}]) for question in QUESTIONS]
    eos = AutoTokenizer.from_pretrained(EMBEDDED).eos_token_id
    are_cut = [eos not in ids[:2] for ids in written]
    assert any(are_cut)
    said = "texts are asked as a user's turn, through the chat template; --no-chat asks them as they are"
    assert said in short.stderr
    bare = hft("generate", "tinyworld", "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 2, "--no-chat")
    assert said not in bare.stderr
    assert [json.loads(line).get("is_cut", False) for line in short.stdout.splitlines()] == are_cut
    assert f"({sum(are_cut)} of 3 answers were cut before they ended: see --max-new-tokens)" in short.stderr
    assert [row.get("is_cut", False) for row in rows] == [eos not in ids for ids in written]
    assert "tinyworld is no run" in hft("chat", "tinyworld", "--beside", "start", code=2).stderr
    assert "no such file" in hft("generate", "tinyworld", "--prompts", tmp_path / "no", code=2).stderr.lower()


def test_a_start_without_a_template_is_asked_with_that_of_what_was_made_of_it(tmp_path):
    """As `hft chat RUN --beside start` asks it, where `model.chat_template` gave the run one."""
    shutil.copytree(EMBEDDED, tmp_path / "start")
    config = tmp_path / "start" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    start = str(tmp_path / "start")
    with pytest.raises(ModelError, match="has no chat template"):
        Speaker(start, "float32", needs_template=True)
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    answer, _ = Speaker(start, "float32", needs_template=True, tuned=str(EMBEDDED)).answer(asked, SHORT, lambda text: None)
    assert answer.text == ask_transformers(asked)


def test_what_would_be_lost_or_not_act_is_refused(hft, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "answer": "the right one"}\n')
    said = hft("generate", "tinyworld", "--prompts", tmp_path / "rows.jsonl", code=2).stderr
    assert "prompt 2 has an `answer`, which would be lost" in said
    said = hft("generate", "tinyworld", "--prompts", "-", "--system", "Be brief.", "--no-chat", code=2).stderr
    assert "--no-chat asks without turns" in said
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    said = hft("generate", "tinyworld", "--prompts", tmp_path / "rows.jsonl", "--no-chat", code=2).stderr
    assert "--no-chat would have no effect on" in said
    assert "prompt 2: messages are asked through the chat template" in " ".join(said.split())
    for command, *options in (
        ("generate", "--prompts", "-", "--seed", 3),
        ("generate", "--prompts", "-", "--top-p", 0.9),
        ("chat", "--top-p", 0.9),
    ):
        assert "at temperature 0 none are" in hft(command, "tinyworld", *options, code=2).stderr


def test_without_the_template_texts_alone_are_asked():
    """Messages under either name are asked through it, whatever --no-chat says; texts are not, under either name."""
    turns = [{"role": "user", "content": "a"}]
    check_rows([{"prompt": "a"}, {"messages": "b"}], "f", False)
    for row in ({"prompt": turns}, {"messages": turns}):
        for chat in (None, True):
            check_rows([row], "f", chat)
        with pytest.raises(InputError, match="^--no-chat would have no effect on f, prompt 2: ") as caught:
            check_rows([{"prompt": "a"}, row], "f", False)
        assert caught.value.fix == "drop it, or give texts alone"


def test_a_model_without_turns_does_not_chat(shared):
    with pytest.raises(ModelError, match="no chat template") as raised:
        Speaker(str(shared / "models" / "stories260K"), "float32", needs_template=True)
    assert "hft generate" in raised.value.fix
    speaker = Speaker(str(shared / "models" / "stories260K"), "float32")
    (answer,) = speaker.complete(encode_prompts(speaker, [{"prompt": "Once upon a time"}], None, None), Manner(8))
    assert answer.text.strip()
    with pytest.raises(ModelError, match="no chat template"):
        encode_prompts(speaker, [{"prompt": "a"}], True, None)
