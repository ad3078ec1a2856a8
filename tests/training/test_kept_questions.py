"""A task that is edited while its run is under way is refused before training, and does not take the report away."""

import json
from pathlib import Path

import pytest
from models.small_models import TOKENIZER
from written_runs import FACTS, complete_round, make_predictions, write_run

from hftcli.comparing.answers import read_answers
from hftcli.comparing.items import read_item_changes
from hftcli.errors import InputError
from hftcli.measuring.questions import TokenizedTask, tokenize_task
from hftcli.reporting.page import write_page
from hftcli.runs.run import Round, Run
from hftcli.tasks import load_task
from hftcli.training.kept_questions import check_questions, list_questions


@pytest.fixture
def ask(tmp_path):
    def tokenize(*rows: tuple[str, str]) -> dict[str, TokenizedTask]:
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps({"question": question, "answers": [answer]}) + "\n" for question, answer in rows))
        return {str(file): tokenize_task(load_task(str(file), None, "test", None), 64, TOKENIZER)}

    return tokenize


ROWS = (("a b", "c"), ("d e", "f"))


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (ROWS, None),
        ((*ROWS, ("g", "h")), "there were 2 questions, and now there are 3"),
        ((ROWS[0], ("d d", "f")), "question 2 is another one than it was"),
        ((("a b", "b"), ROWS[1]), "question 1 is another one than it was"),  # its right answer
    ],
)
def test_other_questions_are_refused(tmp_path, ask, rows, found):
    round_ = Round(tmp_path / "00-sft")
    ((name, task),) = ask(*ROWS).items()
    check_questions(round_, {name: task})  # nothing is kept
    round_.write_predictions("before", name, list_questions(task))
    if found is None:
        check_questions(round_, ask(*rows))
        return
    with pytest.raises(InputError) as caught:
        check_questions(round_, ask(*rows))
    assert caught.value.message.startswith(f"{tmp_path}/mine.jsonl: edited since the run began: {found}")


def make_run(folder: Path) -> tuple[Run, Round]:
    run = Run(write_run(folder))
    complete_round(run, 0)
    return run, run.rounds[0]


def test_the_report_survives_a_task_with_other_questions(tmp_path, caplog):
    run, round_ = make_run(tmp_path / "run")
    assert set(read_answers(run)) == {FACTS}
    round_.write_predictions("after", FACTS, make_predictions(1, 0, 0, 1, 1))
    assert read_item_changes(run) == {}
    assert f"{FACTS}: there were 4 questions, and now there are 5" in caplog.text
    write_page(run, run.page_path)
    assert FACTS.rpartition("/")[2] in run.page_path.read_text()
