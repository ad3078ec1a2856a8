"""Scores by likelihood and by generation are those of greedy decoding and of loops by hand."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError
from hftcli.measuring.asking import TokenizedTask, choose_tokens, decode_answer, generate_answers, tokenize_task
from hftcli.measuring.judging import score_task
from hftcli.tasks import Task, list_tasks, load_task
from hftcli.tasks.examples import Example

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embedded():
    folder = PACKAGE / "tinyworld" / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def questions() -> tuple[Example, ...]:
    """Plain ones, of several lengths."""
    rows = []
    for name in ("sale", "topic", "reverse"):
        file = PACKAGE / "tinyworld" / "sequence" / name / "test.json"
        rows += json.loads(file.read_text(encoding="utf-8"))[:12]
    return tuple(Example(row["prompt"], row["answer"]) for row in rows)


def score(model, tokenizer, *examples, **changes):
    return score_task(model, tokenize_task(Task("task", examples, **changes), 256, tokenizer), tokenizer, CPU)


# ---- Likelihood ----------------------------------------------------------------------------------


def test_exact_match_is_what_greedy_decoding_gives(embedded):
    model, tokenizer = embedded
    facts, skill = (load_task(f"tinyworld/{name}").examples for name in ("facts", "skill"))
    examples = facts[:60] + skill[:60]  # known, and not yet learned
    right = []
    for example in examples:
        prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        generated = model.generate(input_ids=prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
        right.append(tokenizer.decode(generated) == example.answer + tokenizer.eos_token)
    assert 0 < sum(right) < len(examples)
    scored, predictions = score(model, tokenizer, *examples)
    assert scored.score == sum(right) / len(examples)
    assert [prediction.score for prediction in predictions] == right
    # Generated, the same questions score the same.
    scored, predictions = score(model, tokenizer, *examples, max_new_tokens=40)
    assert [prediction.score for prediction in predictions] == right


def test_likelihood_is_that_of_one_answer_at_a_time(embedded):
    model, tokenizer = embedded
    examples = load_task("tinyworld/skill").examples[:20]
    nats, nums_tokens = [], []
    for example in examples:
        turns = [*example.prompt, {"role": "assistant", "content": example.answer}]
        encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt")
        places = encoded["assistant_masks"].bool().view(-1).nonzero().view(-1).tolist()
        with torch.no_grad():
            log_probs = model(input_ids=encoded["input_ids"]).logits[0].log_softmax(-1)
        nats.append(-sum(log_probs[place - 1, encoded["input_ids"][0, place]].item() for place in places))
        nums_tokens.append(len(places))
    scored, predictions = score(model, tokenizer, *examples)
    assert scored.nll == pytest.approx(sum(nats) / sum(nums_tokens), rel=1e-5)
    assert [prediction.num_tokens for prediction in predictions] == nums_tokens
    by_hand = [row / number for row, number in zip(nats, nums_tokens, strict=True)]
    assert [prediction.nll for prediction in predictions] == pytest.approx(by_hand, rel=1e-4)


def test_only_the_likelihood_is_measured_where_nothing_else_is_asked(embedded, questions):
    model, tokenizer = embedded
    asked = tokenize_task(Task("task", questions, max_new_tokens=8), 256, tokenizer)
    read, predictions = score_task(model, asked, tokenizer, CPU, is_read_only=True)
    assert (read.score, read.lenient, read.num_examples) == (None, None, len(questions))
    assert {(row.prediction, row.score, row.lenient) for row in predictions} == {(None, None, None)}
    assert read.nll == score_task(model, asked, tokenizer, CPU)[0].nll


def test_the_model_is_left_in_the_mode_it_came_in(embedded):
    model, tokenizer = embedded
    model.train()
    score(model, tokenizer, load_task("tinyworld/skill").examples[0], max_new_tokens=2)
    assert model.training
    model.eval()


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
    [(ids, labels)], [prompt] = asked.rows, asked.prompts
    assert (len(ids), asked.num_new_tokens) == (64, 32)
    start = ids[: labels.index(next(label for label in labels if label != IGNORED))]
    assert tokenizer.decode(start, skip_special_tokens=True) == "Why?\n\nAnswer:"
    assert 28 <= len(prompt) <= 32


# ---- Generation ----------------------------------------------------------------------------------


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


def test_an_answer_is_exact_by_its_text_where_it_is_by_its_tokens(embedded, questions):
    """The model's own answers, given as the right ones."""
    model, tokenizer = embedded
    asked = tokenize_task(Task("task", questions, max_new_tokens=40), 256, tokenizer)
    texts = [
        decode_answer(prompt, answer, tokenizer)
        for prompt, answer in zip(asked.prompts, generate_answers(model, asked, CPU), strict=True)
    ]
    own = [Example(example.prompt, text) for example, text in zip(questions, texts, strict=True) if text]
    given, exact = (score(model, tokenizer, *own, max_new_tokens=number)[1] for number in (40, None))
    assert [row.prediction for row in given] == [example.answer for example in own]
    assert {row.score for row in given} == {1.0}
    ended = [row.score for row in exact]
    assert ended.count(1.0) > len(own) / 2  # the others end too late, or are tokenized otherwise than they came
    wrong = [Example(example.prompt, example.answer + ".") for example in own]
    assert score(model, tokenizer, *wrong, max_new_tokens=40)[0].score == 0


@pytest.mark.parametrize("name", ["stories260K", "stories15M", "MiniMind2-Small"])
def test_decoding_gives_the_answer_to_the_letter(name, shared):
    """Real rows; SentencePiece decoders take the space from the beginning of a text."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    rows = [("Answer:", " fox"), ("Answer: ", "fox"), ("\nStance:", "A"), ("Q: 你", "好"), ("a", "\nb\n"), ("x", " <EOL> y")]
    for task in ("C-STANCE", "FOMC", "Py150", "NumGLUE-cm", "20Minuten"):
        file = shared / "data" / "trace" / task / "test.json"
        rows += [(row["prompt"], row["answer"]) for row in json.loads(file.read_text(encoding="utf-8"))[:10]]
    asked = tokenize_task(Task("task", tuple(Example(*row) for row in rows), max_new_tokens=1), 20_000, tokenizer)
    num_same = 0
    for (_, answer), (ids, labels), prompt in zip(rows, asked.rows, asked.prompts, strict=True):
        if ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == IGNORED:  # else a token straddles the border
            num_same += 1
            assert decode_answer(prompt, ids[len(prompt) : -1], tokenizer) == answer
    assert num_same >= len(rows) - 4


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
    some, all_ = (tokenize_task(Task("task", part, max_new_tokens=8), 256, tokenizer) for part in (questions[:5], questions))
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


@pytest.mark.parametrize("name", list_tasks())
def test_tasks_have_questions_with_answers(name):
    task = load_task(name)
    assert len(task.examples) >= 100
    assert all(example.prompt and example.answer for example in task.examples)
