"""What a newcomer sees: one command, no recipe, no network."""

import json

import pytest

from hftcli.runs.run import Round


def test_the_quick_start_learns_and_shows_what_was_known(hft, tmp_path):
    shown = hft("sft", "--output", tmp_path / "run").stdout
    assert "what the model knew" in shown
    assert "bit-identical to the start" in shown
    scores = Round(tmp_path / "run" / "rounds" / "00-sft").read_scores()
    for wording in ("facts", "facts-reworded"):
        assert scores.before[f"tinyworld/{wording}"].score >= 0.95
    assert scores.before["tinyworld/skill"].score <= 0.05
    assert scores.after["tinyworld/skill"].score >= 0.8
    hft("verify", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["rounds"]["00-sft"]["data"]["sources"][0]["fingerprint"]


@pytest.mark.slow
def test_full_fine_tuning_forgets_much_of_the_world(hft, settings, tmp_path):
    hft("sft", "--output", tmp_path / "run", *settings({"freeze.trainable_fraction": 1.0}))
    scores = Round(tmp_path / "run" / "rounds" / "00-sft").read_scores()
    assert scores.after["tinyworld/facts"].score <= 0.6
    assert scores.after["tinyworld/skill"].score >= 0.9
