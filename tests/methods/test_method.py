"""All methods: which go together, which launches carry them, and whole rounds."""

import pytest
from methods.rounds import make_spec, read_weights, run_rounds
from pydantic import ValidationError

from hftcli.errors import InputError
from hftcli.launching.carrying import check_method
from hftcli.methods import make_methods
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import LaunchSection


@pytest.mark.parametrize(
    "names",
    [
        ("gem", "agem"),
        *(("lora", "olora"), ("lora", "ia3"), ("olora", "ia3")),
        *(("ewc", "lora"), ("ewc", "olora"), ("ewc", "ia3"), ("l2sp", "lora"), ("l2sp", "olora"), ("l2sp", "ia3")),
    ],
)
def test_methods_that_contradict_each_other_are_refused(names):
    with pytest.raises(ValidationError, match=f"{names[0]} and {names[1]} do not go together: .*: drop one"):
        MethodSection.model_validate({name: {"strength": 1} if name == "l2sp" else {} for name in names})


def test_the_other_methods_go_together():
    names = [method.__class__.__name__ for method in make_methods(make_spec({"gem": {}, "replay": {}, "ewc": {}}))]
    assert names == ["Replay", "Ewc", "Gem"]


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("gem", 1, "with 2 processes ZeRO has taken it apart"),
        ("agem", 2, "with 2 processes ZeRO has taken it apart"),
        ("ewc", 3, "measures every weight on its own, and under launch.zero_stage 3"),
        ("olora", 3, "compares its adapters with those before, and under launch.zero_stage 3"),
        ("l2sp", 3, "compares every weight with its start, and under launch.zero_stage 3"),
    ],
)
def test_a_launch_that_cannot_carry_a_method_is_refused(name, stage, message):
    spec = make_spec({name: {"strength": 1} if name == "l2sp" else {}})
    with pytest.raises(InputError, match=message):
        check_method(spec.model_copy(update={"launch": LaunchSection(num_processes=2, zero_stage=stage)}))
    check_method(spec)  # one process


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"gem": {}},
        {"agem": {}},
        {"replay": {"when": "after"}},
        {"lora": {}, "gem": {}},
        {"ia3": {}},
        {"l2sp": {"strength": 0.1}},
    ],
)
def test_rounds_with_a_method_are_verified(tmp_path, method):
    rounds = run_rounds(tmp_path, method)
    assert all(round_.read_result().num_steps >= 4 for round_ in rounds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ia3", "l2sp"])
def test_two_ranks_agree_with_one_process_under_a_method(tmp_path, name):
    """In bfloat16 with float32 masters on one side, whose weights DeepSpeed takes apart on the other."""
    method = {name: {"strength": 1.0} if name == "l2sp" else {}}
    one, two = (
        [read_weights(round_) for round_ in run_rounds(tmp_path / str(num), method, num_processes=num, zero_stage=2)]
        for num in (1, 2)
    )
    for single, pair in zip(one, two, strict=True):
        assert all((single[key] - pair[key]).abs().max() < 2e-3 for key in single)
