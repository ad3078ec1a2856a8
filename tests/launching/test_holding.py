"""What methods hold on a device, by hand, and the ways to make a round fit that they leave open, as others refuse them."""

from contextlib import nullcontext, suppress

import pytest
from freezing.shapes import make_llama

from hftcli.errors import InputError, RecipeError
from hftcli.freezing.activations import Network
from hftcli.freezing.budget import Budget
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.cards import CHECKPOINTED, OFFLOADED, list_ways, make_full
from hftcli.launching.carrying import check_method
from hftcli.launching.holding import count_held
from hftcli.launching.planning import check_offload, check_pull, make_budget
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.spec import EarlierRound, RoundSpec

ANCHOR, STM = {"anchor": {"strength": 1}}, {"token_weights": {"kind": "stm"}}
EARLIER = ("a", "b", "new")


@pytest.fixture(scope="module")
def network() -> Network:
    units = assign_roles("llama", make_llama(num_layers=2, hidden=64, inner=128, keys=64, vocabulary=100))
    return Network("llama", units, 4)


def make_spec(method: dict, earlier: tuple[str, ...] = ()) -> RoundSpec:
    return RoundSpec(
        objective="sft", index=len(earlier), model=ModelSection(path="m"), data=DataSection(max_length=128), task="new",
        freeze=FreezeRule(), train=TrainSection(), launch=LaunchSection(num_processes=1),
        method=MethodSection.model_validate(method), earlier=tuple(EarlierRound(task=task, folder=task) for task in earlier),
    )  # fmt: skip


def budget_of(spec: RoundSpec, network: Network, num_processes: int = 1, mixed: bool = False) -> Budget:
    return make_budget(spec, network, make_plan(network.units, spec.freeze, 0), num_processes, mixed)


@pytest.mark.parametrize(
    ("method", "earlier", "num_processes", "mixed", "weight_bytes"),
    [
        ({"l2sp": {"strength": 1}}, (), 1, False, 4),  # the start, as the model has it
        ({"l2sp": {"strength": 1}}, (), 1, True, 4),
        ({"l2sp": {"strength": 1}}, (), 2, True, 2),
        ({"ewc": {}}, (), 1, True, 0),
        ({"ewc": {}}, EARLIER, 1, True, 8),  # and the Fisher information in float32
        ({"ewc": {}}, EARLIER, 2, True, 6),
        ({"ewc": {}, "l2sp": {"strength": 1}}, EARLIER[2:], 1, True, 12),
        ({"gem": {}}, EARLIER, 1, True, 8),  # a gradient of each of two other tasks
        ({"agem": {}}, EARLIER, 1, True, 4),
        ({"agem": {}}, EARLIER[2:], 1, True, 0),
        ({"replay": {}}, EARLIER, 1, True, 0),
    ],
)
def test_bytes_of_a_weight_by_hand(network, method, earlier, num_processes, mixed, weight_bytes):
    bare, held = (budget_of(make_spec(given, earlier), network, num_processes, mixed) for given in ({}, method))
    assert held.half.methods_bytes == weight_bytes * held.plan.num_trainable
    assert held.half.total_bytes - bare.half.total_bytes == held.half.methods_bytes
    assert held.full.total_bytes - bare.full.total_bytes == weight_bytes * held.plan.num_parameters


def test_a_recipe_counts_as_in_the_last_round_of_its_sequence():
    recipe = load_recipe("tinyworld-continual", ["method.gem={}"])
    assert count_held(recipe, 1, mixed=False) == 4 * 4  # the quick start has five tasks
    recipe = load_recipe("tinyworld-continual", ["method.gem={}", "continual.tasks=[tinyworld/topic, tinyworld/newcomers]"])
    assert count_held(recipe, 1, mixed=False) == 4


SETTINGS = [
    *({name: values} for name, values in {
        "replay": {}, "ewc": {}, "l2sp": {"strength": 1}, "gem": {}, "agem": {}, "self_replay": {"loss": "kl"}, "ift": {},
        "anchor": {"strength": 1, "top_k": 8}, "distill": {}, "token_weights": {"kind": "dft"},
    }.items()),
    {}, ANCHOR, STM,
]  # fmt: skip


@pytest.mark.parametrize("method", SETTINGS, ids=str)
def test_the_ways_that_are_open_are_those_that_nothing_refuses(network, method):
    limits = budget_of(make_spec(method), network).limits
    on_host = make_spec(method).model_copy(update={"launch": LaunchSection(num_processes=1, offload="optimizer")})
    with nullcontext() if limits.can_offload else pytest.raises(InputError, match="keeps them on the host"):
        check_offload(on_host)
    stages = [0]
    for stage in (1, 2, 3):
        spec = make_spec(method).model_copy(update={"launch": LaunchSection(num_processes=2, zero_stage=stage)})
        with suppress(InputError):
            check_method(spec)
            check_pull(spec)
            stages.append(stage)
    assert limits.most_stage == max(stages)
    given = [f"method.{name}={values}" for name, values in make_spec(method).method.model_dump(exclude_none=True).items()]
    with nullcontext() if limits.can_fit else pytest.raises(RecipeError, match="train.fit does not count what method"):
        load_recipe("tinyworld-continual", ["train.fit=auto", "train.loss_kernel=null", *given])


def test_cards_offer_only_what_goes_with_a_method(network):
    plain, anchored = (dict(list_ways(budget_of(make_spec(method), network))) for method in ({}, ANCHOR))
    assert plain[CHECKPOINTED].work.loss == "chunked"
    assert OFFLOADED in plain
    assert (anchored[CHECKPOINTED].work.loss, anchored[CHECKPOINTED].work.num_sequences) == ("plain", 1)
    assert OFFLOADED not in anchored
    # Full fine-tuning in its place has no method.
    bare, full = (dict(list_ways(make_full(budget_of(make_spec(method), network)))) for method in ({}, ANCHOR))
    assert {name: full[name].half for name in (CHECKPOINTED, OFFLOADED)} == {
        name: bare[name].half for name in (CHECKPOINTED, OFFLOADED)
    }
