"""From a newcomer's own rows to their own model: each command is one that the command before it has printed."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROWS = [
    ("When are you open?", "From 9 to 17."), ("Where are you?", "At 4 Mill Lane."), ("What do you sell?", "Bread and cakes."),
    ("Who owns the shop?", "Ada Miller."), ("Do you take cards?", "Yes, all."), ("Is there parking?", "Behind the shop."),
]  # fmt: skip


class Shell:
    """A user who runs what was printed, with blanks filled in."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shown = ""
        self.commands: list[str] = []

    def run(self, command: str, typed: str = "") -> str:
        """Run a command and remember what it printed."""
        words = shlex.split(re.sub(r"^(?:python -m hftcli|\S*hft)(?= )", "hft", command))
        assert words[0] == "hft"
        done = subprocess.run(
            [sys.executable, "-m", "hftcli", *words[1:]], cwd=self.folder, input=typed, capture_output=True, text=True,
            check=False, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        self.shown = done.stdout + done.stderr
        self.commands.append(command)
        return done.stdout

    def find(self, pattern: str) -> str:
        """The command that was printed last and begins so, without its comment."""
        found = re.findall(rf"^\w+ +((?:python -m hftcli|\S*hft) {pattern}[^#\n]*)", self.shown, re.MULTILINE)
        assert found, f"no {pattern} in\n{self.shown}"
        return found[-1].strip()


@pytest.mark.parametrize("model", ["tinyworld", pytest.param("MiniMind2-Small", marks=pytest.mark.slow)])
def test_the_first_own_model_takes_five_commands(request, tmp_path, model):
    place = model if model == "tinyworld" else str(request.getfixturevalue("shared") / "models" / model)
    with (tmp_path / "my.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *ROWS])
    shell = Shell(tmp_path)
    shell.run("hft sft --train.max_steps 2 --eval.max_examples 5")  # as `make demo` does, cut short
    shell.run(shell.find("init").replace("MODEL", shlex.quote(place)).replace("ROWS", "my.csv"))
    assert "6" in shell.run(shell.find("data"))
    shell.run(shell.find("plan"))
    shell.run(shell.find("sft"))
    assert len(shell.commands) == 5
    checkpoint = re.search(r"^model +(\S+)", shell.shown, re.MULTILINE)[1]
    AutoModelForCausalLM.from_pretrained(tmp_path / checkpoint)
    assert (tmp_path / checkpoint / "README.md").exists()
    assert "start" in shell.find("chat")
    if model != "tinyworld":  # loads two models, which takes a while
        shell.run(f"{shell.find('chat')} --max-new-tokens 4", "When are you open?\n/quit\n")
