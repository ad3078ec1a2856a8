"""How questions are put: shots of a task's own rows, and turns of a chat."""

import json

import pytest

from hftcli.errors import InputError, ModelError
from hftcli.recipe.asking import AskingSection
from hftcli.tasks import load_task
from hftcli.tasks.asking import check_acting, put_task
from hftcli.tasks.examples import Example, Task


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def planets(tmp_path) -> str:
    names = ("Mars", "Venus", "Saturn")
    return write(tmp_path, *({"question": f"Which is {name}?", "choices": [name, "Titan"], "answer": 0} for name in names))


def test_shots_are_the_first_other_rows(planets):
    task = put_task(planets, None, 2, AskingSection(shots=2), has_template=False)
    first, second = task.examples
    venus, saturn, mars = (f"Question: Which is {name}?\nAnswer:" for name in ("Venus", "Saturn", "Mars"))
    assert first.prompt == f"{venus} Venus\n\n{saturn} Saturn\n\n{mars}"
    assert second.text.startswith("Question: Which is Mars?\nAnswer: Mars\n\nQuestion: Which is Saturn?")
    assert task.way == "plain, 2 shots"
    with pytest.raises(InputError, match="has 2 other rows to answer before a question, not 3"):
        put_task(planets, None, 2, AskingSection(shots=3), has_template=False)


def test_files_are_asked_in_turns_where_there_is_a_template(planets):
    task = put_task(planets, None, 1, AskingSection(shots=1), has_template=True)
    (example,) = task.examples
    assert example.prompt == [
        {"role": "user", "content": "Question: Which is Venus?\nAnswer:"},
        {"role": "assistant", "content": "Venus"},
        {"role": "user", "content": "Question: Which is Mars?\nAnswer:"},
    ]
    assert (example.answer, example.options) == ("Mars", ("Mars", "Titan"))
    assert (task.bare_prompt, task.way) == ([{"role": "user", "content": "Answer:"}], "chat, 1 shots")
    assert put_task(planets, None, 1, AskingSection(chat=False), has_template=True).way == "plain"
    with pytest.raises(ModelError, match="to be asked through the chat template, and the tokenizer has none"):
        put_task(planets, None, 1, AskingSection(chat=True), has_template=False)


def test_mmlu_s_shots_are_on_its_subject(tmp_path):
    subjects = ("anatomy", "virology", "anatomy")
    rows = [{"subject": name, "question": f"Q{i}", "choices": ["x", "y"], "answer": i % 2} for i, name in enumerate(subjects)]
    last = put_task(write(tmp_path, *rows), None, None, AskingSection(shots=0), False).examples[-1]
    path = write(tmp_path, rows[0], rows[2])
    (_, shot) = put_task(path, None, None, AskingSection(shots=1), False).examples
    intro = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert shot.prompt == f"{intro}Q0\nA. x\nB. y\nAnswer: A\n\n{last.text.removeprefix(intro)}"
    with pytest.raises(InputError, match="0 other rows on virology"):
        put_task(write(tmp_path, *rows), None, None, AskingSection(shots=1), False)


def test_a_benchmark_s_shots_are_training_rows_asked_as_they_are_trained():
    task = put_task("tinyworld/sum", None, 1, AskingSection(shots=1, max_new_tokens=3), has_template=True)
    (example,) = task.examples
    assert (task.way, task.max_new_tokens, task.is_cut_given) == ("plain, 1 shots", 3, True)
    assert example.text.count("Answer:") == 2
    first, last = example.body
    assert example.text[:first].count("Answer:") == 1
    assert example.text[last:] == "\nAnswer:"


def test_what_has_no_answer_does_not_stand_before_a_question(tmp_path, monkeypatch):
    path = write(tmp_path, *({"text": "Once upon", "continuation": f" a time {number}"} for number in range(3)))
    with pytest.raises(InputError, match="no answered questions that could stand before others"):
        put_task(path, None, None, AskingSection(shots=1), False)
    ruled = Task("rules", tuple(Example(f"Shout {number}.", "") for number in range(3)), has_answers=False)
    monkeypatch.setattr("hftcli.tasks.asking.load_task", lambda *_: ruled)
    with pytest.raises(InputError, match="no answered questions that could stand before others"):
        put_task(path, None, None, AskingSection(shots=1), False)


def test_how_a_text_goes_on_is_read_as_it_stands(tmp_path):
    path = write(tmp_path, {"text": "Once upon", "continuation": " a time"})
    for asking in (AskingSection(chat=True), AskingSection(generate=False)):
        task = put_task(path, None, None, asking, has_template=True)
        assert task.examples == (Example("Once upon", " a time", options=(" a time",)),)
        assert task.max_new_tokens is None


@pytest.mark.parametrize(
    ("asking", "temperature", "said", "acts_on"),
    [
        ({"chat": True}, None, r"--chat \(eval.chat in a recipe\)", "planets"),
        ({"chat": False}, None, r"--no-chat \(eval.chat in a recipe\)", "planets"),
        ({"max_new_tokens": 3}, None, "--max-new-tokens", "tinyworld/sum"),
        ({}, 0.5, "eval.temperature", "tinyworld/sum"),
    ],
)
def test_a_setting_must_change_how_something_is_asked(planets, asking, temperature, said, acts_on):
    facts, other = (load_task(name) for name in ("tinyworld/facts", planets if acts_on == "planets" else acts_on))
    with pytest.raises(InputError, match=f"{said}.* would have no effect: each of tinyworld/facts"):
        check_acting([facts], AskingSection(**asking), temperature)
    check_acting([facts, other], AskingSection(**asking), temperature)
    check_acting([facts], AskingSection(), 0.0)


def test_programs_need_leave(shared):
    path = str(shared / "data" / "eval" / "humaneval.jsonl")
    with pytest.raises(InputError, match="runs the programs that the model writes"):
        put_task(path, None, None, AskingSection(), has_template=True)
    assert put_task(path, None, 1, AskingSection(allow_code=True), has_template=True).way == "plain"


def test_where_nothing_is_written_the_right_answers_are_read(tmp_path, planets):
    """Of a task with a metric of its own the letter counts, of several right answers the first; choices are as they were."""
    known = write(tmp_path, {"question": "Which star is near?", "answers": ["The Sun", "Sun"]})
    task = put_task(known, None, None, AskingSection(generate=False), has_template=False)
    (example,) = task.examples
    assert (task.metric, task.max_new_tokens, task.way) == ("exact_match", None, "plain, nothing written")
    assert (example.answer.strip(), example.options) == ("The Sun", ())
    (tmp_path / "more").mkdir()
    planets = write(tmp_path / "more", {"question": "Which?", "choices": ["Mars", "Titan"], "answer": 0})
    assert put_task(planets, None, 1, AskingSection(generate=False), False).examples[0].options == (" Mars", " Titan")
    program = {
        "task_id": "t",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": " pass",
        "test": "def check(f): ...",
    }
    with pytest.raises(InputError, match="has no right answers to read") as caught:
        put_task(write(tmp_path, program), None, None, AskingSection(generate=False, allow_code=True), False)
    assert "eval.generate: true" in caught.value.fix
    with pytest.raises(ValueError, match="generate: false writes nothing"):
        AskingSection(generate=False, max_new_tokens=3)
