"""What trackers are told of a run: each is read back by its own means."""

import json
import re
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from written_runs import FACTS, complete_round, write_run

from hftcli.comparing.forgetting import assemble_matrix
from hftcli.errors import HftError
from hftcli.reporting.logbook import make_logbook
from hftcli.reporting.page import write_page
from hftcli.reporting.trackers import report_to_trackers
from hftcli.runs.files import write_model
from hftcli.runs.run import Run
from hftcli.runs.tracked import find_mlflow_variables, list_variables

pytestmark = pytest.mark.filterwarnings("ignore")  # the trackers' own, on their own code

ROWS = ({"a": 0.1, "b": 0.2, FACTS: 1.0}, {"a": 0.9, "b": 0.3, FACTS: 0.75}, {"a": 0.5, "b": 0.8, FACTS: 0.5})


@pytest.fixture
def tell(tmp_path, monkeypatch):
    """A run of two tasks, told to a tracker; OP is (0.5 + 0.8) / 2, and BWT 0.5 - 0.9."""
    monkeypatch.chdir(tmp_path)

    def tell_run(tracker: str) -> Run:
        folder = tmp_path / "mine"
        write_run(
            folder, f"train.report_to={tracker}", "continual.tasks=[a, b]", "data.root=.", rows=ROWS, tasks=("a", "b"),
            objective="continual",
        )  # fmt: skip
        run = Run(folder)
        spec = run.rounds[0].read_spec()
        scoring = spec.scoring.model_copy(update={"before": ("a", "b", FACTS)})
        write_model(run.rounds[0].spec_path, spec.model_copy(update={"scoring": scoring}))
        write_model(run.matrix_path, assemble_matrix(run))
        for index in range(2):
            complete_round(run, index)
        write_page(run, run.page_path)
        report_to_trackers(run)
        return run

    return tell_run


def test_the_logbook_has_a_row_per_model_and_the_metrics(tell):
    logbook = make_logbook(tell("none"), None)
    assert [row["score/a"] for row in logbook.rows] == [0.1, 0.9, 0.5]
    assert logbook.summary["op"] == pytest.approx(0.65)
    assert logbook.summary["bwt"] == pytest.approx(-0.4)
    assert logbook.table[0] == ("model", "a", "b", FACTS)
    assert logbook.table[2] == ("a", "0.9000", "0.3000", "0.7500")
    assert {path.name for path in logbook.files} >= {"report.html", "forgetting.json", "recipe.yaml"}


def test_tensorboard_holds_the_matrix(tell):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tell("tensorboard")
    found = EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    values = {tag: [event.tensor_proto.float_val or event.tensor_proto for event in found.Tensors(tag)]
              for tag in found.Tags()["tensors"] if tag != "matrix/table"}  # fmt: skip
    scalars = {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]} | values
    assert scalars["score/a"] == pytest.approx([0.1, 0.9, 0.5])
    assert scalars["matrix/op"] == pytest.approx([0.65])
    (table,) = found.Tensors("matrix/table")
    assert b"a | 0.9000 | 0.3000 | 0.7500" in table.tensor_proto.string_val[0]
    assert [event.step for event in found.Scalars("score/a")] == [0, 1, 2]


def test_wandb_holds_the_matrix_offline(tell, monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tell("wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert b"bwt" in log.read_bytes()
    (table,) = folder.rglob("matrix_*.table.json")
    held = json.loads(table.read_text())
    assert held["columns"] == ["model", "a", "b", FACTS]
    assert held["data"][2] == ["b", "0.5000", "0.8000", "0.5000"]


def test_trackio_holds_the_matrix(tell, monkeypatch, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    import trackio.utils

    folder = tmp_path / "trackio"
    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder, raising=False)
    tell("trackio")
    database = next(folder.glob("*.db"))
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {"mine"}
    told = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [metrics["score/a"] for _, metrics in told if "score/a" in metrics] == [0.1, 0.9, 0.5]
    (last,) = (metrics for _, metrics in told if "op" in metrics)
    assert last["bwt"] == pytest.approx(-0.4)


def test_mlflow_holds_the_matrix_and_the_report(tell, monkeypatch, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    tell("mlflow")
    (found,) = mlflow.search_runs(experiment_names=["hft"], output_format="list")
    assert found.info.run_name == "mine"
    assert found.data.metrics["op"] == pytest.approx(0.65)
    client = mlflow.MlflowClient()
    assert [point.value for point in client.get_metric_history(found.info.run_id, "score/a")] == [0.1, 0.9, 0.5]
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert names >= {"report.html", "matrix.json", "forgetting.json"}


def test_mlflow_is_told_again_in_the_same_run(tell, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run = tell("mlflow")
    run.tracked_path.unlink()  # as if it had more rounds now
    report_to_trackers(run)
    assert len(mlflow.search_runs(experiment_names=["hft"], output_format="list")) == 1


def test_a_round_goes_on_in_its_run_of_mlflow(monkeypatch, tmp_path):
    """MLflow is stood for by a search that knows runs by their tag `hft.run`; it is not asked for anything else."""
    held: dict[str, str] = {}

    def search_runs(filter_string: str, **given: object) -> list[SimpleNamespace]:
        key = re.fullmatch(r"tags\.`hft\.run` = '(\w+)'", filter_string)[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id=held[key]))] if key in held else []

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(search_runs=search_runs))
    first, second = Run(write_run(tmp_path / "mine", rows=ROWS, tasks=("a", "b"), objective="continual")).rounds
    assert find_mlflow_variables(first) == {}
    (key,) = json.loads(list_variables(first, "hft")["MLFLOW_TAGS"]).values()
    held[key] = "r1"
    assert find_mlflow_variables(first) == {"MLFLOW_RUN_ID": "r1", "MLFLOW_MAX_LOG_PARAMS": "0"}
    assert find_mlflow_variables(second) == {}


def test_a_tracker_is_told_once(tell):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tell("tensorboard")
    (held,) = (run.folder / "tensorboard").iterdir()
    report_to_trackers(run)
    assert list((run.folder / "tensorboard").iterdir()) == [held]


def test_a_tracker_that_fails_is_named_and_the_run_is_left_alone(tell):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tell("none")
    run.recipe_path.write_text(run.recipe_path.read_text().replace("report_to: none", "report_to: tensorboard"))
    (run.folder / "tensorboard").write_text("in the way")
    with pytest.raises(HftError, match="tensorboard did not take the report of .*the run is finished") as caught:
        report_to_trackers(run)
    assert caught.value.exit_code == 1
    assert not run.tracked_path.exists()
