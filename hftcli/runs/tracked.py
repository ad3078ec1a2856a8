"""How a run and its rounds are called in trackers: by the same name and key when they are started again."""

import hashlib

from hftcli.runs.run import Round, Run

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
    }
