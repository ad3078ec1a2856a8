"""What is said while a run is at work: which task of how many, and how long it still takes."""

from written_runs import SKILL, write_run

from hftcli.reporting.progress import RunClock, format_duration
from hftcli.runs.run import Run
from hftcli.runs.spec import Progress

TASKS = ("tinyworld/topic", SKILL)


def test_the_time_left_is_that_of_the_whole_run(tmp_path):
    rows = tuple({**dict.fromkeys(TASKS, 0.1)} for _ in range(3))
    run = Run(write_run(tmp_path / "run", rows=rows, tasks=TASKS, objective="continual"))
    clock = RunClock()
    first, second = run.rounds
    assert clock.name_round(first) == f"task 1 of 2, {first.name}"
    clock.see(first.name, Progress(phase="starting"), 0.0)
    assert clock.describe_left(1.0) == ""
    clock.see(first.name, Progress(phase="training", done=0, total=100), 10.0)
    clock.see(first.name, Progress(phase="training", done=50, total=100), 60.0)
    # A second for a step; 10 s before the steps, so 10 s after them: 120 s a round, of which 60 are over, and one more round.
    assert clock.describe_left(60.0) == "about 3 min left"
    assert clock.name_round(second) == f"task 2 of 2, {second.name}"
    clock.see(second.name, Progress(phase="starting"), 130.0)
    assert clock.describe_left(140.0) == "about 2 min left"


def test_the_time_left_after_a_resume_counts_from_the_step_it_goes_on_from(tmp_path):
    rows = tuple({**dict.fromkeys(TASKS, 0.1)} for _ in range(3))
    run = Run(write_run(tmp_path / "run", rows=rows, tasks=TASKS, objective="continual"))
    clock, (first, _) = RunClock(), run.rounds
    clock.name_round(first)
    clock.see(first.name, Progress(phase="starting"), 0.0)
    clock.see(first.name, Progress(phase="training", done=900, total=1000), 0.0)
    clock.see(first.name, Progress(phase="training", done=910, total=1000), 20.0)
    # Two seconds for a step: 180 s for the 90 that are left, and 2000 s for the round after it.
    assert clock.describe_left(20.0) == "about 36 min left"


def test_more_rounds_than_two_digits_count_are_in_their_order(tmp_path):
    run = Run(tmp_path / "run")
    for place in (100, 11, 9, 101, 10):
        run.round(f"{place:02d}-topic").folder.mkdir(parents=True)
        run.round(f"{place:02d}-topic").spec_path.touch()
    assert [round_.name.partition("-")[0] for round_ in run.rounds] == ["09", "10", "11", "100", "101"]
    assert RunClock().name_round(run.round("100-topic")) == "task 4 of 5, 100-topic"


def test_one_round_is_no_task_of_several(tmp_path):
    run = Run(write_run(tmp_path / "run"))
    assert RunClock().name_round(run.rounds[0]) == "00-sft"


def test_durations_are_no_more_exact_than_they_are_known():
    assert [format_duration(seconds) for seconds in (1, 62, 200, 9000)] == ["5 s", "60 s", "3 min", "2.5 h"]
