"""Questions to tokens, and answers to text: what is asked fits, and generation is that of a loop by hand."""

import json
import logging

import pytest
import torch
from transformers import AutoTokenizer

from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError
from hftcli.measuring.asking import choose_tokens, generate_answers, read_answers
from hftcli.measuring.grading import decode_answer
from hftcli.measuring.questions import TokenizedTask, tokenize_task
from hftcli.tasks import Task, load_task
from hftcli.tasks.examples import Example

CPU = torch.device("cpu")


def test_a_question_that_cannot_be_asked_is_named(embedded):
    _, tokenizer = embedded
    fits, never = Example("Why?\nAnswer:", " x"), Example("Why? " * 40 + "\nAnswer:", " x", (0, 5))
    with pytest.raises(DataError, match=r"task t: question 2, even without its body, is longer than data.max_length, 64"):
        tokenize_task(Task("t", (fits, never)), 64, tokenizer)
    long = Example("Why? " * 10, " x", (0, 0))
    with pytest.raises(DataError, match=r"question 1, even without its body, has \d+ tokens, and data.max_length 64 leaves 32"):
        tokenize_task(Task("t", (long, fits), max_new_tokens=32), 64, tokenizer)


def test_what_is_scored_fits(embedded, caplog):
    """Of an answer that is too long, the likelihood is that of its beginning; what is generated takes half of the room."""
    _, tokenizer = embedded
    example = Example("Why?\n" + "x " * 200 + "\nAnswer:", " fox" * 200, (5, 405))
    with caplog.at_level(logging.WARNING):
        asked = tokenize_task(Task("t", (example,), max_new_tokens=512), 64, tokenizer)
    assert "t: answers are cut at 32 tokens, half of data.max_length, and not at 512" in caplog.text
    assert "t: 1 of 1 questions lose a part: they have more than 64 tokens" in caplog.text
    [(ids, labels)], [prompt] = asked.rows, asked.prompts
    assert (len(ids), asked.num_new_tokens) == (64, 32)
    start = ids[: labels.index(next(label for label in labels if label != IGNORED))]
    assert tokenizer.decode(start, skip_special_tokens=True) == "Why?\n\nAnswer:"
    assert 28 <= len(prompt) <= 32


def test_a_question_that_is_cut_to_be_asked_is_counted(embedded, caplog):
    """With its right answer it fits, and beside as many tokens as may be written it does not."""
    _, tokenizer = embedded
    prompts = ["Why?\n" + "x " * number + "\nAnswer:" for number in range(100)]
    prompt = next(prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) >= 48)
    examples = (Example(prompt, " fox", (5, len(prompt) - 8)), Example("Why?\nAnswer:", " fox", (0, 4)))
    with caplog.at_level(logging.WARNING):
        asked = tokenize_task(Task("t", examples, max_new_tokens=32), 64, tokenizer)
    assert len(asked.rows[0][0]) > len(asked.prompts[0])
    [said] = [record.message for record in caplog.records if "lose a part" in record.message]
    assert said == (
        "t: 1 of 2 questions lose a part where they are asked: they have more than 32 tokens, and 32 are the answer's"
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenize_task(Task("t", examples, "instructions", 32, has_answers=False), 64, tokenizer)
    assert "t: 1 of 2 questions lose a part where they are asked" in caplog.text


def test_a_conversation_that_is_too_long_is_not_read_whole(embedded, caplog):
    _, tokenizer = embedded
    user, long_user = ({"role": "user", "content": "Why? " * number} for number in (1, 60))
    fault = "task t: question 2, a conversation, of which nothing is cut, is longer than data.max_length, 64 tokens"
    with pytest.raises(DataError, match=fault):
        tokenize_task(Task("t", (Example([user], "x"), Example([long_user], "x"))), 64, tokenizer)
    with caplog.at_level(logging.WARNING):
        asked = tokenize_task(Task("t", (Example([user], "fox " * 200 + "fox"),)), 64, tokenizer)
    assert "t: 1 of 1 questions lose a part: they have more than 64 tokens" in caplog.text
    [(ids, labels)] = asked.rows
    assert (len(ids), labels[-1]) == (64, ids[-1])


def decode_greedily(model, prompt: list[int], asked: TokenizedTask) -> list[int]:
    """One row, no cache, no padding: all tokens again for each new one."""
    ids = list(prompt)
    for _ in range(asked.num_new_tokens):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in asked.end_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_generation_is_that_of_one_row_at_a_time_with_no_cache(embedded, questions):
    """In left-padded batches, which rows leave at different steps; some never end."""
    model, tokenizer = embedded
    facts = load_task("tinyworld/facts").examples[:12]
    for examples, ends in ((questions, 1), (facts, 2)):
        asked = tokenize_task(Task("task", examples, max_new_tokens=12), 256, tokenizer)
        answers = generate_answers(model, asked, CPU)
        assert answers == [decode_greedily(model, prompt, asked) for prompt in asked.prompts]
        assert len({len(prompt) for prompt in asked.prompts}) > 1
        assert len({len(answer) for answer in answers}) > ends


@pytest.mark.parametrize("name", ["stories260K", "stories15M", "MiniMind2-Small"])
def test_decoding_gives_the_answer_to_the_letter(name, shared):
    """Real rows; SentencePiece decoders take the space from the beginning of a text."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    rows = [("Answer:", " fox"), ("Answer: ", "fox"), ("\nStance:", "A"), ("Q: 你", "好"), ("a", "\nb\n"), ("x", " <EOL> y")]
    for task in ("C-STANCE", "FOMC", "Py150", "NumGLUE-cm", "20Minuten"):
        file = shared / "data" / "trace" / task / "test.json"
        rows += [(row["prompt"], row["answer"]) for row in json.loads(file.read_text(encoding="utf-8"))[:10]]
    asked = tokenize_task(Task("task", tuple(Example(*row) for row in rows), max_new_tokens=1), 20_000, tokenizer)
    for (prompt, answer), (ids, _), layout in zip(rows, asked.rows, asked.layouts, strict=True):
        assert ids[: len(layout.prompt)] == layout.prompt
        assert prompt.endswith(layout.lead)
        assert decode_answer(layout.prompt, ids[len(layout.prompt) : -1], tokenizer) == layout.lead + answer
    assert asked.layouts[1].lead == " "  # of `Answer: `, whose blank is the answer's first token's
    assert asked.layouts[0].lead == ""
    assert not asked.faults


def test_a_token_that_nothing_stands_before_is_not_read(embedded):
    """An answer as long as all the room leaves no prompt. Beside it one with another length and place; by hand, in float64."""
    model, tokenizer = embedded
    ids = tokenizer("the cat sat on the mat and the dog ran")["input_ids"]
    rows = [(ids, list(ids)), (ids[:6], [IGNORED] * 4 + ids[4:6])]
    readings_N3 = read_answers(model, rows, CPU)
    for (row, labels), reading in zip(rows, readings_N3.tolist(), strict=True):
        with torch.no_grad():
            log_TV = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        places = [place for place in range(1, len(row)) if labels[place] != IGNORED]
        assert reading[0] == pytest.approx(-sum(log_TV[place - 1, row[place]].item() for place in places), rel=1e-5)
        assert reading[1] == len(places)


def test_draws_follow_the_distribution():
    """Halves and quarters by hand; at temperature 0.5 the shares are squared: 4/6, 1/6, 1/6."""
    logits_BV = torch.tensor([0.5, 0.25, 0.25]).log().expand(6, 3)
    uniforms_B = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.999999], dtype=torch.float64)
    assert choose_tokens(logits_BV, uniforms_B, 1.0).tolist() == [0, 0, 1, 1, 2, 2]
    uniforms_B = torch.tensor([0.0, 0.66, 0.67, 0.83, 0.84, 0.999999], dtype=torch.float64)
    assert choose_tokens(logits_BV, uniforms_B, 0.5).tolist() == [0, 0, 1, 1, 2, 2]
    assert choose_tokens(logits_BV, uniforms_B, 0.0).tolist() == [0] * 6


def test_draws_depend_on_the_question_alone(embedded, questions):
    model, tokenizer = embedded
    some, all_ = (tokenize_task(Task("task", part, max_new_tokens=32), 256, tokenizer) for part in (questions[:5], questions))
    drawn = generate_answers(model, all_, CPU, temperature=1.0)
    assert drawn == generate_answers(model, all_, CPU, temperature=1.0)
    assert drawn[:5] == generate_answers(model, some, CPU, temperature=1.0)
    assert drawn != generate_answers(model, all_, CPU)


def test_a_checkpoint_brings_no_rules_of_generation_along(embedded, questions):
    model, tokenizer = embedded
    asked = tokenize_task(Task("task", questions[:4], max_new_tokens=8), 256, tokenizer)
    answers = generate_answers(model, asked, CPU)
    kept = model.generation_config.repetition_penalty
    model.generation_config.repetition_penalty = 5.0
    assert generate_answers(model, asked, CPU) == answers
    model.generation_config.repetition_penalty = kept
