"""A run with trackers: what each of its rounds logged while it trained, and what was told of it in the end."""

import sqlite3

import pytest

from hftcli.launching.packages import is_installed

KEYS = {"train/loss", "train/learning_rate", "eval/learning_nll", "eval/forgetting_nll"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the trackers' own, on their own code
def test_trackers_hold_the_curves_and_the_matrix(hft, settings, tmp_path, monkeypatch):
    trackers = [name for name in ("tensorboard", "wandb", "trackio", "mlflow") if is_installed(name)]
    if "tensorboard" not in trackers:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    values = {
        "continual.tasks": "[tinyworld/sum, tinyworld/topic]", "train.max_steps": 4, "train.logging_steps": 2,
        "eval.num_points": 2, "eval.max_examples": 5, "train.report_to": f"[{', '.join(trackers)}]",
    }  # fmt: skip
    hft("continual", "--output", "run", *settings(values))

    def read(folder: str) -> EventAccumulator:
        found = EventAccumulator(folder)
        found.Reload()
        return found

    for name in ("00-sum", "01-topic"):
        assert set(read(f"run/rounds/{name}/tensorboard").Tags()["scalars"]) >= KEYS
    whole = read("run/tensorboard")
    assert {"matrix/op", "matrix/bwt"} <= set(whole.Tags()["scalars"])
    assert len(whole.Scalars("score/tinyworld/sum")) == 3
    if "wandb" in trackers:
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3
        assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/matrix_*.json"))
    if "trackio" in trackers:
        (database,) = (tmp_path / "trackio").glob("*.db")
        names = sqlite3.connect(database).execute("select distinct run_name from metrics").fetchall()
        assert {name for (name,) in names} == {"run", "run/00-sum", "run/01-topic"}
    if "mlflow" in trackers:
        assert (tmp_path / "mlflow.db").exists()
