"""What the README says is what the code does."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "write_reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_is_named_exists():
    for name in set(re.findall(r"`((?:recipes|scripts|hftcli|tests)/[\w./]+\.\w+)`", README)):
        assert (ROOT / name).exists(), f"README.md names {name}"


def test_every_command_that_is_shown_exists():
    from hftcli.commands.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in set(re.findall(r"^hft (\w+)", README, re.MULTILINE)):
        assert command in known, f"README.md shows hft {command}"
