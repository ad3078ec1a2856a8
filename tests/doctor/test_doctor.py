"""What the doctor finds, against machines that are described by hand and the one that is here."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest

from hftcli import __version__
from hftcli.doctor.disk import (
    check_disk,
    count_checkpoint_bytes,
    count_masters_bytes,
    count_step_bytes,
    judge_disk,
)
from hftcli.doctor.doctor import (
    Finding,
    HostReport,
    Probe,
    check_devices,
    check_hosts,
    check_launcher,
    check_packages,
    judge_host,
    measure_device_bytes,
)
from hftcli.freezing.roles import Parameter, Unit
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.launching.hosts import Host
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import LaunchSection
from hftcli.recipe.slurm import SlurmSection
from hftcli.runners import count_rounds
from hftcli.runs.files import write_model
from hftcli.runs.made import CheckpointIdentity, DeltaRecord

HOST = Host("worker-1", 8, "hosts:2")
REPORT = HostReport(versions={"hft": "1", "torch": "2"}, num_gpus=8, device_bytes=80 * 10**9, sees_file=True)


def statuses(findings: list[Finding]) -> list[str]:
    return [finding.status for finding in findings]


def test_installed_packages_are_held_against_those_that_hft_asks_for(monkeypatch):
    assert statuses(check_packages()) == ["ok"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=99", "not-there-at-all", "x; extra == 'y'"])
    torch, missing, last = check_packages()
    assert (torch.status, missing.status, last.status) == ("fault", "fault", "ok")
    assert "and hft needs >=99" in torch.message
    assert missing.fix == "pip install 'not-there-at-all'"


@pytest.mark.parametrize(
    ("cuda", "num_devices", "is_faster", "expected"),
    [
        ("12.8", 2, True, ("ok", "2 GPUs")),
        (None, 0, False, ("fault", "CPU build")),
        ("13.0", 0, False, ("fault", "can use 0")),
        ("12.8", 2, False, ("warning", "bfloat16")),
    ],
)
def test_gpus_that_torch_cannot_use_are_a_fault(monkeypatch, cuda, num_devices, is_faster, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    findings = check_devices(Probe(cuda, num_devices, is_faster, {}), None)
    assert any(found.status == expected[0] and expected[1] in found.message for found in findings), findings


@pytest.mark.parametrize(
    ("mask", "order", "expected"),
    [
        ("GPU-2a3b", None, 81559),
        ("GPU-2a, GPU-3c", None, 81559),
        ("GPU-1f,GPU-2a", None, 6138),
        ("1,2", "PCI_BUS_ID", 81559),
        ("0", "PCI_BUS_ID", 6138),
        ("1", None, 6138),  # CUDA counts the fastest first, and 1 may be the small one
        ("MIG-7e", None, 6138),
        (None, None, 6138),
    ],
)
def test_memory_is_that_of_the_gpus_that_are_visible(monkeypatch, tmp_path, mask, order, expected):
    """A small GPU for the screen beside two large ones, in MiB."""
    rows = ("0, GPU-1f00, NVIDIA RTX A2000, 6138", "1, GPU-2a3b, NVIDIA H100, 81559", "2, GPU-3c4d, NVIDIA H100, 81559")
    listed = "".join(f"echo 'GPU {row}'\n" for row in rows)
    asked = "".join(f"echo '{row}'\n" for row in rows)
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n{listed}else\n{asked}fi\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("CUDA_VISIBLE_DEVICES", mask), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert measure_device_bytes() == expected * 2**20


def test_without_gpus_there_are_cpu_ranks(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert statuses(check_devices(Probe(None, 0, False, {}), None)) == ["ok"]


@pytest.mark.parametrize(
    ("gpus", "asked", "is_faster", "has_mac_gpu", "said"),
    [
        ("", "null", False, False, ["CPU ranks, float32"]),
        ("", "null", True, False, ["CPU ranks, bfloat16"]),
        ("", "false", True, False, ["CPU ranks, float32"]),
        ("", "true", True, False, ["CPU ranks, bfloat16"]),
        ("", "true", False, False, ["CPU ranks, bfloat16", "this processor has no matrix units for bfloat16 (AMX)"]),
        ("", "true", False, True, ["computes there, in bfloat16", "a Mac's GPU has never been tried in bfloat16"]),
        ("0", "null", False, False, ["1 GPUs", "rounds run in float32"]),
        ("0", "false", False, False, ["1 GPUs"]),
        ("0", "true", False, False, ["1 GPUs", "imitate it slowly"]),
    ],
)
def test_what_bfloat16_is_on_a_device_is_said(monkeypatch, gpus, asked, is_faster, has_mac_gpu, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    recipe = load_recipe(None, [f"train.bf16={asked}"])
    findings = check_devices(Probe("12.8" if gpus else None, len(gpus), is_faster, {}, has_mac_gpu), recipe)
    assert statuses(findings) == ["ok", "warning"][: len(said)]
    for found, words in zip(findings, said, strict=True):
        assert words in found.message
    elsewhere = load_recipe(None, [f"train.bf16={asked}", "launch.hostfile=hosts"])
    if not gpus:  # of the machines that it launches to, this one says nothing
        assert statuses(check_devices(Probe(None, 0, is_faster, {}, has_mac_gpu), elsewhere)) == ["ok"]


def test_the_gpu_of_a_mac_is_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = check_devices(Probe(None, 0, False, {}, has_mac_gpu=True), None)
    assert (found.status, found.message.partition(":")[0]) == ("ok", "a Mac's GPU (MPS)")


def test_launchers_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = check_launcher(LaunchSection(slurm=SlurmSection()))
    assert (found.status, found.message) == ("fault", "not found: sbatch, srun, scontrol")
    assert statuses(check_launcher(LaunchSection(hostfile="hosts"))) == ["fault"]
    assert statuses(check_launcher(LaunchSection())) == ["ok"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (REPORT.model_copy(update={"versions": {"hft": "1", "torch": "3"}}), "other versions: torch 3 (here 2)"),
        (REPORT.model_copy(update={"sees_file": False}), "does not see what this machine writes"),
        (REPORT.model_copy(update={"num_gpus": 4}), "hosts:2: 8 ranks, but 4 GPUs"),
        ("Permission denied (publickey).", "hosts:2: Permission denied (publickey)."),
    ],
)
def test_a_host_that_differs_is_a_fault(answer, message):
    (found,) = judge_host(HOST, answer, {"hft": "1", "torch": "2"}, 8, Path("/runs"))
    assert (found.check, found.status) == ("host worker-1", "fault")
    assert message in found.message
    assert found.fix


def test_hosts_are_asked_over_ssh(tmp_path, monkeypatch):
    """In place of ssh, a script that runs the command here, and refuses one host."""
    (tmp_path / "ssh").write_text(
        '#!/bin/bash\ncommand=${!#}; shift $(($# - 2))\n[ "$1" != gone ] || { echo "ssh: gone: no route" >&2; exit 255; }\n'
        'exec bash -c "$command"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shared = tmp_path / "shared"
    shared.mkdir()
    findings, reports = check_hosts([Host("a", 2, "hosts:1"), Host("gone", 2, "hosts:2")], 2, shared)
    assert statuses(findings) == ["ok", "fault"]
    assert findings[1].message == "hosts:2: ssh: gone: no route"
    assert reports[0].versions["hft"] == __version__
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize(("free", "status"), [(10_000, "ok"), (1100, "warning"), (999, "fault")])
def test_disk_is_held_against_the_checkpoints(tmp_path, free, status):
    assert judge_disk(tmp_path, free, 600, 400).status == status


@pytest.fixture
def plan() -> FreezePlan:
    """200 of 300 weights train."""
    units = [
        Unit("model.norm", "final_norm", None, (Parameter("model.norm.weight", (200,)),)),
        Unit("lm_head", "head", None, (Parameter("lm_head.weight", (10, 10)),)),
    ]
    return make_plan(units, FreezeRule(head="freeze"), 0)


@pytest.mark.parametrize(
    ("dtype", "num_rounds", "expected"),
    [
        ("bfloat16", 1, (800, 0)),  # 200 weights in float32
        ("bfloat16", 2, (1200, 800)),  # never more than all 300, beside those of the round before
        ("bfloat16", 3, (1200, 1200)),
        ("float32", 8, (0, 0)),
        ("null", 1, (800, 0)),  # an unseen start may be in 16 bits
    ],
)
def test_masters_of_two_rounds_lie_side_by_side_while_the_second_are_written(plan, dtype, num_rounds, expected):
    recipe = load_recipe(None, [f"model.dtype={dtype}"])
    assert count_masters_bytes(recipe, Path("owner/name"), plan, num_rounds) == expected


@pytest.mark.parametrize(
    ("overrides", "is_seen", "num_bytes"),
    [
        ([], True, 999),
        ([], False, 1200),
        (["model.dtype=bfloat16"], True, 600),
        (["checkpoint.format=delta"], True, 666),
        (["checkpoint.format=delta", "model.dtype=bfloat16"], False, 400),
    ],
)
def test_a_checkpoint_is_as_large_as_its_start_or_as_its_data_type_and_format_make_it(
    tmp_path, plan, overrides, is_seen, num_bytes
):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 999)
    start = tmp_path if is_seen else Path("owner/name")
    assert count_checkpoint_bytes(load_recipe(None, overrides), start, plan) == num_bytes


def test_a_start_that_is_a_delta_is_counted_whole(tmp_path, plan):
    (tmp_path / "delta.safetensors").write_bytes(b"x" * 10)
    record = DeltaRecord(base=CheckpointIdentity(path="base", files={}), fingerprint="f", dtype="bfloat16", tensors=())
    write_model(tmp_path / "delta.json", record)
    assert count_checkpoint_bytes(load_recipe(None), tmp_path, plan) == 600


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "num_bytes"),
    [
        ([], 1, 3 * 200 * 12),
        ([], 8, 3 * 200 * 16),
        (["checkpoint.keep=1"], 1, 2 * 200 * 12),
        (["checkpoint.save_every_minutes=null"], 1, 0),
        (["eval.num_points=3", "checkpoint.best=learning"], 1, 3 * 200 * (12 + 4)),
        (["eval.num_points=3", "stop.max_forgetting=0.1"], 8, 3 * 200 * (16 + 4)),
        (["freeze.pull.strength=1"], 1, 3 * 200 * (12 + 4)),
        (["freeze.average=0.9", "freeze.pull.strength=1"], 1, 3 * 200 * (12 + 4 + 4)),
        (["freeze.average=dynamic"], 1, 3 * 200 * (12 + 4 + 4)),
        (["method.token_weights.kind=psft"], 1, 3 * 200 * (12 + 4)),
        (["method.token_weights.kind=psft"], 8, 3 * 200 * (16 + 8 * 4)),  # each rank writes all of it
        (["method.token_weights={kind: psft, snapshot_steps: null}"], 8, 3 * 200 * 16),  # it stays the start
        (["freeze.pull.strength=1", "checkpoint.save_every_minutes=null"], 1, 0),
    ],
)
def test_step_checkpoints_are_those_kept_and_the_one_being_written(plan, overrides, num_ranks, num_bytes):
    """And all that each of them remembers of a trained weight."""
    assert count_step_bytes(load_recipe(None, overrides), plan, num_ranks) == num_bytes


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "num_bytes"),
    [
        ([], 1, 200 * 4 + 50 * 8),
        (["freeze.redraw.states=keep"], 1, 200 * 12),
        ([], 2, 200 * 8 + 50 * 8),
    ],
)
def test_of_draws_a_step_checkpoint_has_all_masters_and_the_moments_of_the_largest(plan, overrides, num_ranks, num_bytes):
    recipe = load_recipe(None, ["freeze.redraw.every=1", *overrides])
    assert count_step_bytes(recipe, plan, num_ranks, num_at_once=50) == 3 * num_bytes


def test_adapters_stand_for_the_weights_below_in_step_checkpoints(plan):
    assert count_step_bytes(load_recipe(None), plan, 1, num_adapter_weights=7) == 3 * 7 * 12


def test_entries_that_move_are_remembered_with_their_candidates():
    """Of 100 weights, 50 train: where each is, how old, where a candidate is, and three numbers of that, in 4 bytes each."""
    units = [Unit("layers.0.mlp.up_proj", "mlp", 0, (Parameter("layers.0.mlp.up_proj.weight", (10, 10)),))]
    plan = make_plan(units, FreezeRule(grain="entries", part="spiel"), 0)
    recipe = load_recipe(None, ["freeze={grain: entries, part: spiel}"])
    for num_ranks, num_bytes in ((1, 50 * (12 + 24)), (2, 50 * (16 + 2 * 24))):
        assert count_step_bytes(recipe, plan, num_ranks) == 3 * num_bytes


@pytest.mark.parametrize(("free", "is_fault"), [(3 * 2400, False), (3 * 2400 - 1, True)])
def test_every_round_of_ewc_leaves_its_fisher_information(tmp_path, plan, monkeypatch, free, is_fault):
    """Float32 of all 300 weights, beside checkpoints of 1200 bytes."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    recipe = load_recipe(
        None, [f"output={tmp_path}", "method.ewc={}", "model.dtype=float32", "checkpoint.save_every_minutes=null"], "continual"
    )
    found = check_disk(recipe, Path("owner/name"), plan, 1, 3)
    assert (found.status == "fault") == is_fault
    assert "of it method.ewc's Fisher information" in found.message


def test_what_step_checkpoints_hold_of_the_rows_is_said(tmp_path, plan):
    given = [f"output={tmp_path}", "method.anchor={strength: 1, top_k: 16}"]
    found = check_disk(load_recipe(None, given), tmp_path, plan, 1, 1)
    assert found.message.endswith("method.anchor.top_k's 128 bytes for each trained token, once for each rank, on top")
    for others in (["method.anchor.top_k=null"], ["checkpoint.save_every_minutes=null"]):
        assert "anchor" not in check_disk(load_recipe(None, [*given, *others]), tmp_path, plan, 1, 1).message


def test_every_round_of_a_run_leaves_a_checkpoint(tmp_path, plan, monkeypatch):
    """Eight rounds of 1200 bytes and three step checkpoints of 2400 do not fit where one round would."""
    free = shutil.disk_usage(tmp_path)._replace(free=12_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    recipe = load_recipe(None, [f"output={tmp_path}"])
    assert check_disk(recipe, Path("owner/name"), plan, 1, 1).status == "ok"
    assert check_disk(recipe, Path("owner/name"), plan, 1, 8).status == "fault"
    assert count_rounds(recipe) == 1
    assert count_rounds(load_recipe(None, objective="continual")) == 5


def test_a_folder_that_cannot_be_written(tmp_path, plan):
    recipe = load_recipe(None, ["output=/proc/run"])
    assert check_disk(recipe, tmp_path, plan, 1, 1).status == "fault"
    assert check_disk(load_recipe(None, [f"output={tmp_path}/a/b"]), tmp_path, plan, 1, 1).status == "ok"


@pytest.mark.slow
def test_the_command_by_json(hft, tmp_path):
    shown = hft("doctor", "--recipe", "tinyworld", "--output", tmp_path / "run", "--json").stdout
    found = {finding["check"]: finding["status"] for finding in json.loads(shown)}
    assert {"packages", "devices", "ops", "launcher", "disk", "memory"} == set(found)
    assert "fault" not in found.values()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_fault_among_the_rest(hft):
    refused = hft("doctor", "--recipe", "tinyworld", "--set", "model.path=./nowhere", code=2).stdout
    assert "fault   model" in refused
    assert "ok      packages" in refused
