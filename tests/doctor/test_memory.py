"""Whether a round fits, by bytes counted by hand, and what is proposed where it does not."""

import os
from dataclasses import replace

import pytest
from freezing.shapes import make_llama

from hftcli.commands.look import _examine
from hftcli.doctor.doctor import HostReport
from hftcli.doctor.memory import check_host, check_memory, give_memory, share_memory, suggest_launch
from hftcli.errors import InputError
from hftcli.freezing.activations import Network, Workload
from hftcli.freezing.budget import Budget, Limits
from hftcli.freezing.roles import Parameter, Unit, assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.sections import LaunchSection, TrainSection
from hftcli.recipe.slurm import SlurmSection

REPORT = HostReport(versions={}, num_gpus=8, device_bytes=80 * 10**9, sees_file=True)


@pytest.fixture
def budget() -> Budget:
    units = [
        Unit("model.norm", "final_norm", None, (Parameter("model.norm.weight", (400,)),)),
        Unit("lm_head", "head", None, (Parameter("lm_head.weight", (20, 30)),)),
    ]
    return Budget(
        make_plan(units, FreezeRule(head="freeze"), 0), precision="mixed", num_processes=8, zero_stage=2,
        network=Network("not counted", units, 1), work=Workload(1, 8),
    )  # fmt: skip


def test_what_does_not_fit_comes_with_the_smallest_change_that_does(budget):
    # By hand: ZeRO 2 takes 2000 + 200 + 600 = 2800 bytes on each of 8 devices, ZeRO 3 takes 250 + 200 + 600 = 1050.
    assert check_memory(budget, 10_000).status == "ok"
    assert check_memory(budget, 3000).status == "warning"
    found = check_memory(budget, 2000)
    assert (found.status, found.fix) == ("fault", "launch.zero_stage: 3 (0.00 GB on each)")
    assert suggest_launch(budget, 900).startswith("16 devices at launch.zero_stage: 3")
    assert suggest_launch(budget, 1) == "a smaller model"
    assert suggest_launch(replace(budget, reference="full"), 3500).startswith("reference: precompute")
    assert "cannot be seen from here" in check_memory(budget, None).message


def test_a_smaller_micro_batch_is_proposed_where_activations_are_what_is_too_large():
    units = assign_roles("llama", make_llama(num_layers=2, hidden=64, inner=128, keys=64, vocabulary=100))
    budget = Budget(
        make_plan(units, FreezeRule(), 0), precision="float32", num_processes=1, zero_stage=2,
        network=Network("llama", units, 4), work=Workload(64, 512),
    )  # fmt: skip
    least = replace(budget, work=Workload(1, 512, checkpoint_every=1)).half.high_bytes
    assert check_memory(budget, budget.half.high_bytes).status == "ok"
    assert check_memory(budget, budget.half.total_bytes).status == "warning"
    found = check_memory(budget, least)
    assert found.status == "fault"
    assert found.fix.startswith("train.fit: auto")
    assert not suggest_launch(budget, least - 1).startswith("train.fit: auto")
    checked = replace(budget, work=replace(budget.work, checkpoint_every=1))
    assert suggest_launch(checked, least).startswith("train.fit: auto without train.activation_checkpointing, which takes")


def test_nothing_is_proposed_that_a_method_does_not_go_with(budget):
    """A method that asks the start: a copy of what trains, which cannot be precomputed, at no more than ZeRO 2."""
    held = replace(budget, reference="shared", asks_start=True, limits=Limits(can_fit=False, most_stage=2), zero_stage=1)
    # By hand: on each of 8 devices 2000 + 400 x 4 + 600 and a copy of 2 x 400; at ZeRO 2 the gradients' 1600 are 200.
    # A fifth of a device is left for activations, which are not counted.
    assert check_memory(held, 4999).fix == "launch.zero_stage: 2 (0.00 GB on each)"
    assert suggest_launch(held, 4100).startswith("16 devices at launch.zero_stage: 2")
    assert suggest_launch(held, 3500) == "a smaller model"
    assert suggest_launch(replace(held, limits=Limits(most_stage=0)), 4999) == "a smaller model"


def test_room_is_left_for_what_is_not_counted():
    units = assign_roles("llama", make_llama(num_layers=2, hidden=64, inner=128, keys=64, vocabulary=100))
    budget = Budget(
        make_plan(units, FreezeRule(), 0), precision="float32", num_processes=1, zero_stage=2,
        network=Network("llama", units, 4), work=Workload(64, 512), uncounted=("what a method compares",),
        limits=Limits(can_fit=False),
    )  # fmt: skip
    found = check_memory(budget, budget.half.high_bytes)
    assert found.status == "warning"
    assert "besides, uncounted, what a method compares; there are" in found.message
    assert found.fix.startswith("train.per_device_train_batch_size: 1 and train.activation_checkpointing: true")
    assert check_memory(budget, budget.half.high_bytes * 5 // 4 + 1).status == "ok"


def test_memory_of_a_rank(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert share_memory(LaunchSection(num_nodes=1, num_processes=2), []) == machine // 2
    hosts = LaunchSection(hostfile="hosts", num_nodes=2, num_processes=8)
    assert share_memory(hosts, [REPORT, REPORT.model_copy(update={"device_bytes": 40})]) == 40
    assert share_memory(hosts, [REPORT.model_copy(update={"num_gpus": 0, "device_bytes": 80})]) == 10
    assert share_memory(LaunchSection(slurm=SlurmSection(), num_nodes=2, num_processes=8), []) is None


def test_a_fit_has_the_memory_that_it_would_read(monkeypatch):
    """Of what can be seen from here, and where it is to read any."""
    fitted = TrainSection(fit="auto")
    monkeypatch.setattr("hftcli.doctor.memory.count_gpus", lambda: 2)
    monkeypatch.setattr("hftcli.doctor.memory.measure_device_bytes", lambda: 80)
    here = LaunchSection(num_nodes=1, num_processes=2)
    assert give_memory(fitted, here, []).memory_bytes == 80
    given, unfitted = TrainSection(fit="auto", memory_bytes=70), TrainSection()
    assert (give_memory(given, here, []), give_memory(unfitted, here, [])) == (given, unfitted)
    assert give_memory(fitted, LaunchSection(num_nodes=2, num_processes=2), []) == fitted
    hosts = LaunchSection(hostfile="hosts", num_nodes=2, num_processes=8)
    assert give_memory(fitted, hosts, [REPORT, REPORT.model_copy(update={"device_bytes": 40})]).memory_bytes == 40
    monkeypatch.setattr("hftcli.doctor.memory.count_gpus", lambda: 0)
    with pytest.raises(InputError, match="there is no GPU"):
        give_memory(fitted, here, [])
    with pytest.raises(InputError, match="there is no GPU"):
        give_memory(fitted, hosts, [REPORT, REPORT.model_copy(update={"num_gpus": 0})])


def test_the_doctor_counts_what_a_fit_leaves(monkeypatch):
    """With the micro-batch as it is given the round would not fit."""
    recipe = load_recipe("tinyworld", ["train.fit=auto", "train.bf16=false", "train.per_device_train_batch_size=32"])
    monkeypatch.setattr("hftcli.doctor.memory.count_gpus", lambda: 1)
    status = {}
    for num_bytes in (10**9, 2 * 10**8):
        monkeypatch.setattr("hftcli.doctor.memory.measure_device_bytes", lambda num_bytes=num_bytes: num_bytes)
        for fit in ("auto", None):
            changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"fit": fit})})
            status[num_bytes, fit] = {one.check: one.status for one in _examine(changed, True)}["memory"]
    assert status == {(10**9, "auto"): "ok", (10**9, None): "ok", (2 * 10**8, "auto"): "ok", (2 * 10**8, None): "fault"}


def test_an_optimizer_on_the_host_needs_the_hosts_memory(budget, monkeypatch):
    """18 bytes of the host for each of 400 weights that train, and without a GPU what the device would hold besides."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    launch = LaunchSection(num_nodes=1, num_processes=1)
    assert check_host(budget, launch, machine) is None
    offloaded = replace(budget, num_processes=1, offload=True)
    assert offloaded.host.host_bytes == 18 * 400
    assert check_host(offloaded, launch, machine).status == "ok"
    assert check_host(offloaded, LaunchSection(num_nodes=2, num_processes=1), None) is None

    def grow(num_trainable: int) -> Budget:
        plan = offloaded.plan.model_copy(update={"num_trainable": num_trainable, "num_parameters": num_trainable})
        return replace(offloaded, plan=plan)

    found = check_host(grow(machine // 18), launch, 1000)
    assert found.status == "fault"
    assert found.fix == "2 machines like this one, or train less with freeze.trainable_fraction or freeze.frozen_prefix"
    assert check_host(grow(machine // 18), launch, machine).fix.startswith("launch.offload: none (")
