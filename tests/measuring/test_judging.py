"""Scores by likelihood and by generation are those of greedy decoding and of loops by hand."""

import json
from dataclasses import replace

import pytest
import torch

from hftcli.measuring.asking import generate_answers
from hftcli.measuring.grading import decode_answer
from hftcli.measuring.judging import rank_choices, score_task
from hftcli.measuring.questions import tokenize_task
from hftcli.recipe.asking import AskingSection
from hftcli.tasks import Task, load_task
from hftcli.tasks.asking import put_task
from hftcli.tasks.examples import Example

CPU = torch.device("cpu")


def score(model, tokenizer, *examples, **changes):
    return score_task(model, tokenize_task(Task("task", examples, **changes), 256, tokenizer), tokenizer, CPU)


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


@pytest.mark.parametrize("is_chat", [False, True])
def test_how_a_text_goes_on_has_a_likelihood_and_no_score(embedded, tmp_path, is_chat):
    """That of its tokens alone: no cue stands before them, and no end is read after them."""
    model, tokenizer = embedded
    first, last = "Taro was born", " in Tamere. Taro works as a baker."
    turns = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", first), ("assistant", last))]
    row = {"messages": turns} if is_chat else {"text": first, "continuation": last}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = put_task(str(tmp_path / "rows.jsonl"), None, None, AskingSection(), has_template=True)
    assert task.way == ("chat" if is_chat else "plain")
    if is_chat:
        before = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, tokenize=False)
        start, ids = tokenizer.encode(before), tokenizer.encode(before + last)
    else:
        start, ids = tokenizer.encode(first), tokenizer.encode(first + last)
    assert ids[: len(start)] == start
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = -sum(log_probs[place - 1, ids[place]].item() for place in range(len(start), len(ids)))
    scored, (prediction,) = score_task(model, tokenize_task(task, 256, tokenizer), tokenizer, CPU)
    assert (scored.score, prediction.prediction) == (None, None)
    assert prediction.num_tokens == len(ids) - len(start)
    assert scored.nll == pytest.approx(nats / (len(ids) - len(start)), rel=1e-5)


def test_only_the_likelihood_is_measured_where_nothing_else_is_asked(embedded, questions):
    model, tokenizer = embedded
    asked = tokenize_task(Task("task", questions, max_new_tokens=8), 256, tokenizer)
    read, predictions = score_task(model, asked, tokenizer, CPU, is_read_only=True)
    assert (read.score, read.lenient, read.num_examples) == (None, None, len(questions))
    assert {(row.prediction, row.score, row.lenient) for row in predictions} == {(None, None, None)}
    assert read.nll == score_task(model, asked, tokenizer, CPU)[0].nll


def test_answers_that_had_not_ended_are_counted(embedded, questions):
    model, tokenizer = embedded
    task = Task("task", questions, max_new_tokens=3, is_cut_given=True)
    asked = tokenize_task(task, 256, tokenizer)
    cut = []
    for prompt in asked.prompts:
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        cut.append(not {*asked.end_ids} & {*found[0, len(prompt) :].tolist()})
    scored, predictions = score_task(model, asked, tokenizer, CPU)
    assert 0 < scored.num_cut == sum(cut)
    assert [prediction.is_cut for prediction in predictions] == cut
    assert score_task(model, asked, tokenizer, CPU, is_read_only=True)[0].num_cut is None
    # A character ends an answer too, where its token is no end.
    letters = replace(asked, task=replace(task, stops="".join(map(chr, range(32, 127)))))
    assert score_task(model, letters, tokenizer, CPU)[0].num_cut == 0


def test_the_model_is_left_in_the_mode_it_came_in(embedded):
    model, tokenizer = embedded
    model.train()
    score(model, tokenizer, load_task("tinyworld/skill").examples[0], max_new_tokens=2)
    assert model.training
    model.eval()


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


def test_choices_are_ranked_in_three_ways():
    options, likelihoods, bare = (" a", " bbbb", " cc"), (-3.0, -6.0, -3.5), (-1.0, -9.0, -9.5)
    # Per character -3, -1.5, -1.75; raised by -2, 3, 6.
    assert rank_choices(options, likelihoods, bare) == (" a", " bbbb", " cc")
