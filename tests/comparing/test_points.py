"""What a run learned and what it lost, read off its files."""

import json

import pytest
import yaml
from written_runs import FACTS, REWORDED, SKILL, fail_verification, make_score, write_made, write_run

from hftcli.comparing.comparison import compare_runs
from hftcli.comparing.points import read_point
from hftcli.errors import InputError, RecipeError
from hftcli.recipe.loading import load_recipe
from hftcli.reporting.headline import list_changes
from hftcli.runs.files import write_model
from hftcli.runs.run import Run
from hftcli.runs.scores import HELD_OUT, CurvePoint, PairScore, PairScores
from hftcli.runs.spec import HubStart


def test_single_round_learns_what_it_trained_on_and_loses_the_rest(tmp_path):
    rows = ({FACTS: 1.0, REWORDED: 0.8, SKILL: 0.1}, {FACTS: 0.7, REWORDED: 0.6, SKILL: 0.9})
    point = read_point(write_run(tmp_path / "run", rows=rows))
    assert point.learned == {SKILL: pytest.approx(0.8)}
    assert point.lost == pytest.approx({FACTS: 0.3, REWORDED: 0.2})
    assert point.learning == pytest.approx(0.8)
    assert point.forgetting == pytest.approx(0.25)


def test_a_task_of_the_trained_rows_is_learned_whatever_they_are_called(tmp_path):
    run = write_run(tmp_path / "run", "data.path=rows/train.json", learned=(SKILL,))
    point = read_point(run)
    assert point.learned == {SKILL: pytest.approx(0.9)}
    assert point.lost == {FACTS: pytest.approx(0.3)}
    assert [change.task for change in list_changes(Run(run)) if change.is_learned] == [SKILL]


def test_user_says_what_measures_learning(tmp_path):
    run = write_run(tmp_path / "run", "data.path=my.jsonl")
    with pytest.raises(InputError, match=r"none of its tasks \(tinyworld/facts, tinyworld/skill\) asks for what was trained"):
        read_point(run)
    assert read_point(run, [SKILL]).learned == {SKILL: pytest.approx(0.9)}
    with pytest.raises(InputError, match="--learned trace/FOMC is none of its tasks"):
        read_point(run, ["trace/FOMC"])


def test_preferences_are_learned_where_pairs_are_held_out(tmp_path):
    rates = (
        PairScore(
            reward_accuracy=rate, reward_accuracy_error=0.0, reward_margin=1.0, likelihood_accuracy=1.0, kl=0.0, num_pairs=9
        )
        for rate in (0.5, 0.9)
    )
    pairs = PairScores(before=next(rates), after=next(rates))
    rows = ({FACTS: 1.0}, {FACTS: 0.9})
    point = read_point(write_run(tmp_path / "run", rows=rows, objective="dpo", pairs=pairs))
    assert point.learned == {"reward accuracy": pytest.approx(0.4)}
    assert point.lost == {FACTS: pytest.approx(0.1)}


def test_likelihood_measures_what_has_no_score(tmp_path):
    """Held-out rows are learned; of a task that has both, the likelihood counts."""
    rows = (
        {HELD_OUT: make_score(None, 2.5), FACTS: make_score(0.9, 1.0)},
        {HELD_OUT: make_score(None, 2.1), FACTS: make_score(0.9, 1.25)},
    )
    runs = [write_run(tmp_path / str(seed), "data.path=my.jsonl", f"freeze.seed={seed}", rows=rows) for seed in (1, 2)]
    point = read_point(runs[0], by="nll")
    assert point.learned == {HELD_OUT: pytest.approx(0.4)}
    assert point.lost == {FACTS: pytest.approx(0.25)}
    with pytest.raises(InputError, match=r"none of its tasks \(tinyworld/facts\) asks for what was trained") as caught:
        read_point(runs[0])
    assert "--by nll" in caught.value.fix


def test_made_model_has_no_likelihood_of_held_out_rows(tmp_path):
    rows = tuple({HELD_OUT: make_score(None, nll), FACTS: make_score(0.9)} for nll in (2.5, 2.1))
    run = write_run(tmp_path / "run", rows=rows)
    made = write_made(tmp_path / "mean", run, {FACTS: 0.9}, kind="interpolation", weight=0.5)
    with pytest.raises(InputError, match="hft eval asks no held-out rows"):
        read_point(made, by="nll")


def test_a_run_that_was_not_verified_is_no_point(tmp_path):
    """What moved of its frozen weights is no part of what its method learns and loses; nor is a model that is made of it."""
    run = write_run(tmp_path / "run")
    made = write_made(tmp_path / "mean", run, {FACTS: 0.9, SKILL: 0.5}, kind="interpolation", weight=0.5)
    fail_verification(Run(run).rounds[0])
    for folder in (run, made):
        with pytest.raises(InputError, match=f"{run} is not verified: what had to stay in 00-sft moved") as caught:
            read_point(folder)
        assert f"hft verify {run}" in caught.value.fix


def test_two_commits_of_a_model_of_the_hub_are_two_starts(tmp_path):
    """One id, which was another model when the second run began; the third began from the first's."""
    runs = [write_run(tmp_path / str(seed), "model.path=owner/name", f"freeze.seed={seed}") for seed in (1, 2, 3)]
    for run, commit in zip(runs, ("0a", "1b", "0a"), strict=True):
        write_model(Run(run).rounds[0].start_path, HubStart(commit=commit))
    with pytest.raises(InputError, match=f"{runs[1]} has other model than {runs[0]}: owner/name@1b; not owner/name@0a"):
        compare_runs(runs)
    assert len(compare_runs([runs[0], runs[2]]).methods) == 1


def test_sequence_counts_what_each_task_gained_and_what_was_lost_since(tmp_path):
    """By hand: topic gains 0.6, reverse 0.5 over the base; since then topic lost 0.2, and the facts lost 0.3."""
    topic, reverse = "tinyworld/topic", "tinyworld/reverse"
    rows = (
        {topic: 0.1, reverse: 0.2, FACTS: 1.0},
        {topic: 0.7, reverse: 0.3, FACTS: 0.9},
        {topic: 0.5, reverse: 0.7, FACTS: 0.7},
    )
    run = write_run(tmp_path / "run", rows=rows, tasks=(topic, reverse), objective="continual")
    point = read_point(run)
    assert point.learned == pytest.approx({topic: 0.6, reverse: 0.5})
    assert point.lost == pytest.approx({topic: 0.2, FACTS: 0.3})
    with pytest.raises(InputError, match="no effect on a run of several tasks"):
        read_point(run, [topic])


def test_curve_of_a_sequence_adds_up_what_each_round_lost_by_then(tmp_path):
    """By hand. By the first points topic has gained 0.4, reverse 0.3; the facts lost 0.06 + 0.05, topic 0.15. By the second it
    is what the run's ends say.
    """
    topic, reverse = "tinyworld/topic", "tinyworld/reverse"
    rows = (
        {topic: 0.1, reverse: 0.2, FACTS: 1.0},
        {topic: 0.7, reverse: 0.3, FACTS: 0.9},
        {topic: 0.5, reverse: 0.7, FACTS: 0.7},
    )
    run = write_run(tmp_path / "run", rows=rows, tasks=(topic, reverse), objective="continual")
    assert read_point(run).trail == ()
    points = (
        ({topic: 0.5, FACTS: 0.94}, {topic: 0.7, FACTS: 0.9}),
        ({reverse: 0.5, topic: 0.55, FACTS: 0.85}, {reverse: 0.7, topic: 0.5, FACTS: 0.7}),
    )
    for round_, found in zip(Run(run).rounds, points, strict=True):
        measured = tuple(
            CurvePoint(step=step, scores={name: make_score(value) for name, value in point.items()})
            for step, point in enumerate(found, start=1)
        )
        write_model(round_.scores_path, round_.read_scores().model_copy(update={"points": measured}))
    point = read_point(run)
    assert point.trail == (
        (pytest.approx((0.4 + 0.3) / 2), pytest.approx((0.06 + 0.05 + 0.15) / 2)),
        (pytest.approx(point.learning), pytest.approx(point.forgetting)),
    )


def test_a_task_of_the_sequence_that_is_asked_before_its_round_is_not_lost_in_it(tmp_path):
    """By hand: reverse falls from 0.2 to 0.1 while topic is trained, which its gain of 0.5 over the base has in it already."""
    topic, reverse = "tinyworld/topic", "tinyworld/reverse"
    rows = (
        {topic: 0.1, reverse: 0.2, FACTS: 1.0},
        {topic: 0.7, reverse: 0.1, FACTS: 0.9},
        {topic: 0.5, reverse: 0.7, FACTS: 0.7},
    )
    run = write_run(tmp_path / "run", rows=rows, tasks=(topic, reverse), objective="continual")
    for round_, found in zip(Run(run).rounds, rows[1:], strict=True):
        measured = (CurvePoint(step=1, scores={name: make_score(value) for name, value in found.items()}),)
        write_model(round_.scores_path, round_.read_scores().model_copy(update={"points": measured}))
    point = read_point(run)
    assert point.learned == pytest.approx({topic: 0.6, reverse: 0.5})
    assert point.trail == ((pytest.approx(point.learning), pytest.approx(point.forgetting)),)


def test_made_models_stand_beside_the_runs_that_they_are_made_of(tmp_path):
    run = write_run(tmp_path / "run", "freeze.trainable_fraction=1.0")
    made = write_made(tmp_path / "mean", run, {FACTS: 0.9, SKILL: 0.5}, kind="interpolation", weight=0.5)
    point = read_point(made)
    assert point.learned == {SKILL: pytest.approx(0.5)}
    assert point.lost == {FACTS: pytest.approx(0.1)}
    assert [method.name for method in compare_runs([made, run]).methods] == ["full", "full, averaged 0.5"]


def test_made_models_go_by_how_they_were_made(tmp_path):
    run = write_run(tmp_path / "run", "freeze.trainable_fraction=1.0")
    scores = {FACTS: 0.9, SKILL: 0.5}
    made = [
        write_made(tmp_path / "tenth", run, scores, kind="sparsification", density=0.1),
        write_made(tmp_path / "third", run, scores, kind="sparsification", density=0.3),
        write_made(tmp_path / "back", run, scores, kind="reset"),
    ]
    expected = ["full, sparsified 0.1", "full, sparsified 0.3", "full, reset"]
    assert [read_point(folder).title for folder in made] == expected
    assert {method.name for method in compare_runs(made).methods} == set(expected)


def test_made_model_that_was_asked_in_another_way_is_refused(tmp_path):
    made = write_made(
        tmp_path / "mean", write_run(tmp_path / "run"), {FACTS: 0.9, SKILL: 0.5}, kind="interpolation", weight=0.5
    )
    path = made / "evaluation.json"
    scored = json.loads(path.read_text())
    scored["tasks"][FACTS]["way"] = "plain, nothing written"
    path.write_text(json.dumps(scored))
    with pytest.raises(InputError, match="on 100 questions, but on 100 questions, plain, nothing written"):
        read_point(made)


def test_sources_of_a_mixture_are_what_was_trained(tmp_path):
    mixture = ("data.path=null", f"data.sources=[{{path: {SKILL}}}, {{path: more.jsonl}}]")
    point = read_point(write_run(tmp_path / "run", *mixture))
    assert point.learned == {SKILL: pytest.approx(0.9)}
    assert point.lost == {FACTS: pytest.approx(0.3)}


def test_made_model_that_is_not_scored_as_its_run_is_refused(tmp_path):
    made = write_made(tmp_path / "mean", write_run(tmp_path / "run"), {FACTS: 0.9}, kind="interpolation", weight=0.5)
    with pytest.raises(InputError, match="tinyworld/skill was not scored as before the run, on 100 questions"):
        read_point(made)
    (made / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match=r"evaluation.json is not what hft eval writes"):
        read_point(made)
    (made / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"is not scored: it has no evaluation.json"):
        read_point(made)


@pytest.mark.parametrize(
    ("override", "title"),
    [
        ("freeze.seed=1", "half"),
        ("freeze={grain: biases}", "half of biases"),
        ("freeze={grain: biases, trainable_fraction: 1.0}", "all of biases"),
        ("freeze={grain: columns}", "half of columns (ssu)"),
        ("freeze={grain: directions, part: random}", "half of directions (random)"),
        ("freeze=quiet", "half of [matrices, directions] (quiet)"),
        ("freeze={rank: fisher}", "half by fisher"),
        ("freeze={rank: magnitude, importance: {freezes: least}}", "half by magnitude, the least frozen"),
        ("freeze={grain: columns, trainable_fraction: 1.0}", "full"),
        ("freeze={interpolate: 0.5}", "half + interpolate"),
        ("freeze={trainable_fraction: 1.0, pull: {strength: 0.1}}", "full + pull"),
    ],
)
def test_rules_go_by_names_of_their_own(tmp_path, override: str, title: str):
    assert read_point(write_run(tmp_path / "run", override)).title == title


def test_a_run_of_an_earlier_hft_is_read_though_its_recipe_would_be_refused_now(tmp_path):
    """Epochs beside steps, which had no effect and were let pass."""
    run = write_run(tmp_path / "run")
    path = run / "recipe.yaml"
    written = yaml.safe_load(path.read_text())
    written["train"]["num_train_epochs"] = 3.0
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(RecipeError):
        load_recipe(path)
    assert read_point(run).learned == {SKILL: pytest.approx(0.9)}
