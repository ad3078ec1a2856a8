"""Telling trackers of a run as a whole: its matrix, its metrics and its report, beside what each round has logged by itself.

While a round trains, transformers' own callbacks log it (`train.report_to`). What only the end knows is written here, into one
more run of the tracker, which has the name of hft's and stands in one group with its rounds. Trackers are imported when they
are written to.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

from hftcli.errors import HftError
from hftcli.launching.packages import list_trackers
from hftcli.recipe.loading import load_recipe
from hftcli.reporting.logbook import Logbook, make_logbook
from hftcli.runs.files import write_text
from hftcli.runs.run import Run
from hftcli.runs.tracked import MLFLOW_TAG, find_mlflow_run


def report_to_trackers(run: Run) -> None:
    """Tell the trackers that the run's recipe names what its rounds came to, unless they were told.

    Raises:
        HftError: a tracker did not take it; the run itself is untouched.
    """
    train = load_recipe(run.recipe_path, is_written=True).train  # which may name one that its rounds were not told of
    told = json.loads(run.tracked_path.read_text(encoding="utf-8")) if run.tracked_path.exists() else {}
    logbook = make_logbook(run, train.extra.get("project"))
    num_rows = len(logbook.rows)
    for name in list_trackers(train):
        if name not in WRITERS or told.get(name) == num_rows:
            continue
        try:
            with redirect_stdout(sys.stderr):  # some say there where they are
                WRITERS[name](logbook, run)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise HftError(
                f"{name} did not take the report of {run.folder}: {type(error).__name__}: {line}; the run is finished and "
                "untouched",
                "mend that and run the same command again: it tells the tracker alone",
            ) from error
        told[name] = num_rows
        write_text(run.tracked_path, json.dumps(told) + "\n")


def write_tensorboard(logbook: Logbook, run: Run) -> None:
    """Event files in the run's folder, which `tensorboard --logdir RUN` shows together with those of its rounds."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run.folder / "tensorboard"))
    for step, row in enumerate(logbook.rows):
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        if step == len(logbook.rows) - 1:
            values += [Summary.Value(tag=f"matrix/{name}", simple_value=value) for name, value in logbook.summary.items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
    lines = [" | ".join(line) for line in logbook.table]
    lines.insert(1, " | ".join("---" for _ in logbook.table[0]))
    writer.add_event(Event(step=len(logbook.rows) - 1, summary=text_pb("matrix/table", "\n".join(lines))))
    writer.close()


def write_wandb(logbook: Logbook, run: Run) -> None:
    """A run of wandb in one group with the rounds' own; offline with WANDB_MODE=offline."""
    import wandb

    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", logbook.project), group=logbook.name, name=logbook.name, id=logbook.key,
        resume="allow", job_type="report", settings=wandb.Settings(silent=True),
    ) as told:  # fmt: skip
        for row in logbook.rows:
            told.log(row)
        told.summary.update(logbook.summary)
        heading, *lines = logbook.table
        told.log({"matrix": wandb.Table(columns=list(heading), data=[list(line) for line in lines])})
        artifact = wandb.Artifact(f"report-{logbook.key}", type="report")
        for path in logbook.files:
            artifact.add_file(str(path))
        told.log_artifact(artifact)


def write_trackio(logbook: Logbook, run: Run) -> None:
    """A run of trackio, whose database is of the user's cache; `trackio show` opens it."""
    import trackio

    trackio.init(project=logbook.project, name=logbook.name, group=logbook.name, resume="allow", embed=False)
    heading, *lines = logbook.table
    for step, row in enumerate(logbook.rows):
        trackio.log(row, step=step)
    table = trackio.Table(columns=list(heading), data=[list(line) for line in lines])
    trackio.log({**logbook.summary, "matrix": table}, step=len(logbook.rows) - 1)
    artifact = trackio.Artifact(f"report-{logbook.key}", type="report")
    for path in logbook.files:
        artifact.add_file(str(path))
    trackio.log_artifact(artifact)
    trackio.finish()


def write_mlflow(logbook: Logbook, run: Run) -> None:
    """A run of MLflow, in the same experiment as the rounds' own."""
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", logbook.project))
    told = find_mlflow_run(logbook.key)
    with mlflow.start_run(run_id=told, run_name=logbook.name, tags={MLFLOW_TAG: logbook.key}):
        for step, row in enumerate(logbook.rows):
            mlflow.log_metrics(row, step=step)
        mlflow.log_metrics(logbook.summary)
        heading, *lines = logbook.table
        columns = dict(zip(heading, (list(column) for column in zip(*lines, strict=True)), strict=True))
        mlflow.log_table(columns, "matrix.json")
        for path in logbook.files:
            mlflow.log_artifact(str(path))


# What is told at the end, by the tracker's name in `train.report_to`; the others have the rounds' own logs alone.
WRITERS: dict[str, Callable[[Logbook, Run], None]] = {
    "tensorboard": write_tensorboard,
    "wandb": write_wandb,
    "trackio": write_trackio,
    "mlflow": write_mlflow,
}
