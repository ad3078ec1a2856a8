"""A worker that is started by hand."""

import subprocess
import sys


def test_a_round_that_is_done_is_left_as_it_is(tmp_path):
    folder = tmp_path / "rounds" / "00-sft"
    held = {"result.json": "{}", "checkpoint/model.safetensors": "weights"}
    (folder / "checkpoint").mkdir(parents=True)
    for name, text in held.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "hftcli.training.worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, f"{folder} is done already" in done.stdout) == (0, True)
    assert f"hft report {tmp_path} shows it" in done.stdout
    left = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert left == held
