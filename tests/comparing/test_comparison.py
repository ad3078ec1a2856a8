"""Runs are told apart, refused where they cannot be compared, and compared at equal learning."""

import json
import re
from pathlib import Path

import pytest
from written_runs import FACTS, REWORDED, SKILL, make_predictions, make_score, write_run

from hftcli.comparing.comparison import compare_runs
from hftcli.errors import InputError
from hftcli.reporting.figures import draw_frontier
from hftcli.reporting.measures import print_comparison
from hftcli.runs.run import Run

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


@pytest.mark.parametrize(
    ("override", "way", "said"),
    [
        ("freeze.seed=2", "chat", "tinyworld/facts (100 questions, chat), tinyworld/skill (100 questions, chat)"),
        ("eval.temperature=1", None, "other way of writing answers than"),
        ("eval.max_new_tokens=3", None, "temperature 0, cut at 3 tokens; not temperature 0, cut by each task"),
    ],
)
def test_runs_that_were_asked_in_other_ways_are_refused(tmp_path, override, way, said):
    """Otherwise what is measured of two methods would not be the same."""
    scores = [{name: make_score(value).model_copy(update={"way": way}) for name, value in row.items()}
              for row in ({FACTS: 1.0, SKILL: 0.0}, {FACTS: 0.7, SKILL: 0.9})]  # fmt: skip
    full = write_run(tmp_path / "full", "freeze.trainable_fraction=1.0")
    with pytest.raises(InputError) as caught:
        compare_runs([full, write_run(tmp_path / "half", override, rows=tuple(scores))])
    assert said in caught.value.message


def test_runs_that_were_asked_other_questions_are_refused(tmp_path):
    """As many of them, so that no count tells."""
    runs = [write_run(tmp_path / str(seed), f"freeze.seed={seed}") for seed in (1, 2, 3)]
    for folder, first in zip(runs, ("fox", "fox", "hen"), strict=True):
        asked = [
            one.model_copy(update={"question": f"Q{one.index}", "answers": (first if one.index == 0 else "cat",)})
            for one in make_predictions(1, 1, 1)
        ]
        Run(folder).rounds[0].write_predictions("before", FACTS, asked)
    assert compare_runs(runs[:2]).methods
    with pytest.raises(InputError, match=f"{runs[2]} asked {FACTS} other questions than {runs[0]}"):
        compare_runs(runs)


def test_settings_without_a_seed_in_common_are_refused_by_name(tmp_path):
    """Along a method's curve a seed is compared with itself; one that a setting lacks would drop out."""
    runs = {
        f"{rate}-{seed}": write_run(
            tmp_path / f"{rate}-{seed}", f"train.learning_rate={rate}", f"train.seed={seed}", f"freeze.seed={seed}"
        )
        for rate, seed in ((5e-4, 1), (5e-4, 2), (7e-4, 1), (7e-4, 3))
    }
    with pytest.raises(InputError) as caught:
        compare_runs(list(runs.values()))
    message = caught.value.message
    assert f"half, 0.0005: {runs['0.0005-2']}" in message
    assert f"half, 0.0007: {runs['0.0007-3']}" in message
    assert str(runs["0.0005-1"]) not in message


def test_a_run_and_its_copy_are_no_two_draws(tmp_path):
    with pytest.raises(InputError, match="the same recipe and the same seeds"):
        compare_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two")])


def test_methods_and_settings_are_told_apart(tmp_path):
    comparison = compare_runs(write_grid(tmp_path))
    assert [method.name for method in comparison.methods] == ["full", "half"]
    for method in comparison.methods:
        assert [setting.label for setting in method.settings] == ["0.0003", "0.0005", "0.0007"]
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


def test_figure_names_methods_and_axes(tmp_path):
    path = tmp_path / "frontier.svg"
    draw_frontier(compare_runs(write_grid(tmp_path / "runs", num_seeds=2)), path)
    content = path.read_text()
    assert all(text in content for text in (">full<", ">half<", "learning: gain", "forgetting: loss"))


def test_command_prints_the_table_and_json(hft, tmp_path, capsys):
    runs = write_grid(tmp_path / "runs", num_seeds=2)
    print_comparison(compare_runs(runs), as_json=False)
    shown = capsys.readouterr().out
    assert "forgets" in shown
    assert "± " in shown
    found = json.loads(hft("compare", *runs, "--json", "--figure", tmp_path / "frontier.png").stdout)
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    assert found["differences"][0]["found"]["difference"]["high"] < 0
    assert found["units"]["score"].startswith("a share, 0 to 1;")
    for option in (("--seeds", "2"), ("--vary", "train.seed=1")):
        assert "with --recipe only" in hft("compare", *runs, *option, code=2).stderr


def write_measured(folder: Path, num_seeds: int = 3) -> list[Path]:
    """One learning rate each, measured within: full forgets twice what half does wherever both learned equally much."""
    folders = []
    for share, factor in (("0.5", 0.2), ("1.0", 0.4)):
        for seed in range(1, num_seeds + 1):
            way = [{SKILL: (x := 0.2 * step + 0.01 * seed), FACTS: 1 - (factor + 0.01 * seed) * x} for step in (1, 2, 3, 4)]
            settings = (f"freeze.trainable_fraction={share}", f"freeze.seed={seed}", f"train.seed={seed}", "eval.num_points=4")
            rows = ({FACTS: 1.0, SKILL: 0.0}, way[-1])
            folders.append(write_run(folder / f"{share}-{seed}", *settings, rows=rows, points=tuple(way)))
    return folders


def test_runs_that_were_measured_within_need_one_learning_rate(tmp_path):
    """To 0.81 of learning, lines through the start: half forgets (0.4 - 0.2) times half of that less."""
    (difference,) = compare_runs(write_measured(tmp_path)).differences
    assert difference.found.is_within
    assert (difference.found.low, difference.found.high) == (0.0, pytest.approx(0.81))
    assert difference.found.difference.mean == pytest.approx(-0.2 * 0.81 / 2, abs=1e-3)
    assert difference.is_shown
    assert difference.sentence.startswith(
        "at equal learning, half forgets 8.1 points less than full (95 % interval 8.1 to 8.1;"
    )


def test_runs_measured_at_other_steps_are_refused(tmp_path):
    runs = write_measured(tmp_path, 1)
    more = {FACTS: 0.9, SKILL: 0.4}
    runs.append(
        write_run(
            tmp_path / "more", "eval.num_points=5", "freeze.seed=9", rows=({FACTS: 1.0, SKILL: 0.0}, more), points=(more,)
        )
    )
    with pytest.raises(InputError, match="they were not measured alike within the runs: .*eval.num_points 4; .*num_points 5"):
        compare_runs(runs)


def test_pairs_are_corrected_for_their_number(tmp_path):
    folders = write_grid(tmp_path / "grid", gap=0.05)
    for folder in write_grid(tmp_path / "other", gap=0.05)[:9]:  # a third method, which is half with another rule
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("balance: units", "balance: weights"))
        folders.append(folder)
    differences = compare_runs(folders).differences
    assert [difference.num_pairs for difference in differences] == [3, 3, 3]
    for difference in differences:
        assert difference.p_value >= difference.found.p_value
    assert "Holm's of 3 pairs" in differences[0].sentence
