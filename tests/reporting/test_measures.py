"""The matrix on a terminal and as JSON: every number, whole."""

import json

from comparing.matrices import ROWS, TASKS, make_rows, name_tasks, write
from typer.testing import CliRunner

from hftcli.commands.cli import app
from hftcli.comparing.forgetting import compute_metrics


def report(*arguments: object, num_columns: int = 60) -> str:
    terminal = {"COLUMNS": str(num_columns)}
    done = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False, env=terminal)
    assert done.exit_code == 0
    return done.stdout


def test_json_has_the_metrics_of_every_kind(tmp_path):
    matrix = {"tasks": TASKS, "scores": ROWS, "nll": ROWS, "general": {"facts": [1.0, None, 0.5, 0.25]}}
    found = json.loads(report(write(tmp_path, matrix), "--json"))
    strict = compute_metrics(TASKS, ROWS).model_dump()
    assert {name: found[name] for name in strict} == strict
    assert found["nll"] == compute_metrics(TASKS, ROWS, lower_is_better=True).model_dump()
    assert found["lenient"] is None
    assert found["general"] == {"facts": {"base": 1.0, "last": 0.25, "change": -0.75}}
    assert (found["num_rounds"], found["is_finished"]) == (3, True)


def test_tables_show_every_number_whole_on_a_narrow_terminal(tmp_path):
    tasks, rows = name_tasks(15), make_rows(15, seed=3)
    text = report(write(tmp_path, {"tasks": tasks, "scores": rows, "nll": rows, "general": {"facts": [0.125] * 16}}))
    for row in rows:
        points = [f"{100 * score:.1f}" for score in row]
        nats = [f"{score:.3f}" for score in row]
        lines = [line.replace("│", " ").split() for line in text.splitlines()]
        assert any(line[-15:] == points for line in lines)
        assert any(line[-15:] == nats for line in lines)
    metrics = compute_metrics(tasks, rows)
    assert f"{100 * metrics.bwt:+.1f}" in text
    assert "…" not in text
    assert "rounds are there" not in text


def test_metrics_are_shown_with_their_definitions(tmp_path):
    text = report(write(tmp_path, {"tasks": TASKS, "scores": ROWS, "lenient": ROWS}), num_columns=200)
    line = next(line for line in text.splitlines() if "Backward transfer" in line).replace("│", " ").split()
    assert line[:3] == ["bwt", "-7.5", "-7.5"]
    assert "lenient scores: the same" in text
    assert " ".join(line[3:]) == "Backward transfer: mean over i < T of R[T][i] - R[i][i]"


def test_tables_of_an_unfinished_run_say_so(tmp_path):
    text = report(write(tmp_path, {"tasks": TASKS, "scores": [[0.1, None, 0.3], [0.6, None, None]]}))
    assert "1 of 3 rounds are there" in text
    assert "60.0" in text
