"""Scores by likelihood are those of greedy decoding and of a loop by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli.evaluate import score_rows, tokenize_task
from hftcli.recipe import PACKAGE
from hftcli.tasks import Task, list_tasks, load_task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embedded():
    folder = PACKAGE / "tinyworld" / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_exact_match_is_what_greedy_decoding_gives(embedded):
    model, tokenizer = embedded
    facts, skill = (load_task(f"tinyworld/{name}").examples for name in ("facts", "skill"))
    examples = facts[:60] + skill[:60]  # known, and not yet learned
    right = 0
    for example in examples:
        prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        generated = model.generate(input_ids=prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
        right += tokenizer.decode(generated) == example.answer + tokenizer.eos_token
    assert 0 < right < len(examples)
    assert score_rows(model, tokenize_task(Task("both", examples), tokenizer), CPU).score == right / len(examples)


def test_likelihood_is_that_of_one_answer_at_a_time(embedded):
    model, tokenizer = embedded
    examples = load_task("tinyworld/skill").examples[:20]
    nats = num_tokens = 0
    for example in examples:
        turns = [*example.prompt, {"role": "assistant", "content": example.answer}]
        encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt")
        is_answer = encoded["assistant_masks"].bool().view(-1)
        with torch.no_grad():
            log_probs = model(input_ids=encoded["input_ids"]).logits[0].log_softmax(-1)
        for place in is_answer.nonzero().view(-1).tolist():
            nats -= log_probs[place - 1, encoded["input_ids"][0, place]].item()
            num_tokens += 1
    score = score_rows(model, tokenize_task(Task("skill", examples), tokenizer), CPU)
    assert score.nll == pytest.approx(nats / num_tokens, rel=1e-5)


def test_the_model_is_left_in_the_mode_it_came_in(embedded):
    model, tokenizer = embedded
    model.train()
    score_rows(model, tokenize_task(Task("one", load_task("tinyworld/skill").examples[:1]), tokenizer), CPU)
    assert model.training
    model.eval()


@pytest.mark.parametrize("name", list_tasks())
def test_tasks_have_questions_with_answers(name):
    task = load_task(name)
    assert len(task.examples) >= 100
    assert all(example.prompt and example.answer for example in task.examples)
