"""Questions lost and won, and how answers look, on the terminal and on the page."""

import json

from written_runs import FACTS, complete_round, write_run

from hftcli.reporting.answers import print_lost
from hftcli.reporting.page import make_page
from hftcli.reporting.rounds import print_run
from hftcli.runs.run import Run
from hftcli.runs.scores import Prediction


def make_run(folder) -> Run:
    """Two questions: one is lost, by a refusal, and one is won."""
    run = Run(write_run(folder))
    complete_round(run, 0)
    (round_,) = run.rounds
    said = {"before": (("Kessel", 1.0, 0.1), ("Oslo", 0.0, 4.0)), "after": (("I cannot <say>", 0.0, 6.1), ("Rome", 1.0, 1.0))}
    for moment, rows in said.items():
        predictions = [
            Prediction(
                index=index, prediction=text, score=score, lenient=score, nll=nll, num_tokens=2,
                question=f"Where is <{index}>?", answers=(("Kessel", "Rome")[index],),
            )
            for index, (text, score, nll) in enumerate(rows)
        ]  # fmt: skip
        round_.write_predictions(moment, FACTS, predictions)
    return run


def test_lost_and_won_are_printed_with_their_answers(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    print_lost(run, as_json=False)
    text = capsys.readouterr().out
    lost, won = text.split("1 questions won")
    assert "1 questions lost, those first whose right answer became most unlikely" in lost
    assert f"{FACTS}, question 1: 100.0 to 0.0 points, right answer +12.000 nats\nWhere is <0>?" in lost
    assert "right   Kessel\n  before  Kessel\n  after   I cannot <say>" in lost
    assert f"{FACTS}, question 2: 0.0 to 100.0 points, right answer -6.000 nats" in won
    print_lost(run, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [item["question"] for item in (*found["lost"], *found["won"])] == ["Where is <0>?", "Where is <1>?"]


def test_the_page_and_the_tables_show_how_answers_look(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = make_run(tmp_path / "run")
    page = make_page(run)
    assert "Questions lost and won" in page
    assert "I cannot &lt;say&gt;" in page
    assert "<summary>tinyworld/facts: 1 lost</summary>" in page
    assert '<th scope="row">tinyworld/facts</th><td>refusals</td><td>0.0</td><td>50.0</td>' in page
    print_run(run)
    assert "repeated text" in capsys.readouterr().out
