"""Likelihoods of options, prompts shared, are those of one row at a time."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.data.tokens import get_backend
from hftcli.errors import DataError
from hftcli.measuring.grading import cut_answer
from hftcli.measuring.judging import score_task
from hftcli.measuring.options import read_options, tokenize_questions
from hftcli.measuring.questions import find_stops, tokenize_task
from hftcli.tasks import Task
from hftcli.tasks.examples import Example

CPU = torch.device("cpu")
ROWS = [
    ("Question: What colour has the sky?\nAnswer:", (" blue", " a bright and quiet green", " b")),
    ("Answer:", (" blue", " red")),
    ("Question: Who sells the fish in the harbour, and at what time of the day?\nAnswer:", (" Tom", " no one", " the fox")),
    ("Once upon a ti", ("me there was", "re", " e")),  # tokens across the border
    ("x", (" y",)),
]


@pytest.fixture(scope="module", params=["tinyworld", "stories260K"])
def loaded(request):
    if request.param == "tinyworld":
        folder = PACKAGE / "tinyworld" / "model"
    else:  # puts a token before every text
        folder = request.getfixturevalue("shared") / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def read_one(model, tokenizer, prompt: str, option: str, max_length: int) -> float:
    """Of the tokens that cover a character of the option, in one row, with no cache; what the tokenizer begins with stays."""
    encoding = get_backend(tokenizer).encode(prompt + option)
    ids, offsets = encoding.ids, encoding.offsets
    start = next(place for place, (first, last) in enumerate(offsets) if last > max(len(prompt), first))
    num_gone, num_first = max(len(ids) - max_length, 0), encoding.special_tokens_mask.index(0)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids[:num_first] + ids[num_first + num_gone :]])).logits[0].log_softmax(-1)
    return sum(log_probs[place - num_gone - 1, ids[place]].item() for place in range(start, len(ids)))


def test_likelihoods_are_those_of_one_row_at_a_time(loaded):
    model, tokenizer = loaded
    found = read_options(model, tokenize_questions(ROWS, 128, tokenizer), CPU)
    for (prompt, options), values in zip(ROWS, found, strict=True):
        assert values == pytest.approx([read_one(model, tokenizer, prompt, option, 128) for option in options], abs=1e-4)


def read_on_rank(rank: int, store: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    questions = tokenize_questions(ROWS, 128, tokenizer)
    assert read_options(model, questions, CPU, rank, 2) == [
        pytest.approx(values, abs=1e-4) for values in read_options(model, questions, CPU)
    ]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_read_what_one_does(tmp_path):
    torch.multiprocessing.spawn(read_on_rank, (str(tmp_path / "store"), str(PACKAGE / "tinyworld" / "model")), nprocs=2)


def test_a_long_prompt_loses_its_beginning(loaded, caplog):
    model, tokenizer = loaded
    prompt, options = "The old man went to the sea and back to the town " * 4 + "\nAnswer:", (" sea", " town")
    with caplog.at_level(logging.WARNING):
        questions = tokenize_questions([(prompt, options), ("Answer:", options)], 40, tokenizer)
    assert "1 of 2 prompts lose their beginning: they have more than 40 tokens" in caplog.text
    assert len(questions[0].prompt) + max(map(len, questions[0].options)) == 40
    beginning = get_backend(tokenizer).encode("").ids  # of every text
    assert questions[0].prompt[: len(beginning)] == questions[1].prompt[: len(beginning)] == beginning
    longest = max(options, key=lambda option: len(get_backend(tokenizer).encode(prompt + option).ids))
    found = read_options(model, questions, CPU)[0]
    assert found[options.index(longest)] == pytest.approx(read_one(model, tokenizer, prompt, longest, 40), abs=1e-4)


def test_a_choice_is_scored(loaded):
    model, tokenizer = loaded
    examples = tuple(Example(prompt, options[0], options=options) for prompt, options in ROWS[:3])
    task = Task("task", examples, "choice", bare_prompt="Answer:")
    scored, predictions = score_task(model, tokenize_task(task, 128, tokenizer), tokenizer, CPU)
    for example, prediction in zip(examples, predictions, strict=True):
        values = [read_one(model, tokenizer, example.prompt, option, 128) for option in example.options]
        best = max(range(len(values)), key=values.__getitem__)
        assert prediction.prediction == example.options[best].strip()
        assert prediction.score == float(best == 0)
        assert prediction.nll * prediction.num_tokens == pytest.approx(-values[0], rel=1e-4)
        bare = [read_one(model, tokenizer, "Answer:", option, 128) for option in example.options]
        assert prediction.bare_log_likelihoods == pytest.approx(bare, abs=1e-4)
    assert set(scored.others) == {"acc_norm", "acc_content"}
    read, _ = score_task(model, tokenize_task(task, 128, tokenizer), tokenizer, CPU, is_read_only=True)
    assert (read.score, read.others, read.nll) == (None, {}, scored.nll)


@pytest.mark.parametrize("num_sentences", [1, 20])
def test_of_one_long_answer_the_end_is_cut_and_its_question_stays(loaded, caplog, num_sentences: int):
    """Where the question is long too, half of the tokens are the answer's."""
    model, tokenizer = loaded
    prompt, answer = "The old man." * num_sentences, " There he saw a fish." * 20
    encoding = get_backend(tokenizer).encode(prompt + answer)
    start = next(place for place, (first, last) in enumerate(encoding.offsets) if last > max(len(prompt), first))
    num_first = encoding.special_tokens_mask.index(0)
    num_asked = min(start, 16)
    assert (start < 16) == (num_sentences == 1)
    assert len(encoding.ids) - start > 32
    left = encoding.ids[:num_first] + encoding.ids[start - num_asked + num_first : start]
    told = encoding.ids[start : start + 32 - num_asked]
    rows = tuple(Example(*texts, options=texts[1:]) for texts in ((prompt, answer), ("The old man", " went")))
    asked = tokenize_task(Task("stories", rows, "none"), 32, tokenizer)
    question = asked.questions[0]
    assert (question.prompt, question.options, question.nums_scored) == (left, [told], [len(told)])
    assert "task stories: 1 of 2 answers lose their end: with their question they have more than 32 tokens" in caplog.text
    _, predictions = score_task(model, asked, tokenizer, CPU)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([left + told])).logits[0].log_softmax(-1)
    nats = -sum(log_probs[len(left) + place - 1, token].item() for place, token in enumerate(told))
    assert predictions[0].num_tokens == len(told)
    assert predictions[0].nll == pytest.approx(nats / len(told), rel=1e-4)


def test_a_choice_that_does_not_fit_is_refused(loaded):
    _, tokenizer = loaded
    rows = (Example("Where?", " sea", options=(" sea", " town")), Example("Who?", " he", options=(" he", " a fox" * 20)))
    assert len(tokenize_task(Task("who", rows, "choice", bare_prompt="Answer:"), 128, tokenizer).questions) == 2
    with pytest.raises(DataError, match="task who: question 2: the longest of its 2 answers has .*_length 16") as caught:
        tokenize_task(Task("who", rows, "choice", bare_prompt="Answer:"), 16, tokenizer)
    assert caught.value.fix == "raise data.max_length"


def test_of_several_right_answers_the_best_known_counts(loaded):
    model, tokenizer = loaded
    examples = tuple(Example(prompt, options[0], options=options) for prompt, options in ROWS[:3])
    task = Task("task", examples, "closed_book", 8, stops="\n.,")
    asked = tokenize_task(task, 128, tokenizer)
    scored, predictions = score_task(model, asked, tokenizer, CPU)
    for example, prediction, question in zip(examples, predictions, asked.questions, strict=True):
        values = [read_one(model, tokenizer, example.prompt, option, 128) for option in example.options]
        assert prediction.nll * prediction.num_tokens == pytest.approx(-max(values), rel=1e-4)
        assert prediction.num_tokens == question.nums_scored[values.index(max(values))]
        # Greedy decoding to the end of all tokens, cut as text.
        ids = tokenizer(example.prompt)["input_ids"]
        with torch.no_grad():
            for _ in range(asked.num_new_tokens):
                token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        assert prediction.prediction == cut_answer(whole[whole.index(example.prompt) + len(example.prompt) :], "\n.,")
    assert scored.lenient >= scored.score


def test_a_token_stops_only_where_nothing_is_lost(loaded):
    _, tokenizer = loaded
    backend = get_backend(tokenizer)
    stops = find_stops("\n.,", tokenizer)
    texts = {backend.decode([token]) for token in stops}
    assert {".", ","} <= {text.strip(" ") for text in texts}
    assert {cut_answer(text, "\n.,") for text in texts} == {""}
    assert cut_answer(" St. Louis, Missouri", "\n.,") == "St"
    assert cut_answer(" kept as it is\n", "") == " kept as it is\n"
