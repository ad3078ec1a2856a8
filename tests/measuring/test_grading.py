"""Every right answer, as a perfect model writes it, is right; what cannot be is named with its reason."""

import json
from dataclasses import replace

import pytest
import torch
from methods.rounds import START, make_spec
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoTokenizer

from hftcli.data.tokens import ignore_progress
from hftcli.errors import DataError
from hftcli.measuring.asking import read_answers
from hftcli.measuring.grading import grade_answer
from hftcli.measuring.judging import score_task
from hftcli.measuring.questions import TokenizedTask, add_ends, report_faults, tokenize_task
from hftcli.measuring.scoring import Examination, prepare_exam
from hftcli.recipe.asking import AskingSection
from hftcli.recipe.sections import DataSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Run
from hftcli.runs.spec import Scoring
from hftcli.tasks import Task, list_tasks, load_task
from hftcli.tasks.examples import Example
from hftcli.training.reading import read_assignment, tokenize_rows

CPU = torch.device("cpu")
EOS = AutoTokenizer.from_pretrained(START).eos_token


def find_faults(tokenizer, *examples: Example, max_length: int = 256, **asking: object) -> dict[int, str]:
    return tokenize_task(Task("t", examples, **{"max_new_tokens": 8} | asking), max_length, tokenizer).faults


@pytest.mark.parametrize("name", list_tasks())
def test_shipped_tasks_can_be_answered(embedded, name):
    _, tokenizer = embedded
    assert tokenize_task(load_task(name), 256, tokenizer).faults == {}


@pytest.mark.parametrize(
    "answer", ["3.14", "J. K. Rowling", "1,000", "Washington, D.C.", "A", "the", "?", ".NET", "fox</s>", "A fox, the red one."]
)
def test_right_answers_of_closed_books_count(shared, answer):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    row = Example("Question: what?\nAnswer:", f" {answer}", options=(f" {answer}",))
    assert find_faults(tokenizer, row, metric="closed_book", stops="\n") == {}


@pytest.mark.parametrize("answer", ["", "fox</s>", "fox </s>\n", " fox. The end, of it"])
def test_right_answers_count(shared, answer):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    assert find_faults(tokenizer, Example("Which?\nAnswer:", answer)) == {}


def test_an_answer_gets_as_many_tokens_as_the_right_ones_have(embedded, caplog):
    _, tokenizer = embedded
    examples = (Example("Which?\nAnswer:", " fox"), Example("Which?\nAnswer:", " the old cat" * 5))
    asked = tokenize_task(Task("t", examples, max_new_tokens=2), 256, tokenizer)
    longest = len(tokenizer(" the old cat" * 5, add_special_tokens=False)["input_ids"])
    assert asked.num_new_tokens == longest
    assert f"t: answers are cut at {longest} tokens, as many as the right ones have, and not at 2" in caplog.text
    # A first character is decided by fewer.
    assert tokenize_task(Task("t", examples, "first_character", max_new_tokens=2), 256, tokenizer).num_new_tokens == 2


def test_what_no_model_can_say_is_named(shared, caplog):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    examples = (
        Example("Which?\nAnswer:", " fox"),
        Example("Which?\nAnswer:", "fox</s>hen"),
        Example("Which?\nAnswer:", " x" * 60),
    )
    asked = tokenize_task(Task("t", examples, max_new_tokens=8), 64, tokenizer)
    assert asked.faults == {
        1: "the end token </s> stands in its answer",
        2: "its answer has 60 tokens, and no more than 32 are written",
    }
    report_faults(asked, is_strict=False)
    assert "task t: 2 of 3 questions have a right answer that does not count as right: question 2: the end token" in caplog.text
    with pytest.raises(DataError, match="question 3: its answer has 60 tokens"):
        report_faults(asked, is_strict=True)
    (hen,) = tokenizer("hen", add_special_tokens=False)["input_ids"][-1:]
    assert find_faults(tokenizer, Example("Which?\nAnswer:", " hen")) == {}
    row = tokenize_task(Task("t", (Example("Which?\nAnswer:", " hen"),), max_new_tokens=8), 64, tokenizer)
    assert row.faults == {}
    assert hen in row.rows[0][0]
    assert list(add_ends(row, [hen], tokenizer).faults) == [0]  # a checkpoint that ends at a token of the answer


def test_choices_of_the_same_tokens_are_named(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    tokenizer.backend_tokenizer.normalizer = Sequence([tokenizer.backend_tokenizer.normalizer, Lowercase()])
    rows = Example("Q", " a", options=(" a", " b")), Example("Q", " a", options=(" A", " a"))
    asked = tokenize_task(Task("t", rows, "choice", bare_prompt="Answer:"), 64, tokenizer)
    assert asked.faults == {1: "another choice has the same tokens as the right one"}


def test_what_is_asked_has_the_tokens_of_training(embedded, shared):
    """The blank of `Answer: ` is the first token's of the answer: asked after it, a model that learned it perfectly fails."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    example = Example("Which animal?\nAnswer: ", "fox")
    asked = tokenize_task(Task("t", (example,), max_new_tokens=8), 64, tokenizer)
    (layout,), ((ids, labels),) = asked.layouts, asked.rows
    assert (layout.prompt + layout.answers[0], layout.lead) == (ids, " ")
    assert [label for label in labels if label != -100] == layout.answers[0]
    written = layout.answers[0][:-1]
    assert grade_answer(asked.task, asked.task.examples[0], layout, written, tokenizer).score == 1
    # Without its blank it is another text.
    bare = tokenizer.convert_tokens_to_ids(["fo", "x"])
    assert grade_answer(asked.task, asked.task.examples[0], layout, bare, tokenizer).score == 0


def test_a_blank_that_the_template_prints_is_the_first_token_s_of_the_answer(shared):
    """As Llama 2's: what is asked ends before the token that holds both."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories15M")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    example = Example([{"role": "user", "content": "Which animal?"}], "fox")
    asked = tokenize_task(Task("t", (example,), max_new_tokens=8), 64, tokenizer)
    (layout,), ((ids, labels),) = asked.layouts, asked.rows
    assert tokenizer.decode(ids).endswith("Which animal? [/INST] fox</s>")
    assert (layout.prompt + layout.answers[0], layout.lead) == (ids, " ")
    assert [label for label in labels if label != -100] == layout.answers[0]
    assert tokenizer.convert_ids_to_tokens(layout.answers[0][0]).startswith("\u2581")
    assert asked.faults == {}
    assert grade_answer(asked.task, example, layout, layout.answers[0][:-1], tokenizer).score == 1


def test_a_model_that_learned_a_row_answers_it(shared):
    """Trained on the row as training lays it out, it is right by generation and by likelihood."""
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / "stories15M"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenize_task(Task("t", (Example("Which animal?\nAnswer: ", "fox"),), max_new_tokens=8), 64, tokenizer)
    ((ids, labels),) = asked.rows
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(12):
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    score, (prediction,) = score_task(model, asked, tokenizer, CPU)
    assert (score.score, prediction.prediction, prediction.question) == (1, "fox", "Which animal?\nAnswer: ")
    assert read_answers(model, asked.rows, CPU)[0, 2] == 1


def test_strict_refuses_before_anything_is_asked(tmp_path):
    folder = tmp_path / "animals"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": "Which?", "answer": "fox"}, {"prompt": "Which?", "answer": "fox<|end|>hen"}]
        (folder / f"{split}.json").write_text(json.dumps(rows).replace("<|end|>", EOS))
    examination = Examination(str(START), ("animals",), root=str(tmp_path), max_length=64)
    assert prepare_exam(examination).own["animals"].faults.keys() == {1}
    with pytest.raises(DataError, match="question 2: the end token"):
        prepare_exam(replace(examination, asking=AskingSection(strict=True)))
    spec = make_spec({})
    data, scoring = DataSection(root=str(tmp_path), max_length=64), Scoring(before=("animals",), asking={"strict": True})
    strict = spec.model_copy(update={"data": data, "task": "animals", "scoring": scoring})
    with pytest.raises(DataError, match="question 2: the end token"):
        tokenize_rows(read_assignment(strict), ignore_progress)
    lenient = strict.model_copy(update={"scoring": Scoring(before=("animals",))})
    assert tokenize_rows(read_assignment(lenient), ignore_progress).asked["animals"].faults.keys() == {1}


def test_how_a_recipe_asks_reaches_the_questions(tmp_path):
    path = tmp_path / "planets.jsonl"
    path.write_text("".join(json.dumps({"question": f"Which {n}?", "answers": [f"{n}"]}) + "\n" for n in ("Mars", "Venus")))
    data = DataSection(root=None, max_length=64)

    def ask(**asking: object) -> TokenizedTask:
        scoring = Scoring(before=(str(path),), asking=AskingSection(**asking))
        task = read_assignment(make_spec({}).model_copy(update={"data": data, "task": None, "scoring": scoring}))
        return task.asked[str(path)]

    plain, shot, chat = ask(chat=False), ask(chat=False, shots=1, max_new_tokens=3), ask()
    assert (plain.task.way, shot.task.way, chat.task.way) == ("plain", "plain, 1 shots", "chat")
    assert (plain.num_new_tokens, shot.num_new_tokens) == (32, 3)
    assert len(shot.prompts[0]) > len(plain.prompts[0])
    assert chat.task.examples[0].prompt == [{"role": "user", "content": "Question: Which Mars?\nAnswer:"}]
    assert chat.task.examples[0].options == ("Mars",)
    assert AutoTokenizer.from_pretrained(START).eos_token_id in chat.end_ids
    assert Scoring().asking.chat is False  # what a round of an earlier hft meant


def test_a_run_keeps_how_it_asks(tmp_path):
    run, given = Run(tmp_path), AskingSection(shots=2)
    assert run.settle_asking(given) == given
    round_ = run.round("00-sft")
    round_.folder.mkdir(parents=True)
    write_model(round_.spec_path, make_spec({}))
    assert run.settle_asking(given) == given  # nothing of it is measured
    round_.metrics_path.touch()
    assert run.settle_asking(given) == AskingSection(chat=False)
