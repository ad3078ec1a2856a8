"""Hostfiles, read as DeepSpeed reads them, and what of the environment goes along."""

from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from hftcli.errors import InputError
from hftcli.launching.hosts import collect_environment, count_slots, is_secret, read_hostfile
from hftcli.recipe.trainer_keys import TRACKERS


@pytest.fixture
def write(tmp_path):
    def make(text: str) -> Path:
        path = tmp_path / "hosts"
        path.write_text(text)
        return path

    return make


def test_hosts_are_those_that_deepspeed_reads(write):
    path = write("# a cluster\nworker-0 slots=8\n\n  me@10.0.0.2\tslots=4   # the old one\n")
    hosts = read_hostfile(path)
    assert {host.name: host.num_slots for host in hosts} == dict(fetch_hostfile(str(path)))
    assert [(host.address, host.place) for host in hosts] == [("worker-0", f"{path}:2"), ("10.0.0.2", f"{path}:4")]


def test_every_faulty_line_is_named_at_once(write):
    path = write("a slots=x\nb\nc slots=0\nd slots=1\n-oProxyCommand=x slots=1\nd slots=2\n")
    with pytest.raises(InputError) as caught:
        read_hostfile(path)
    lines = caught.value.message.splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "2", "3", "5", "6"]
    assert lines[0] == f"{path}:1: expected `host slots=8`, with one slot or more, got 'a slots=x'"
    assert lines[4] == f"{path}:6: d is given twice, first at {path}:4"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("# none\n", "names no host"), ("localhost slots=1\nb slots=1\n", "where the other hosts find themselves")],
)
def test_hostfiles_that_cannot_work(write, text, message):
    with pytest.raises(InputError, match=message):
        read_hostfile(write(text))


def test_a_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"launch\.hostfile .*none cannot be read"):
        read_hostfile(tmp_path / "none")


def test_hosts_run_equally_many_processes(write):
    even, uneven = read_hostfile(write("a slots=4\nb slots=4\n")), read_hostfile(write("a slots=4\nb slots=2\n"))
    assert count_slots(even, None) == 4
    assert count_slots(uneven, 2) == 2
    with pytest.raises(InputError, match="b has 2 slots, but a has 4"):
        count_slots(uneven, None)
    with pytest.raises(InputError, match=r"hosts:2: launch\.num_processes is 3, but b has 2 slots"):
        count_slots(uneven, 3)


def test_the_environment_that_goes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("# site\nNCCL_SOCKET_IFNAME=eth1\nMY_FLAG = a=b\n")
    given = {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "secret",
        "CUDA_VISIBLE_DEVICES": "0",
        "EDITOR": "vi",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    assert collect_environment(given) == {
        "HF_TOKEN": "secret", "MY_FLAG": "a=b", "NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "eth1",
    }  # fmt: skip
    (tmp_path / "other").write_text("A=1\nexport B\n")
    with pytest.raises(InputError, match=r"other:2: expected NAME=value, got 'export B'"):
        collect_environment({"DS_ENV_FILE": "other"})


PLACES = {
    "AZUREML_RUN_ID": "a", "CLEARML_API_HOST": "http://a", "COMET_WORKSPACE": "a", "DAGSHUB_CLIENT_HOST": "http://a",
    "DVC_STUDIO_URL": "http://a", "MLFLOW_TRACKING_URI": "http://a:5000", "MLFLOW_EXPERIMENT_NAME": "a",
    "NEPTUNE_PROJECT": "a/b", "SWANLAB_PROJECT": "a", "TENSORBOARD_LOGGING_DIR": "/a", "TRACKIO_DIR": "/a",
    "WANDB_PROJECT": "a",
}  # fmt: skip
TOKENS = (
    "AZUREML_RUN_TOKEN", "CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY", "COMET_API_KEY", "DAGSHUB_USER_TOKEN",
    "DVC_STUDIO_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "NEPTUNE_API_TOKEN", "SWANLAB_API_KEY",
    "TRACKIO_WEBHOOK_URL", "WANDB_API_KEY",
)  # fmt: skip


def test_every_tracker_is_found_from_the_other_machines(tmp_path, monkeypatch):
    """Where it is may be shown, and what lets one in may not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = PLACES | dict.fromkeys(TOKENS, "a")
    assert collect_environment(given) == given
    assert {name for name, value in given.items() if is_secret(name, value)} == set(TOKENS)
    named = {name.partition("_")[0].lower() for name in PLACES} - {"dvc"} | {"dvclive"}
    assert named == {package.partition("_")[0] for package in TRACKERS.values()}


def test_what_is_secret():
    secrets = {"HF_TOKEN": "a", "WANDB_API_KEY": "a", "AWS_SECRET_ACCESS_KEY": "a", "http_proxy": "http://ada:word@proxy:80"}
    others = {"TOKENIZERS_PARALLELISM": "a", "HF_TOKEN_PATH": "/a", "https_proxy": "http://proxy:80", "NCCL_DEBUG": "a:b@c"}
    assert [name for name, value in (secrets | others).items() if is_secret(name, value)] == list(secrets)
