"""How a run and its rounds are called in trackers: by the same name and key when they are started again."""

import hashlib
import json

from hftcli.runs.run import Round, Run

MLFLOW_TAG = "hft.run"  # of a run of MLflow, whose value is a key of `make_key`
PROJECT = "hft"  # where nothing else is said: the project of wandb and trackio, the experiment of MLflow


def make_key(run: Run, name: str = "") -> str:
    """The key of a run, or of one of its rounds: of its place and the moment at which it was begun."""
    created = run.read_manifest().created if run.manifest_path.exists() else ""
    return hashlib.sha256(f"{run.folder.resolve()} {created} {name}".encode()).hexdigest()[:16]


def find_run(round_: Round) -> Run:
    """The run that a round is of."""
    return Run(round_.folder.resolve().parents[1])


def list_variables(round_: Round, project: str) -> dict[str, str]:
    """What the callbacks of transformers read of the environment, where the user has not set it."""
    run = find_run(round_)
    return {
        "TENSORBOARD_LOGGING_DIR": str(round_.folder / "tensorboard"),  # its default is among the step checkpoints, which go
        "WANDB_PROJECT": project,
        "WANDB_RUN_GROUP": run.folder.name,
        "WANDB_RUN_ID": make_key(run, round_.name),
        "WANDB_RESUME": "allow",
        "MLFLOW_EXPERIMENT_NAME": project,
        "MLFLOW_TAGS": json.dumps({MLFLOW_TAG: make_key(run, round_.name)}),
    }


def find_mlflow_run(key: str) -> str | None:
    """The id of the run of MLflow that has a key of `make_key`; None where there is none."""
    import mlflow

    search = f"tags.`{MLFLOW_TAG}` = '{key}'"
    found = mlflow.search_runs(search_all_experiments=True, filter_string=search, max_results=1, output_format="list")
    return str(found[0].info.run_id) if found else None


def find_mlflow_variables(round_: Round) -> dict[str, str]:
    """What has the callback of transformers go on in the round's run of MLflow; nothing where it has none yet."""
    run_id = find_mlflow_run(make_key(find_run(round_), round_.name))
    # Its parameters stand there already, and MLflow takes no others in their place, such as another `train.logging_steps`.
    return {} if run_id is None else {"MLFLOW_RUN_ID": run_id, "MLFLOW_MAX_LOG_PARAMS": "0"}
