"""Runs are read, told apart, refused where they cannot be compared, and compared at equal learning."""

import json
import re
from pathlib import Path

import pytest
from written_runs import FACTS, REWORDED, SKILL, make_score, write_run

from hftcli.comparing.comparison import compare_runs
from hftcli.comparing.grid import make_grid
from hftcli.comparing.points import read_point
from hftcli.errors import InputError, RecipeError
from hftcli.reporting.figures import draw_frontier
from hftcli.reporting.measures import print_comparison
from hftcli.runs.files import write_model
from hftcli.runs.records import CheckpointIdentity, MergeManifest
from hftcli.runs.scores import HELD_OUT, PairScore, PairScores

RATES = ("3e-4", "5e-4", "7e-4")


def write_grid(folder: Path, num_seeds: int = 3, gap: float = 0.1) -> list[Path]:
    """Full forgets `gap` more than half wherever both learned equally much; half learns less at the same rate."""
    folders = []
    for share, shift in (("0.5", 0.0), ("1.0", 0.15)):
        for place, rate in enumerate(RATES):
            for seed in range(1, num_seeds + 1):
                skill = 0.3 + 0.2 * place + shift + 0.01 * seed
                lost = 0.5 * skill + (gap if share == "1.0" else 0) + 0.01 * seed + 0.004 * (place + seed) % 0.006
                settings = (f"freeze.trainable_fraction={share}", f"train.learning_rate={rate}")
                seeds = (f"freeze.seed={seed}", f"train.seed={seed}")
                rows = ({FACTS: 1.0, SKILL: 0.0}, {FACTS: 1.0 - lost, SKILL: skill})
                folders.append(write_run(folder / f"{share}-{rate}-{seed}", *settings, *seeds, rows=rows))
    return folders


def test_single_round_learns_what_it_trained_on_and_loses_the_rest(tmp_path):
    rows = ({FACTS: 1.0, REWORDED: 0.8, SKILL: 0.1}, {FACTS: 0.7, REWORDED: 0.6, SKILL: 0.9})
    point = read_point(write_run(tmp_path / "run", rows=rows))
    assert point.learned == {SKILL: pytest.approx(0.8)}
    assert point.lost == pytest.approx({FACTS: 0.3, REWORDED: 0.2})
    assert point.learning == pytest.approx(0.8)
    assert point.forgetting == pytest.approx(0.25)


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


def test_likelihood_is_told_in_nats(tmp_path, capsys):
    folders = []
    for share, gap in (("0.5", 0.0), ("1.0", 0.1)):
        for place, rate in enumerate(RATES):
            for seed in (1, 2, 3):
                learned = 0.3 + 0.1 * place + 0.01 * seed
                lost = make_score(None, 1.0 + 0.5 * learned + gap + 0.003 * seed)
                rows = (
                    {FACTS: make_score(None), SKILL: make_score(None, 2.0)},
                    {FACTS: lost, SKILL: make_score(None, 2.0 - learned)},
                )
                settings = (f"freeze.trainable_fraction={share}", f"train.learning_rate={rate}")
                seeds = (f"freeze.seed={seed}", f"train.seed={seed}")
                folders.append(write_run(tmp_path / f"{share}-{rate}-{seed}", *settings, *seeds, rows=rows))
    comparison = compare_runs(folders, by="nll")
    assert "half forgets 0.100 nats per token less than full (95 % interval" in comparison.differences[0].sentence
    print_comparison(comparison, as_json=False)
    assert "nats per token, means over seeds" in capsys.readouterr().out
    draw_frontier(comparison, tmp_path / "frontier.svg")
    assert "learning: gain on what was trained, nats per token" in (tmp_path / "frontier.svg").read_text()


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


def test_run_that_is_not_finished_is_named(tmp_path):
    finished, open_ = write_run(tmp_path / "one"), write_run(tmp_path / "two", "freeze.seed=2", is_finished=False)
    with pytest.raises(InputError, match=r"two is not finished: 00-sft has not run to its end"):
        compare_runs([finished, open_])
    with pytest.raises(InputError, match=r"is no run: it has no recipe.yaml"):
        compare_runs([finished, tmp_path])
    with pytest.raises(InputError, match="one run is no comparison"):
        compare_runs([finished])


def test_runs_of_other_data_and_tasks_are_refused_each_by_name(tmp_path):
    first = write_run(tmp_path / "first")
    data = write_run(tmp_path / "data", "freeze.seed=2", fingerprint="ff")
    rows = ({REWORDED: 1.0, SKILL: 0.0}, {REWORDED: 0.9, SKILL: 0.5})
    tasks = write_run(tmp_path / "tasks", "freeze.seed=3", rows=rows)
    start = write_run(tmp_path / "start", "freeze.seed=4", "model.path=other")
    with pytest.raises(InputError) as caught:
        compare_runs([first, data, tasks, start])
    message = caught.value.message
    assert "data has other data than" in message
    assert "10 rows of train.jsonl ff; not 10 rows of train.jsonl 0f" in message
    assert "tasks has other tasks than" in message
    assert "tinyworld/facts-reworded (100 questions), tinyworld/skill (100 questions); not tinyworld/facts" in message
    assert "start has other model than" in message


def test_a_run_and_its_copy_are_no_two_draws(tmp_path):
    with pytest.raises(InputError, match="the same recipe and the same seeds"):
        compare_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two")])


def test_methods_and_settings_are_told_apart(tmp_path):
    comparison = compare_runs(write_grid(tmp_path))
    assert [method.name for method in comparison.methods] == ["full", "half"]
    for method in comparison.methods:
        assert [setting.learning_rate for setting in method.settings] == [3e-4, 5e-4, 7e-4]
        assert [len(setting.points) for setting in method.settings] == [3, 3, 3]


def test_adapters_everywhere_are_called_by_their_method(tmp_path):
    lora = ("method.lora={}", "freeze.trainable_fraction=1.0")
    runs = [
        write_run(tmp_path / name, *settings, objective="continual", tasks=(SKILL,))
        for name, settings in {"half": (), "lora": lora, "half-lora": lora[:1]}.items()
    ]
    assert [method.name for method in compare_runs(runs).methods] == ["half", "lora", "half + lora"]


def test_every_control_has_a_name_of_its_own(tmp_path):
    full = "freeze.trainable_fraction=1.0"
    settings = {
        "full": (full,),
        "half": (),
        "lora": (full, "method.lora={}"),
        "ia3": (full, "method.ia3={}"),
        "full + l2sp": (full, "method.l2sp={strength: 0.1}"),
        "half + l2sp": ("method.l2sp={strength: 0.1}",),
    }
    runs = [write_run(tmp_path / name, *given) for name, given in settings.items()]
    assert [method.name for method in compare_runs(runs).methods] == list(settings)
    other = write_run(tmp_path / "stronger", full, "method.l2sp={strength: 1.0}")
    names = [method.name for method in compare_runs([runs[4], other]).methods]
    assert names == ["full + l2sp (method.l2sp.strength=0.1)", "full + l2sp (method.l2sp.strength=1.0)"]


def test_methods_of_one_name_carry_what_differs(tmp_path):
    names = ("balance=units", "balance=weights")
    runs = [write_run(tmp_path / name, f"freeze.{name}") for name in names]
    found = [method.name for method in compare_runs(runs).methods]
    assert found == ["half (freeze.balance=units)", "half (freeze.balance=weights)"]


def write_made(folder: Path, run: Path, scores: dict[str, float], **how: object) -> Path:
    """The files that `hft merge` or `hft reset`, and then `hft eval`, leave of a run's model."""
    folder.mkdir()
    tuned = CheckpointIdentity(path=str(run / "rounds" / "00-sft" / "checkpoint"), files={})
    manifest = MergeManifest(command=(), created="", version="", inputs={"base": tuned, "tuned": tuned}, files={}, **how)
    write_model(folder / "merge.json", manifest)
    tasks = {name: {"score": score, "lenient": None, "nll": 1.0, "num_examples": 100} for name, score in scores.items()}
    (folder / "evaluation.json").write_text(json.dumps({"tasks": tasks, "model": "m"}))
    return folder


def test_made_models_stand_beside_the_runs_that_they_are_made_of(tmp_path):
    run = write_run(tmp_path / "run", "freeze.trainable_fraction=1.0")
    made = write_made(tmp_path / "mean", run, {FACTS: 0.9, SKILL: 0.5}, kind="interpolation", weight=0.5)
    point = read_point(made)
    assert point.learned == {SKILL: pytest.approx(0.5)}
    assert point.lost == {FACTS: pytest.approx(0.1)}
    assert [method.name for method in compare_runs([made, run]).methods] == ["full", "full, averaged 0.5"]


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


def test_difference_at_equal_learning_is_said_plainly(tmp_path):
    (difference,) = compare_runs(write_grid(tmp_path)).differences
    assert (difference.first, difference.second) == ("half", "full")
    assert difference.found.difference.mean == pytest.approx(-0.1, abs=0.01)
    assert re.search(r"at equal learning, half forgets (9|10)\.\d points less than full \(95 % interval", difference.sentence)


def test_no_difference_is_said_plainly_too(tmp_path):
    (difference,) = compare_runs(write_grid(tmp_path, gap=0.0)).differences
    assert "no difference was shown between half and full" in difference.sentence


def test_one_seed_and_no_equal_learning_are_said(tmp_path):
    (difference,) = compare_runs(write_grid(tmp_path / "grid", num_seeds=1)).differences
    assert "one seed, so no interval" in difference.sentence
    runs = [write_run(tmp_path / share, f"freeze.trainable_fraction={share}") for share in ("0.5", "1.0")]
    (difference,) = compare_runs(runs).differences
    assert difference.sentence == "half and full never learned equally much: give more values of train.learning_rate"


def test_figure_names_methods_and_axes(tmp_path):
    path = tmp_path / "frontier.svg"
    draw_frontier(compare_runs(write_grid(tmp_path / "runs", num_seeds=2)), path)
    content = path.read_text()
    assert all(text in content for text in (">full<", ">half<", "learning: gain", "forgetting: loss"))


def test_grid_is_the_product_with_a_folder_for_each_run(tmp_path):
    vary = ["freeze.trainable_fraction=0.5,1.0", "train.learning_rate=3e-4,7e-4"]
    grid = make_grid("tinyworld", ["train.max_steps=4"], vary, 2, tmp_path)
    assert len(grid) == 8
    assert len({recipe.output for recipe in grid}) == 8
    assert {(recipe.freeze.trainable_fraction, recipe.train.learning_rate) for recipe in grid} == {
        (0.5, 3e-4), (0.5, 7e-4), (1.0, 3e-4), (1.0, 7e-4)
    }  # fmt: skip
    assert {(recipe.freeze.seed, recipe.train.seed) for recipe in grid} == {(1, 1), (2, 2)}
    assert {recipe.train.max_steps for recipe in grid} == {4}
    assert Path(grid[0].output).name == "trainable_fraction=0.5,learning_rate=3e-4-1"


def test_grid_varies_whole_sections(tmp_path):
    vary = ["method={},{lora: {r: 4}}"]
    grid = make_grid("tinyworld-continual", [], vary, 1, tmp_path)
    assert [recipe.method.names for recipe in grid] == [(), ("lora",)]
    assert grid[1].method.lora.r == 4


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ("train.learning_rate", "expected key=value,value"),
        ("train.learning_rate=", "expected key=value,value"),
        ("train.lerning_rate=1,2", "unknown key 'lerning_rate'"),
        ("train.seed=1,2", "hft compare sets it itself"),
    ],
)
def test_fault_in_the_grid_is_named_before_anything_runs(tmp_path, vary, expected):
    with pytest.raises(RecipeError, match=re.escape(expected)):
        make_grid("tinyworld", [], [vary], 2, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_command_prints_the_table_and_json(hft, tmp_path, capsys):
    runs = write_grid(tmp_path / "runs", num_seeds=2)
    print_comparison(compare_runs(runs), as_json=False)
    shown = capsys.readouterr().out
    assert "forgets" in shown
    assert "± " in shown
    found = json.loads(hft("compare", *runs, "--json", "--figure", tmp_path / "frontier.png").stdout)
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    assert found["differences"][0]["found"]["difference"]["high"] < 0
    assert "with --recipe only" in hft("compare", *runs, "--seeds", "2", "--vary", "train.seed=1", code=2).stderr
