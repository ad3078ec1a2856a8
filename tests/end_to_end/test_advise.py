"""`hft advise` as a command: what is refused before anything runs, and a whole search on the embedded model."""

import json

import pytest
import yaml


@pytest.fixture
def files(tmp_path, monkeypatch):
    from hftcli import PACKAGE

    monkeypatch.chdir(tmp_path)
    world = PACKAGE / "tinyworld"
    skill = (world / "skill" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{"messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}]} for row in facts[:40]]
    (tmp_path / "new.jsonl").write_text("\n".join(skill) + "\n")
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return [
        "--model",
        "tinyworld",
        "--data",
        "new.jsonl",
        "--keep",
        "kept.jsonl",
        "--lose-at-most",
        "0.1",
        "--output",
        "advice",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--time", "never"], "--time never is no time"),
        (["--set", "freeze.seed=1"], "--set freeze.seed: hft advise sets it"),
        (["--set", "train.seed=1"], "--set train.seed: hft advise sets it"),
        (["--set", "train={bf16: false}"], "--set train: hft advise sets it, or a key in it"),
        (["--keep", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)
def test_what_cannot_be_searched_is_refused(hft, files, given, said, tmp_path):
    assert said in hft("advise", *files, *given, code=2).stderr
    assert not list(tmp_path.glob("advice/*-*"))  # no run


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_search_ends_in_a_recipe_that_does_what_was_said(hft, files, tmp_path):
    done = hft("advise", *files, "--time", "12m", "--seeds", "2", "--json")
    advice = json.loads(done.stdout)
    assert advice["best"]["learning"] > 0
    assert advice["num_seeds"] == 2
    assert f"{advice['learning']['mean']:.3f}" in advice["sentence"]
    assert {arm["candidate"]["arm"] for arm in advice["arms"]} == {"full", "half", "quiet", "full + replay", "quiet + replay"}
    recipe = yaml.safe_load((tmp_path / "advice" / "recipe.yaml").read_text())
    assert recipe["stop"]["max_forgetting"] == 0.1
    assert (tmp_path / "advice" / "advice.html").exists()
    hft("sft", "--recipe", "advice/recipe.yaml")
    (scores,) = (tmp_path / "advice" / "run").glob("rounds/*/scores.json")
    found = json.loads(scores.read_text())
    (known,) = (name for name in found["before"] if name.endswith("known.jsonl"))
    assert found["after"][known]["nll"] - found["before"][known]["nll"] <= 0.1 + 1e-9
    again = hft("advise", *files, "--time", "12m", "--seeds", "2", "--json")
    assert json.loads(again.stdout) == advice  # every run was there
