"""Slurm: the batch script that runs `hft` in an allocation, and the srun step that runs one round on its nodes.

The batch script runs the front on the first node; the front starts every round with srun, one rank a task, so that a run of
many rounds keeps its allocation, and a signal to srun reaches the ranks with no launcher in between. Exit code 75 queues the
job again, unless it was cancelled, or has no step checkpoints: the same command then goes on where it stopped.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hftcli.errors import InputError
from hftcli.launching.hosts import collect_environment, is_secret
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.sections import LaunchSection
from hftcli.recipe.slurm import SlurmSection
from hftcli.runs.files import write_text
from hftcli.runs.run import Run

# What one task does. The shell stays alive under the signals that its rank acts on. srun ends a step at once when a task fails,
# so a rank that fails waits for rank 0 to say why.
TASK = """\
trap : INT TERM USR1
hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST") || exit
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=${hosts%%$'\\n'*} MASTER_PORT=$1
export LOCAL_WORLD_SIZE=$2
shift 2
"$@"
code=$?
[ "$code" -eq 0 ] || sleep 3
exit "$code"
"""

SCRIPT = """\
#!/bin/bash
{directives}

# Written by hft. Queue it with: sbatch {path}

# USR1 is Slurm's word to this shell alone that the time is nearly over. TERM goes to every process of a job that is cancelled
# or preempted: it stops in the same way, and what becomes of it is not for this script to say.
front=
early=
warned=
cancelled=
trap 'signalled=1; early=USR1; warned=1; [ -z "$front" ] || kill -USR1 "$front"' USR1
trap 'signalled=1; early=TERM; [ -n "$warned" ] || cancelled=1; [ -z "$front" ] || kill -TERM "$front"' TERM

cd {folder} || exit
{exports}
# srun takes over the cores of a task only from this name.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

{command} &
front=$!
[ -z "$early" ] || kill -"$early" "$front"
# `wait` returns at each signal, and the run is still writing its checkpoint then.
signalled=1
while [ -n "$signalled" ]; do
    signalled=
    wait "$front"
    code=$?
done

[ "$code" -ne 138 ] || code=75 # USR1 came before the front could take it, and nothing had begun
if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then
    {ending}
fi
exit "$code"
"""
REQUEUE = """\
echo "stopped by a signal; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"\
"""
NO_REQUEUE = 'echo "stopped by a signal; there are no step checkpoints to go on from, so the job is not queued again"'


def make_step_command(worker: Sequence[str], launch: LaunchSection, port: int) -> list[str]:
    """The srun command that runs a worker as every rank of an allocation."""
    return [
        "srun",
        f"--nodes={launch.num_nodes}",
        f"--ntasks={launch.num_ranks}",
        f"--ntasks-per-node={launch.num_processes}",
        "--kill-on-bad-exit=1",
        "bash", "-c", TASK, "hft", str(port), str(launch.num_processes), *worker,
    ]  # fmt: skip


def make_script(
    run: Run, command: Sequence[str], launch: LaunchSection, environment: Mapping[str, str], has_steps: bool = True
) -> str:
    """The text of the batch script.

    Args:
        run: the run's folder, which takes the script and the job's output.
        command: what the first node runs.
        launch: with `num_nodes` and `num_processes` resolved, and a section `slurm`.
        environment: what goes along to the nodes. Secrets are left out: sbatch hands on those of the shell that submits.
        has_steps: whether step checkpoints are written: without them a round would begin again and again.
    """
    slurm, (num_nodes, num_processes) = launch.slurm or SlurmSection(), launch.shape
    options = {
        "job-name": run.folder.name,
        "nodes": num_nodes,
        "ntasks-per-node": num_processes,
        "gres": slurm.gres or f"gpu:{num_processes}",
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time,
        "output": run.folder.resolve() / "slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_seconds}",
    }
    directives = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    secrets = [name for name, value in environment.items() if is_secret(name, value)]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name not in secrets]
    exports += [f"# {name} is not written here, as a secret: set it where sbatch is called" for name in secrets]
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in [*directives, "--requeue", *slurm.options]),
        path=shlex.quote(str(run.script_path)),
        folder=shlex.quote(os.getcwd()),
        exports="\n".join(exports),
        command=shlex.join(command),
        ending=REQUEUE if has_steps else NO_REQUEUE,
    )


def write_script(run: Run, subcommand: str, launch: LaunchSection, has_steps: bool) -> Path:
    """Write the batch script of a claimed run.

    Args:
        subcommand: that of `hft` which goes on with the run: `sft`, `dpo`.
        launch: with `num_nodes` and `num_processes` resolved, and a section `slurm`.
        has_steps: as in `make_script`.

    Raises:
        InputError: `.deepspeed_env` is faulty.
    """
    command = [sys.executable, "-m", "hftcli", subcommand, "--recipe", str(run.recipe_path), "--output", str(run.folder)]
    write_text(run.script_path, make_script(run, command, launch, collect_environment(os.environ), has_steps))
    return run.script_path


def submit(script: Path) -> str:
    """Queue a batch script.

    Returns:
        The job's id.

    Raises:
        InputError: there is no sbatch here, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("--submit: there is no sbatch on this machine", f"queue it where there is: sbatch {script}") from None
    if done.returncode:
        raise InputError(f"sbatch refuses {script}: {done.stderr.strip()}", "change the keys of launch.slurm")
    return done.stdout.strip()


def add_section(recipe: Recipe) -> Recipe:
    """The recipe, to be launched with Slurm; a section that it has is kept."""
    launch = recipe.launch.model_copy(update={"slurm": recipe.launch.slurm or SlurmSection()})
    return recipe.model_copy(update={"launch": launch})


def check_allocation(launch: LaunchSection, environment: Mapping[str, str]) -> None:
    """Raises: InputError: srun is to launch, and this process is in no allocation."""
    if launch.slurm and "SLURM_JOB_ID" not in environment:
        raise InputError(
            "launch.slurm launches with srun, and this shell is in no allocation of Slurm's",
            "add --slurm, which writes the batch script; or run this in salloc; or --set launch.slurm=null",
        )
