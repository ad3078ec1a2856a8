"""Measuring within a round: it changes nothing of the training, is exact after a stop, and keeps a forgetting budget."""

import signal

import pytest
import torch
from end_to_end.running import assert_same
from safetensors.torch import load_file

from hftcli.runs.run import Round

SKILL, FACTS = "tinyworld/skill", "tinyworld/facts"
CURVE = {"eval.tasks": f"[{FACTS}, {SKILL}]", "eval.max_examples": 40, "eval.every_steps": 7}
# Forgets within twenty steps.
FORGETFUL = {
    "train.max_steps": 60,
    "train.learning_rate": 0.001,
    "freeze.trainable_fraction": 1.0,
    "eval.tasks": f"[{FACTS}, {SKILL}]",
    "eval.max_examples": 100,
    "eval.every_steps": 5,
}

BUDGET = {"stop.by": "nll", "stop.max_forgetting": 0.45}


def read_weights(round_: Round) -> dict[str, torch.Tensor]:
    return load_file(round_.checkpoint / "model.safetensors")


def test_a_measured_round_has_the_weights_of_one_that_is_not(hft, settings, short, tmp_path):
    rounds = []
    for name, more in (("plain", {"eval.every_steps": "null"}), ("measured", {})):
        hft("sft", "--output", tmp_path / name, *settings(short | CURVE | more))
        rounds.append(Round(tmp_path / name / "rounds" / "00-sft"))
    plain, measured = rounds
    weights, others = read_weights(plain), read_weights(measured)
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert [row for row in measured.read_metrics() if "loss" in row] == plain.read_metrics()
    points = measured.read_scores().points
    assert [point.step for point in points] == [7, 14, 21, 28, 35, 38]
    assert [row["step"] for row in measured.read_metrics() if "eval_learning_score" in row] == [7, 14, 21, 28, 35, 38]
    after = measured.read_scores().after
    assert points[-1].scores == after
    # Gains and losses, worked out from the scores.
    before = plain.read_scores().before
    assert points[-1].learning["nll"] == pytest.approx(before[SKILL].nll - after[SKILL].nll)
    assert points[-1].forgetting["score"].mean == pytest.approx(before[FACTS].score - after[FACTS].score)
    assert points[-1].forgetting["nll"].mean == pytest.approx(after[FACTS].nll - before[FACTS].nll, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_start_is_asked_once_for_all_runs(hft, settings, short, tmp_path, num_processes):
    ranks = {"launch.num_processes": num_processes, "train.per_device_train_batch_size": 4, "train.max_steps": 3}
    values = short | ranks | {"eval.tasks": f"[{FACTS}, {SKILL}]", "eval.max_examples": 30}
    rounds = []
    for name, tasks in (("one", FACTS), ("two", f"{FACTS}, {SKILL}"), ("three", f"{FACTS}, {SKILL}")):
        more = {"eval.tasks": f"[{tasks}]", "train.learning_rate": f"{len(rounds) + 1}e-4"}
        hft("sft", "--output", tmp_path / name, *settings(values | more))
        rounds.append(Round(tmp_path / name / "rounds" / "00-sft"))
    assert [round_.read_result().reused_before for round_ in rounds] == [(), (FACTS,), (FACTS, SKILL)]
    befores = [round_.read_scores().before for round_ in rounds]
    assert befores[0][FACTS] == befores[1][FACTS]
    assert befores[1] == befores[2]
    for task in (FACTS, SKILL):
        assert rounds[1].read_predictions("before", task) == rounds[2].read_predictions("before", task)


@pytest.mark.slow
def test_a_killed_round_measures_no_point_twice_and_loses_none(start, short, tmp_path):
    values = short | CURVE | {"checkpoint.best": "learning", "stop.by": "nll"}
    plain = start(tmp_path / "plain", values)
    plain.end(0)
    run = tmp_path / "run"
    running = start(run, values)
    running.wait_for("training", 17)
    running.front.kill()
    running.front.communicate()
    running = start(run, values)
    running.wait_for("training", 24)
    running.front.terminate()
    running.end(75)
    running = start(run, values)
    running.end(0)
    assert_same(running.round, plain.round)


@pytest.mark.slow
def test_a_signal_while_a_step_is_measured_keeps_the_step(start, short, tmp_path):
    """The measuring is left, the step is kept, and the point comes when the round goes on."""
    values = short | CURVE | {"eval.max_examples": 400, "eval.every_steps": 11}
    plain = start(tmp_path / "plain", values)
    plain.end(0)
    run = tmp_path / "run"
    running = start(run, values)
    running.wait_for("training", 10)
    running.wait_for("scoring")
    running.front.send_signal(signal.SIGTERM)
    running.end(75)
    running = start(run, values)
    running.end(0)
    assert_same(running.round, plain.round)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_measure_and_go_back_at_every_stage(hft, settings, tmp_path, stage):
    two = FORGETFUL | {
        "launch.num_processes": 2,
        "train.per_device_train_batch_size": 16,
        "launch.zero_stage": stage,
    }
    hft("sft", "--output", tmp_path / "run", *settings(two | BUDGET))
    check_kept(Round(tmp_path / "run" / "rounds" / "00-sft"))


def check_kept(round_: Round) -> None:
    """The model that was kept scores as its step did, within the budget, and learned most of those that are."""
    result, scores = round_.read_result(), round_.read_scores()
    points, budget = scores.points, BUDGET["stop.max_forgetting"]
    (kept,) = [point for point in points if point.step == result.kept_step]
    for name, score in kept.scores.items():
        assert scores.after[name].score == score.score
        assert scores.after[name].nll == pytest.approx(score.nll, rel=1e-6)
    assert scores.after[FACTS].nll - scores.before[FACTS].nll <= budget
    assert kept.learning["nll"] == max(point.learning["nll"] for point in points if point.forgetting["nll"].mean <= budget)
    assert result.stopped_by == "max_forgetting"
    assert points[-1].forgetting["nll"].low > budget
    assert result.kept_step < result.num_steps == points[-1].step < 60
    assert result.verification.passed


def test_a_budget_ends_the_round_and_goes_back(hft, settings, tmp_path):
    hft("sft", "--output", tmp_path / "run", *settings(FORGETFUL | BUDGET))
    check_kept(Round(tmp_path / "run" / "rounds" / "00-sft"))


@pytest.mark.slow
def test_a_round_that_went_back_does_so_again_after_a_stop(start, tmp_path):
    values = FORGETFUL | BUDGET | {"checkpoint.save_steps": 10}
    plain = start(tmp_path / "plain", values)
    plain.end(0)
    running = start(tmp_path / "run", values)
    running.wait_for("saving")
    running.front.terminate()
    running.end(75)
    running = start(tmp_path / "run", values)
    running.end(0)
    assert_same(running.round, plain.round)
    assert running.round.read_result().kept_step == plain.round.read_result().kept_step


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"launch.offload": "optimizer"}, {"method.lora": "{}"}])
def test_masters_on_the_host_and_adapters_go_back_too(hft, settings, tmp_path, more):
    values = FORGETFUL | {"checkpoint.best": "learning", "stop.by": "nll", "train.max_steps": 15} | more
    hft("sft", "--output", tmp_path / "run", *settings(values | {"train.learning_rate": 0.03}))
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    scores = round_.read_scores()
    kept = next(point for point in scores.points if point.step == round_.read_result().kept_step)
    assert kept.learning["nll"] == max(point.learning["nll"] for point in scores.points)
    assert scores.after[SKILL].nll == pytest.approx(kept.scores[SKILL].nll, rel=1e-5)


@pytest.mark.slow
def test_enough_learned_ends_the_round(hft, settings, tmp_path):
    hft("sft", "--output", tmp_path / "run", *settings(FORGETFUL | {"stop.by": "nll", "stop.min_learning": 9.0}))
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    *earlier, last = round_.read_scores().points
    assert round_.read_result().stopped_by == "min_learning"
    assert last.learning["nll"] >= 9.0 > max(point.learning["nll"] for point in earlier)
    assert round_.read_scores().after == last.scores


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stop.max_forgetting": 0.02}, "goes by what is measured within a round: set eval.every_steps or eval.num_points"),
        ({"eval.every_steps": 5, "eval.tasks": f"[{SKILL}]", "stop.max_forgetting": 0.02}, "asks for what was known before"),
        ({"eval.every_steps": 5, "eval.tasks": f"[{FACTS}]", "checkpoint.best": "learning"}, "asks for what is trained on"),
        ({"eval.every_steps": 5, "checkpoint.best": "within_budget"}, "needs a budget: set stop.max_forgetting"),
        ({"eval.every_steps": 5, "eval.num_points": 5}, "every_steps and num_points both say when to measure"),
        ({"eval.every_steps": 5, "stop.by": "nll"}, "stop.by would have no effect"),
        ({"eval.every_steps": 5, "eval.tasks": "[]"}, "eval.every_steps would have no effect: name what to measure"),
        ({"eval.every_steps": 200}, "the round has 200 steps: nothing would be measured before the last"),
        ({"eval.num_points": 300}, "eval.num_points is 300, and the round has 200 steps"),
    ],
)
def test_what_nothing_could_decide_is_refused(settings, tmp_path, given, said):
    from typer.testing import CliRunner

    from hftcli.commands.cli import app
    from hftcli.errors import HftError

    found = CliRunner().invoke(app, ["sft", "--dry-run", "--output", str(tmp_path / "run"), *settings(given)])
    message = str(found.exception.message if isinstance(found.exception, HftError) else found.output)
    assert said in message
