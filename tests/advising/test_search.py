"""What a search makes of runs that fail, or that lose too much; the runs are written, not trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from written_runs import make_score, write_run

from hftcli import runners
from hftcli.advising.rows import Order
from hftcli.advising.search import Search
from hftcli.comparing.advice import Advice
from hftcli.errors import InputError, Interrupted, OverBudget, TrainingError
from hftcli.recipe.recipe import Recipe
from hftcli.runs.run import Run
from hftcli.runs.scores import HELD_OUT

LIMIT = 0.02
Outcome = Callable[[Recipe], tuple[float, float]]  # nats learned and lost at the first and only point of a run


@pytest.fixture
def search(tmp_path, monkeypatch):
    """A search whose runs learn and lose what a function says."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(100)]
    kept = [{"question": f"Q{number}", "answers": [f"A{number}"]} for number in range(8)]
    for name, lines in (("new", rows), ("kept", kept)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    order = Order("tinyworld", "new.jsonl", "kept.jsonl", LIMIT, 1e6, 3, (), tmp_path / "advice")

    def run(outcome: Outcome, **changes: object) -> Advice:
        def run_single(recipe: Recipe, on_progress: object) -> Run:
            learned, lost = outcome(recipe)
            if Run(recipe.folder).recipe_path.exists():  # how long a run takes is measured on the first of them
                return Run(recipe.folder)
            (known,) = recipe.eval.tasks
            before, after = ({HELD_OUT: make_score(None, 3.0 - gain), known: make_score(None, 1.0 + loss)}
                             for gain, loss in ((0.0, 0.0), (learned, lost)))  # fmt: skip
            settings = (f"train.learning_rate={recipe.train.learning_rate}", f"freeze={recipe.freeze.model_dump_json()}")
            return Run(write_run(recipe.folder, *settings, rows=(before, after), points=(after,)))

        monkeypatch.setattr(runners, "run_single", run_single)
        return Search(replace(order, **changes), lambda *_: None, lambda _: None).run()

    return run


def is_full(recipe: Recipe) -> bool:
    return recipe.freeze.trainable_fraction == 1


def test_a_run_that_fails_is_left_out_alone(search):
    """As where full fine-tuning finds no memory for its largest rate, and a frozen half does."""

    def outcome(recipe: Recipe) -> tuple[float, float]:
        if is_full(recipe) and recipe.train.learning_rate > 5e-5:
            raise TrainingError("a rank was killed")
        return 100 * recipe.train.learning_rate, 0.0

    advice = search(outcome)
    assert advice.best is not None
    assert advice.left_out
    assert all(name.startswith("full") and reason == "a rank was killed" for name, reason in advice.left_out.items())
    assert "full" in {one.candidate.arm for one in advice.arms}  # at its other rates


def test_a_signal_ends_the_search(search):
    def outcome(recipe: Recipe) -> tuple[float, float]:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        search(outcome)


def test_a_fresh_seed_that_keeps_nothing_learned_nothing(search):
    def outcome(recipe: Recipe) -> tuple[float, float]:
        if recipe.stop.max_forgetting is not None and recipe.train.seed == 2:
            raise OverBudget("no measured step lies within stop.max_forgetting")
        return 0.3, 0.01

    advice = search(outcome)
    assert advice.num_seeds == 3
    assert advice.learning.mean == pytest.approx((0.3 + 0 + 0.3) / 3)
    assert advice.forgetting.mean == pytest.approx((0.01 + 0 + 0.01) / 3)
    assert advice.sentence.endswith("it may lose more than 0.02 at every point, and then keeps nothing")


def test_what_may_keep_nothing_gives_way_to_the_next_best(search):
    """All weights learn most, and one fresh seed in three loses too much."""

    def outcome(recipe: Recipe) -> tuple[float, float]:
        if is_full(recipe) and recipe.stop.max_forgetting is not None and recipe.train.seed == 2:
            raise OverBudget("no measured step lies within stop.max_forgetting")
        return 0.4 if is_full(recipe) else 0.3, 0.01

    advice = search(outcome)
    assert not advice.best.candidate.arm.startswith("full")
    assert advice.learning.low == pytest.approx(0.3)


def test_a_short_run_within_the_limit_is_advised_where_longer_ones_lose_more(search):
    short = []

    def outcome(recipe: Recipe) -> tuple[float, float]:
        short.append(recipe.train.max_steps)
        return 0.3, 0.01 if recipe.train.max_steps == short[0] else 0.5

    advice = search(outcome)
    assert max(short) > short[0]
    assert advice.best.num_steps == short[0]
    assert advice.recipe.exists()


def test_nothing_within_the_limit_is_said(search):
    advice = search(lambda recipe: (0.3, 0.5))
    assert advice.best is None
    assert advice.recipe is None
    assert advice.sentence == "nothing within the limit was found"


@pytest.mark.parametrize(("ending", "num_timed"), [("refused", 0), ("killed", 1)])
def test_a_search_that_is_begun_again_plans_with_the_time_that_a_run_takes(search, monkeypatch, tmp_path, ending, num_timed):
    """A run takes 10 s, of which 1 s is training. A search has as many steps as one that was never stopped, and had 10 s less
    for each run that is timed when it goes on.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("hftcli.advising.search.time", SimpleNamespace(monotonic=lambda: clock.now))
    begun: set[Path] = set()

    def outcome(recipe: Recipe) -> tuple[float, float]:
        if recipe.folder not in begun:
            clock.now += 10
        begun.add(recipe.folder)
        return 0.3, 0.01

    def stop_second(recipe: Recipe) -> tuple[float, float]:
        if len(begun) == 1 and recipe.folder not in begun:
            begun.add(recipe.folder)
            recipe.folder.mkdir()  # as much of a run as a signal may leave
            raise Interrupted("stopped")
        return outcome(recipe)

    def read_steps(folder: Path) -> int:
        return json.loads((folder / "steps.json").read_text())

    search(outcome, seconds=400.0, folder=tmp_path / "at once")
    search(outcome, seconds=1e6, folder=tmp_path / "all")
    assert read_steps(tmp_path / "at once") < read_steps(tmp_path / "all")
    begun.clear()
    if ending == "refused":
        with pytest.raises(InputError, match="60 s are too few: a run of 5 steps takes 10 s"):
            search(outcome, seconds=60.0)
    else:
        with pytest.raises(Interrupted):
            search(stop_second, seconds=400.0)
    search(outcome, seconds=380.0 + 10 * num_timed)
    assert read_steps(tmp_path / "advice") == read_steps(tmp_path / "at once")
