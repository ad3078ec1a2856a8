"""Several runs beside one another, and the tables as LaTeX."""

import json
import re

import pytest
from written_runs import FACTS, SKILL, complete_round, fail_verification, write_run

from hftcli.comparing.forgetting import assemble_matrix
from hftcli.errors import InputError
from hftcli.reporting.index import list_lines, write_index
from hftcli.reporting.latex import escape, make_tables
from hftcli.reporting.page import write_page
from hftcli.runs.files import write_model
from hftcli.runs.run import Run


@pytest.fixture
def runs(tmp_path):
    found = [Run(write_run(tmp_path / name, setting)) for name, setting in (("half_a", "train.seed=1"), ("b", "train.seed=2"))]
    for run in found:
        complete_round(run, 0)
    write_page(found[0], found[0].page_path)
    return found


def test_a_line_says_what_was_learned_and_forgotten(runs, tmp_path):
    first, second = list_lines([run.folder for run in runs], tmp_path / "pages" / "index.html")
    assert first.learned.startswith(f"{SKILL} +90.0 points")
    assert first.forgot.startswith(f"{FACTS} -30.0 points")
    assert (first.page, second.page) == ("../half_a/report.html", "")


def test_the_page_leads_to_those_of_its_runs(runs, tmp_path):
    path = tmp_path / "pages" / "index.html"
    write_index(list_lines([run.folder for run in runs], path), path)
    text = path.read_text()
    assert re.findall(r'href="([^"]*)"', text) == ["../half_a/report.html"]
    assert (path.parent / "../half_a/report.html").resolve().exists()
    assert "default-src 'none'" in text


def test_a_run_that_was_not_verified_says_so(runs, hft, tmp_path):
    bad = runs[1]
    fail_verification(bad.rounds[0])
    lines = list_lines([run.folder for run in runs])
    assert [line.verified for line in lines] == [True, False]
    write_index(lines, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text().count("NOT VERIFIED") == 1
    told = hft("report", *(run.folder for run in runs)).stdout
    assert told.count("NOT VERIFIED") == 1
    assert f"NOT VERIFIED: see hft verify {lines[1].name}" in told
    found = [json.loads(hft("report", run.folder, "--json").stdout)["verified"] for run in runs]
    assert found == [True, False]


def test_a_sequence_that_was_not_verified_says_so(hft, tmp_path):
    tasks = ("tinyworld/topic", SKILL)
    rows = ({tasks[0]: 0.0, SKILL: 0.1}, {tasks[0]: 0.8, SKILL: 0.1}, {tasks[0]: 0.5, SKILL: 0.9})
    run = Run(write_run(tmp_path / "run", rows=rows, tasks=tasks, objective="continual"))
    write_model(run.matrix_path, assemble_matrix(run))
    assert json.loads(hft("report", run.folder, "--json").stdout)["verified"] is True
    assert json.loads(hft("report", run.matrix_path, "--json").stdout)["verified"] is None
    fail_verification(run.rounds[1])
    assert json.loads(hft("report", run.folder, "--json").stdout)["verified"] is False
    assert f"NOT VERIFIED: {run.rounds[1].name}; see hft verify" in hft("report", run.folder).stdout


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="is neither a run nor a round"):
        list_lines([tmp_path])


def test_latex_escapes_what_it_would_read(runs):
    assert escape("50 % of a_b & {c}") == r"50 \% of a\_b \& \{c\}"
    text = make_tables([run.folder for run in runs])
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"\caption{half\_a: scores" in text
    assert r"tinyworld/facts & 100.0 & 70.0 & $-$30.0 & " in text


def test_latex_of_a_matrix_has_a_row_per_model(tmp_path):
    tasks = ("tinyworld/topic", SKILL)
    rows = ({tasks[0]: 0.0, SKILL: 0.1}, {tasks[0]: 0.8, SKILL: 0.1}, {tasks[0]: 0.5, SKILL: 0.9})
    run = Run(write_run(tmp_path / "run", rows=rows, tasks=tasks, objective="continual"))
    write_model(run.matrix_path, assemble_matrix(run))
    text = make_tables([run.folder])
    assert r"after topic & \textbf{80.0} & 10.0 \\" in text
    assert r"after skill & 50.0 & \textbf{90.0} \\" in text
    assert "OP 70.0, BWT $-$30.0" in text


@pytest.mark.parametrize("option", [("--json",), ("--figure", "f.svg"), ("--html", "p.html"), ("--lost",)])
def test_latex_refuses_what_it_would_not_write(hft, tmp_path, option):
    assert "--latex prints tables and nothing else" in hft("report", tmp_path, "--latex", *option, code=2).stderr
