"""Text of rows and names of files are shown as they stand, whatever rich would make of them."""

import pytest
from rich.text import Text
from written_runs import make_result, make_score

from hftcli.reporting.measures import make_score_table
from hftcli.reporting.terminal import divide_table, make_number_table, print_data, print_whole


def test_special_tokens_and_columns_are_no_markup(capsys):
    data = make_result("0f", None).data
    shown = {"special_tokens": {"[INST]": 3, "[/INST]": 4}, "num_special": 5, "unused_columns": ("[bold]", ":smile:")}
    print_data(data.model_copy(update={**shown, "num_tokens": 10}), {"sequence": [("[INST] a [/INST]", False)]}, as_json=False)
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("[INST] in 3", "[/INST] in 4", "[bold], :smile:", "[INST] a [/INST]"):
        assert text in printed


def test_names_and_titles_of_tables_are_no_markup(capsys):
    name = "runs/[/x] [red]/:smile:.jsonl"
    print_whole(make_score_table({name: make_score(0.5)}, {name: make_score(0.7)}, {}, f"before, {name}, and after"))
    assert capsys.readouterr().out.count(name) == 2


def test_answers_that_were_cut_are_said(capsys):
    before, after = make_score(0.5).model_copy(update={"num_cut": 0}), make_score(0.7).model_copy(update={"num_cut": 3})
    print_whole(make_score_table({"facts": before}, {"facts": after}, {}, "before and after"))
    printed = capsys.readouterr().out
    assert "facts, after: 3 of 100 answers cut before they ended" in printed
    assert "facts, before" not in printed


@pytest.mark.parametrize("width", [20, 200])
def test_a_divided_table_keeps_them(width):
    table = make_number_table("task", "[/a]", "[b]")
    table.add_row("[/INST]", "[1]", Text("[2]"))
    cells = [cell.plain for part in divide_table(table, width) for column in part.columns for cell in column.cells]
    assert sorted(set(cells)) == ["[/INST]", "[1]", "[2]"]
