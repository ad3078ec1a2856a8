"""Places on the disk, to their owner and to others."""

from pathlib import Path

import pytest

from hftcli.reporting.places import hide_folders, show_place, show_places


def test_what_lies_here_is_shown_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show_place(tmp_path / "runs" / "mine") == "runs/mine"
    assert show_place(Path("runs/mine")) == "runs/mine"
    assert show_place(tmp_path.parent / "other") == str(tmp_path.parent / "other")
    assert show_places(f"model {tmp_path}/runs/mine") == "model runs/mine"


def test_a_path_that_is_known_may_have_blanks_and_brackets():
    path = "/mnt/c/Users/Jane Doe/My Drive (old)/rows.jsonl"
    text = f"path: {path}\nagain: /mnt/c/Users/Jane Doe/My\n    Drive (old)/rows.jsonl, 1/2"
    assert hide_folders(text, [path, "1/2"]) == "path: rows.jsonl\nagain: rows.jsonl, 1/2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("path: /home/ada/data/my.jsonl", "path: my.jsonl"),
        ("command /usr/bin/python -m hftcli sft", "command python -m hftcli sft"),
        ("'/home/ada/rows.json' (0f)", "'rows.json' (0f)"),
        ("~/rows/my.jsonl", "my.jsonl"),
        ("see https://example.org/a/b/c", "see https://example.org/a/b/c"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("runs/my/rounds/00-sft", "runs/my/rounds/00-sft"),
        ("10 tokens/s and 1/2", "10 tokens/s and 1/2"),
    ],
)
def test_others_see_names_alone(text, shown):
    assert hide_folders(text) == shown
