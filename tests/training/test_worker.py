"""A worker that is started by hand."""

import subprocess
import sys


def test_a_round_that_is_done_is_left_as_it_is(tmp_path):
    held = {"result.json": "{}", "checkpoint/model.safetensors": "weights"}
    (tmp_path / "checkpoint").mkdir()
    for name, text in held.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "hftcli.training.worker", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, f"{tmp_path} is done already" in done.stdout) == (0, True)
    left = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == held
