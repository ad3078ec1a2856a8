"""Rounds of one run may be computed by other versions of the libraries, as after an upgrade: the card and the page say so."""

from written_runs import complete_round, write_run

from hftcli.reporting.card import make_card
from hftcli.reporting.page import write_page
from hftcli.runs.files import write_model
from hftcli.runs.run import Run

NONE: dict[str, float] = {}


def test_a_round_with_other_versions_is_named(tmp_path):
    run = Run(write_run(tmp_path / "run", rows=(NONE, NONE, NONE), tasks=(None, None)))
    for index, torch in enumerate(("9.8", "9.9")):
        complete_round(run, index)
        round_ = run.rounds[index]
        result = round_.read_result().model_copy(update={"versions": {"torch": torch, "trl": "1.0", "transformers": "5.0"}})
        write_model(round_.result_path, result)
        run.record(round_, result)
    first, last = run.rounds
    assert "torch 9.9, transformers 5.0, trl 1.0; 00-sft with torch 9.8" in make_card(run, last)
    assert "torch 9.8, transformers 5.0, trl 1.0; 01-sft with torch 9.9" in make_card(run, first)
    write_page(run, run.page_path)
    page = run.page_path.read_text()
    assert all(text in page for text in ("versions of 00-sft", "torch 9.8", "versions of 01-sft", "torch 9.9"))
