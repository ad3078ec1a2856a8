"""Questions lost and won, most surprising first, and how answers look."""

import pytest

from hftcli.comparing.answers import describe_behaviour, has_form, is_refusal, list_changed, measure_repetition
from hftcli.runs.scores import Prediction


def make(index: int, text: str | None, score: float | None, nll: float | None = None, tokens: int = 2, answers=("fox",)):
    return Prediction(
        index=index, prediction=text, score=score, lenient=None, nll=nll, num_tokens=tokens if nll is not None else None,
        question=f"Q{index}", answers=answers,
    )  # fmt: skip


def test_the_most_surprising_come_first():
    before = [make(0, "fox", 1, 0.5), make(1, "fox", 1, 0.1), make(2, "hen", 0, 3.0), make(3, "x", 0.5), make(4, None, 1, 0.1)]
    after = [make(0, "hen", 0, 1.0), make(1, "cat", 0, 4.1), make(2, "fox", 1, 0.5), make(3, "x", 0.5), make(4, None, 1, 9.0)]
    changed = list_changed({"t": (before, after)})
    # Question 1 lost 2 x 4.0 nats, 2 won 2 x 2.5, 0 lost 2 x 0.5; 3 and 4 have the scores that they had.
    assert [(item.index, item.is_lost, item.nats) for item in changed] == [
        (1, True, pytest.approx(8.0)),
        (2, False, pytest.approx(-5.0)),
        (0, True, pytest.approx(1.0)),
    ]
    assert (changed[0].question, changed[0].answers, changed[0].before, changed[0].after) == ("Q1", ("fox",), "fox", "cat")


def test_a_lost_question_whose_answer_became_likelier_comes_late():
    before = [make(0, "fox", 1, 4.0), make(1, "fox", 1, 0.5), make(2, "fox", 1)]
    after = [make(0, "hen", 0, 1.0), make(1, "hen", 0, 1.0), make(2, "hen", 0)]
    assert [item.index for item in list_changed({"t": (before, after)})] == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("As an AI language model, I have no body.", 1),
        ("I’m unable to say.", 1),
        ("The fox cannot fly.", 0),
        ("x" * 300 + " I cannot", 0),
        ("", 0),
    ],
)
def test_refusals(text, refuses):
    assert is_refusal(text, ()) == refuses


@pytest.mark.parametrize(
    ("text", "answers", "form"),
    [
        ("B", ("A",), 1),
        ("B\nBecause", ("A",), 0),
        ("12.5", ("7",), 1),
        ("seven", ("7",), 0),
        ("so\n#### 8", ("way\n#### 7",), 1),
        ("so 8", ("way\n#### 7",), 0),
        ("one line", ("a", "two words"), 1),
        ("two\nlines", ("two words",), 0),
        ("anything", ("two\nlines",), None),
        ("anything", (), None),
    ],
)
def test_form_is_that_of_the_right_answers(text, answers, form):
    assert has_form(text, answers) == form


def test_repetition_by_hand():
    assert measure_repetition("a b c d e", ()) == 0
    assert measure_repetition("a b c d a b c d", ()) == pytest.approx(1 / 5)  # of 5 runs, the last is the first again
    assert measure_repetition("a b", ()) == 0


def test_behaviour_is_of_written_answers():
    before = [make(i, "a fox", 1) for i in range(4)]
    after = [make(i, "I'm sorry." if i < 2 else "a fox\nyes", 0) for i in range(4)]
    traits = {trait.name: trait for trait in describe_behaviour(before, after)}
    assert (traits["length"].before, traits["length"].after, traits["length"].change.mean) == (5, 9.5, 4.5)
    assert (traits["refusals"].before, traits["refusals"].after, traits["refusals"].change.mean) == (0, 0.5, 0.5)
    assert traits["refusals"].change.low < 0.5 < traits["refusals"].change.high
    assert (traits["form kept"].before, traits["form kept"].after) == (1, 0.5)
    assert describe_behaviour([make(0, None, 1)], [make(0, None, 0)]) == []
