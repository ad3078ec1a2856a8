"""`hft advise`: what is refused before anything runs, and a whole search."""

import pytest

from hftcli.commands.advise import read_time
from hftcli.errors import InputError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0)])
def test_times_are_read(text, seconds):
    assert read_time(text) == seconds


@pytest.mark.parametrize("key", ["method.anchor.strength", "method.self_replay", "freeze.seed"])
def test_what_is_searched_for_cannot_be_set(hft, tmp_path, key):
    options = ("--model", "tinyworld", "--data", "my.jsonl", "--set", f"{key}=1", "--output", tmp_path)
    assert f"--set {key}: hft advise sets it" in hft("advise", *options, code=2).stderr


def test_a_revision_is_given_with_the_model(hft, tmp_path):
    """What it writes of itself, and how its loss is asked, are of the model that is given."""
    options = ("--model", "owner/name", "--data", "my.jsonl", "--set", "model.revision=old", "--output", tmp_path)
    said = hft("advise", *options, code=2).stderr
    assert "--set model.revision: hft advise sets it" in said
    assert "--model owner/name@REVISION" in said


@pytest.mark.parametrize("text", ["30", "m", "0m", "-3m", "3 days"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InputError, match="is no time"):
        read_time(text)
