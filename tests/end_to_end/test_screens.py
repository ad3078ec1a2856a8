"""Every command on a terminal of eighty columns: no line is longer, and no word or number is broken."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from end_to_end.screens import list_words, show_screen
from rich.cells import cell_len
from written_runs import FACTS, SKILL, complete_round, write_run

from hftcli.comparing.forgetting import assemble_matrix
from hftcli.runs.files import write_model
from hftcli.runs.run import Run
from hftcli.runs.scores import PairScore, PairScores

TASKS = ("tinyworld/topic", "tinyworld/reverse", SKILL)
SHORT = ("--train.max_steps", "4", "--eval.max_examples", "20")


def check_screen(*arguments: object, code: int = 0) -> list[str]:
    """At eighty columns, against a screen on which everything has room."""
    narrow, wide = (show_screen(columns, *arguments, code=code) for columns in (80, 400))
    assert [line for line in narrow if cell_len(line) > 80] == []
    assert list_words(narrow) - list_words(wide) == set()
    return narrow


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A finished run of each objective, in the working folder."""
    monkeypatch.chdir(tmp_path)
    pair = PairScore(
        reward_accuracy=0.5, reward_accuracy_error=0.03, reward_margin=0.1, likelihood_accuracy=0.6, kl=0.01, num_pairs=150
    )
    runs = {
        "sft": Run(write_run(Path("sft"))),
        "dpo": Run(write_run(Path("dpo"), objective="dpo", pairs=PairScores(before=pair, after=pair))),
        "continual": Run(
            write_run(
                Path("continual"),
                rows=tuple({**dict.fromkeys(TASKS, 0.1 * index), FACTS: 1 - 0.1 * index} for index in range(4)),
                tasks=TASKS, objective="continual",
            )
        ),
    }  # fmt: skip
    for run in runs.values():
        for index in range(len(run.rounds)):
            complete_round(run, index)
    write_model(runs["continual"].matrix_path, assemble_matrix(runs["continual"]))
    return runs


@pytest.mark.parametrize("objective", ["sft", "dpo", "continual"])
def test_what_a_run_prints_at_its_end(written, objective):
    screen = check_screen("report", objective)
    assert any("tinyworld/facts" in line or "reverse" in line for line in screen)
    if objective != "continual":
        assert any(line.startswith("loss 8.000 █") for line in screen)
        assert f"model   {objective}/rounds/00-{objective}/checkpoint" in screen


def test_a_comparison(written):
    write_run(Path("full"), "freeze.trainable_fraction=1.0", "train.learning_rate=3e-4")
    check_screen("compare", "sft", "full")


def test_what_is_said_of_a_fault(tmp_path):
    check_screen("sft", "--output", tmp_path / "run", "--train.lerning_rate", "1", "--train.report_to", "dvclive", code=2)


@pytest.mark.slow
def test_what_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Where are you?", "completion": "At 4 Mill Lane."}\n' * 3)
    check_screen("plan", "tinyworld")
    check_screen("plan", "tulu", "--model", "tinyworld", "--num-processes", "8")
    check_screen("data", "rows.jsonl")
    check_screen("data", "rows.jsonl", "--model", "tinyworld", "--set", "data.max_length=64")
    check_screen("doctor", "--recipe", "tinyworld")


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands",
    [
        [
            ("sft", "--output", "run", *SHORT),
            ("eval", "--model", "run", "--tasks", f"{FACTS},tinyworld/facts-reworded", "--max-examples", "20"),
        ],
        [("dpo", "--output", "run", *SHORT)],
        [("continual", "--output", "run", "--continual.tasks", f"[{TASKS[0]}, {TASKS[1]}]", *SHORT)],
    ],
    ids=["sft and eval", "dpo", "continual"],
)
def test_a_run_and_its_evaluation(tmp_path, monkeypatch, commands):
    """Run twice, on a narrow and on a wide screen: times and speeds differ, so that of numbers the form alone is compared."""
    screens = {}
    for columns in (80, 400):
        folder = tmp_path / str(columns)
        folder.mkdir()
        monkeypatch.chdir(folder)
        screens[columns] = [show_screen(columns, *command) for command in commands]
    for narrow, wide in zip(screens[80], screens[400], strict=True):
        assert [line for line in narrow if cell_len(line) > 80] == []
        shown, expected = ({re.sub(r"\d+", "0", word) for word in list_words(screen)} for screen in (narrow, wide))
        assert shown - expected - {"0", "s", "min", "h"} == set()


@pytest.mark.slow
def test_an_interrupt_is_answered_at_once(tmp_path):
    front, back = pty.openpty()
    command = [sys.executable, "-m", "hftcli", "sft", "--output", str(tmp_path / "run"), "--train.max_steps", "5000"]
    process = subprocess.Popen(command, stdin=back, stdout=back, stderr=back, start_new_session=True)
    os.close(back)
    shown, asked = b"", None
    while b"stopping after this step" not in shown:
        shown += os.read(front, 1 << 16)
        if asked is None and b"training, loss" in shown:
            asked = time.monotonic()
            process.send_signal(signal.SIGINT)
    assert asked is not None
    assert time.monotonic() - asked < 2
    assert b"again to lose the steps of this round" in shown
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(front, 1 << 16):
            shown += part
    os.close(front)
    assert process.wait() == 75
