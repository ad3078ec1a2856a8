"""The standard streams: a prompt names the labels."""

import pytest
from tasks.written_tasks import find, write_rows

from hftcli.errors import DataError
from hftcli.tasks import load_task


def test_a_standard_prompt_names_the_labels(tmp_path):
    write_rows(tmp_path / "TC" / "agnews" / "labels.json", ["World", "Sports"])
    write_rows(tmp_path / "TC" / "agnews" / "test.json", [{"sentence": "Kessel wins.", "label": "Sports"}])
    write_rows(tmp_path / "COPA" / "COPA" / "train.json", [{"sentence": "Choose A or B.", "label": "A"}])
    task = load_task("standard/agnews", str(tmp_path))
    (example,) = task.examples
    assert example.prompt == (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports \nKessel wins.\nAnswer:"
    )
    assert example.prompt[slice(*example.body)] == "Kessel wins."
    assert (example.answer, task.metric) == ("Sports", "normalized_match")
    assert load_task("standard/COPA", str(tmp_path), "train").examples[0].prompt == "Choose A or B.\nAnswer:"
    with pytest.raises(DataError, match=r"TC/yahoo/train\.json is missing"):
        find("standard", str(tmp_path), order="3")
