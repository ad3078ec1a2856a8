"""The fit: what a memory carries, from the budget."""

from dataclasses import replace

import pytest

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.freezing.activations import LossKernel, Network
from hftcli.freezing.budget import Budget
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.carrying import check_sorting
from hftcli.launching.planning import (
    PLAIN_BYTES,
    apply_fit,
    bound_batch,
    choose_fit,
    find_arithmetic,
    find_attention,
    list_checkpointing,
    list_works,
    make_budget,
)
from hftcli.models.description import describe_model
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.records import FitReport
from hftcli.runs.spec import RoundSpec
from hftcli.training.reading import fit_round


def make_spec(**train: object) -> RoundSpec:
    return RoundSpec(
        objective="sft", index=0, model=ModelSection(path="m"), data=DataSection(path="d", max_length=128), freeze=FreezeRule(),
        train=TrainSection(global_batch_size=12, per_device_train_batch_size=8, fit="auto", **train),
        launch=LaunchSection(num_processes=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    described = describe_model(str(PACKAGE / "tinyworld" / "model"))
    return Network(described.model_type, assign_roles(described.model_type, described.parameters), described.num_heads)


def budget_of(spec: RoundSpec, network: Network) -> Budget:
    return make_budget(spec, network, make_plan(network.units, spec.freeze, 0), 1, mixed=False)


def fit_to(budget: Budget, memory_bytes: int) -> tuple[RoundSpec, FitReport]:
    spec = make_spec()
    fit = choose_fit(spec, budget, memory_bytes)
    return spec.model_copy(update={"train": apply_fit(spec.train, fit)}), fit


def need(budget: Budget, size: int, every: int | None) -> int:
    return replace(budget, work=replace(budget.work, num_sequences=size, checkpoint_every=every)).half.high_bytes


def test_the_largest_divisor_of_the_batch_where_memory_is_plenty(network):
    spec, fit = fit_to(budget_of(make_spec(), network), 2**40)
    assert (fit.per_device_train_batch_size, fit.checkpoint_every) == (6, None)  # 8 and 7 do not divide 12
    assert spec.train.fit is None
    assert spec.train.per_device_train_batch_size == 6
    assert spec.num_accumulation_steps == 2
    assert not spec.train.activation_checkpointing


def test_less_memory_means_smaller_batches_before_checkpointing(network):
    budget = budget_of(make_spec(), network)
    _, fit = fit_to(budget, need(budget, 3, None))
    assert (fit.per_device_train_batch_size, fit.checkpoint_every) == (3, None)
    assert fit.needed_bytes == fit.memory_bytes


def test_the_least_checkpointing_that_fits(network):
    budget = budget_of(make_spec(), network)
    memory_bytes = need(budget, 1, 3)
    assert memory_bytes < need(budget, 1, 6) < need(budget, 1, None)
    spec, fit = fit_to(budget, memory_bytes)
    assert (fit.per_device_train_batch_size, fit.checkpoint_every) == (1, 3)
    assert spec.train.activation_checkpointing
    assert spec.train.extra["activation_checkpointing_kwargs"] == {"every_n_layers": 3}
    assert RoundSpec.model_validate_json(spec.model_dump_json()) == spec


def test_half_fits_where_full_fine_tuning_must_checkpoint(network):
    half = budget_of(make_spec(), network)
    memory_bytes = need(half, 1, None)
    full = replace(half, plan=make_plan(network.units, FreezeRule(trainable_fraction=1), 0))
    assert choose_fit(make_spec(), half, memory_bytes).checkpoint_every is None
    assert choose_fit(make_spec(), full, memory_bytes).checkpoint_every is not None


def test_what_does_not_fit_is_refused(network):
    with pytest.raises(InputError, match="a micro-batch of 1 with 128 tokens and every layer checkpointed needs"):
        choose_fit(make_spec(), budget_of(make_spec(), network), 1000)
    unknown = replace(network, model_type="gpt2")
    with pytest.raises(InputError, match="activations of model_type 'gpt2' are not counted"):
        choose_fit(make_spec(), budget_of(make_spec(), unknown), 2**40)


def test_the_worker_asks_for_a_limit_where_there_is_no_gpu(network, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = make_plan(network.units, FreezeRule(), 0)
    with pytest.raises(InputError, match="there is no GPU"):
        fit_round(make_spec(), network, plan)
    assert fit_round(make_spec(memory_bytes=2**40), network, plan)[1].memory_bytes == 2**40
    plain = make_spec().model_copy(update={"train": TrainSection()})
    found, fit = fit_round(plain, network, plan)
    assert fit is None
    assert found.train == plain.train.model_copy(update={"loss_kernel": "plain"})


def test_logits_are_kept_where_that_is_faster_and_they_are_few(network):
    """Not on a GPU, whose kernel leaves out what trains no token; and what is asked for is done."""
    plan = make_plan(network.units, FreezeRule(), 0)

    def choose(has_gpu: bool, length: int = 128, kernel: LossKernel | None = None) -> LossKernel:
        spec = make_spec(loss_kernel=kernel).model_copy(update={"data": DataSection(path="d", max_length=length)})
        return make_budget(spec, network, plan, 1, mixed=False, has_gpu=has_gpu).work.loss

    smoothed = make_spec(label_smoothing_factor=0.1)
    assert make_budget(smoothed, network, plan, 1, mixed=False).work.loss == "plain", "TRL keeps the logits for it"
    tokens = make_spec().model_copy(update={"method": MethodSection(peft={"type": "TRAINABLE_TOKENS", "token_indices": [5]})})
    assert make_budget(tokens, network, plan, 1, mixed=False, has_gpu=True).work.loss == "plain", (
        "a tied head has rows of its own"
    )
    many = PLAIN_BYTES // (4 * 8 * network.vocabulary) + 1  # tokens of each of 8 rows
    assert [choose(True), choose(False), choose(False, many)] == ["chunked", "plain", "chunked"]
    assert [choose(True, kernel="plain"), choose(False, kernel="chunked"), choose(False, many, "plain")] == [
        "plain", "chunked", "plain"
    ]  # fmt: skip


def test_the_fit_computes_the_logits_again_before_a_layer_if_they_are_the_less_work(network):
    budget = budget_of(make_spec(), network)
    works = [replace(budget, work=work) for work in list_works(budget, ("plain", "chunked"))]
    assert (works[0].work.checkpoint_every, works[0].work.loss) == (None, "plain")
    assert (works[-1].work.checkpoint_every, works[-1].work.loss) == (1, "chunked")
    again = [work.half_step[1].recompute for work in works]
    assert again == sorted(again)
    assert len(works) == 2 * len(list(list_checkpointing(network.num_layers)))
    assert choose_fit(make_spec(), budget, 2**40, has_gpu=False).loss_kernel == "plain"
    assert choose_fit(make_spec(), budget, 2**40).loss_kernel == "chunked"
    little = min(work.half.high_bytes for work in (replace(at, work=replace(at.work, num_sequences=1)) for at in works))
    fit = choose_fit(make_spec(), budget, little, has_gpu=False)
    least = replace(
        budget, work=replace(budget.work, num_sequences=1, checkpoint_every=fit.checkpoint_every, loss=fit.loss_kernel)
    )
    assert least.half.high_bytes == little
    assert apply_fit(make_spec().train, fit).loss_kernel == fit.loss_kernel


def test_a_pair_is_two_sequences(network):
    pairs = make_spec().model_copy(update={"objective": "dpo", "dpo": DpoSection(), "reference": "precompute"})
    assert budget_of(pairs, network).work.num_sequences == 2 * budget_of(make_spec(), network).work.num_sequences


@pytest.mark.parametrize(
    ("method", "num_readings"),
    [
        ({}, 0),
        ({"anchor": {"strength": 1}}, 1),
        ({"anchor": {"strength": 1, "top_k": 8}}, 0),
        ({"ift": {"mix": 0.2}}, 1),
        ({"ift": {"mix": 0}}, 0),
        ({"anchor": {"strength": 1}, "self_replay": {"loss": "kl", "fraction": 0.25}}, 1.2),  # of 5 rows one is a text
        ({"self_replay": {"loss": "ce"}}, 0),
    ],
)
def test_what_reads_a_batch_ahead_is_a_forward_pass_more(network, method, num_readings):
    spec = make_spec().model_copy(update={"method": MethodSection.model_validate(method)})
    plain, read = (budget_of(one, network).half_step[1] for one in (make_spec(), spec))
    assert read.reading_ahead == pytest.approx(num_readings * plain.forward)
    trained = plain.forward + plain.activation_gradient + plain.weight_gradient
    assert read.total - read.recompute == pytest.approx(trained + num_readings * plain.forward)


@pytest.mark.parametrize(("reference", "num_readings"), [("precompute", 0), ("shared", 1), ("full", 1)])
def test_a_reference_that_is_asked_in_every_step_is_a_forward_pass_more(network, reference, num_readings):
    pairs = make_spec().model_copy(update={"objective": "dpo", "dpo": DpoSection(), "reference": reference})
    flops = budget_of(pairs, network).half_step[1]
    assert flops.reading_ahead == num_readings * flops.forward


def test_communication_by_hand(network):
    """DeepSpeed's bucket of half a billion elements, its float32 copy as far as it is full, at stage 3 the gathered weights."""
    spec = make_spec()
    plan = make_plan(network.units, spec.freeze, 0)

    def buffers(stage: int) -> int:
        staged = spec.model_copy(update={"launch": LaunchSection(num_processes=2, zero_stage=stage)})
        budget = make_budget(staged, network, plan, 2, mixed=True)
        return budget.half.buffers_bytes - budget.half_step[0].working_bytes

    assert [buffers(stage) for stage in range(4)] == [
        2 * plan.num_trainable, 2_000_000_000, 1_000_000_000 + 4 * plan.num_trainable,
        1_000_000_000 + 4 * plan.num_trainable + 2 * plan.num_parameters,
    ]  # fmt: skip


def test_intervals_from_none_to_all():
    assert list(list_checkpointing(8)) == [None, 8, 4, 3, 2, 1]
    assert list(list_checkpointing(1)) == [None, 1]


def test_names_of_kernels():
    assert [find_attention(name) for name in (None, "sdpa", "eager", "flash_attention_2")] == ["sdpa", "sdpa", "eager", "flash"]
    assert (find_arithmetic(True, 1), find_arithmetic(True, 2), find_arithmetic(False, 2)) == (
        "autocast",
        "bfloat16",
        "float32",
    )


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"), [(32, 32, 2, 16), (32, 8, 2, 8), (10, 4, 3, 4), (6, 4, 1, 4), (6, 8, 1, 6)]
)
def test_a_micro_batch_is_no_more_than_a_processes_share(batch, micro, processes, expected):
    train = TrainSection(global_batch_size=batch, per_device_train_batch_size=micro)
    assert bound_batch(train, processes).per_device_train_batch_size == expected


@pytest.mark.parametrize("loss", ["aot", ("sigmoid", "aot_unpaired")])
def test_a_loss_that_sorts_has_pairs_to_sort(network, monkeypatch, loss):
    """Be it one pair as it is given, as a process's share of the batch, or as the fit finds it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pairs = make_spec(bf16=False).model_copy(update={"objective": "dpo", "reference": "precompute"})
    plan = make_plan(network.units, FreezeRule(), 0)
    budget = make_budget(pairs.model_copy(update={"dpo": DpoSection()}), network, plan, 1, False, has_gpu=False)

    def check(loss: str | tuple[str, ...], num_processes: int, size: int) -> None:
        train = bound_batch(TrainSection(global_batch_size=4, per_device_train_batch_size=size), num_processes)
        launch = LaunchSection(num_processes=num_processes)
        check_sorting(pairs.model_copy(update={"dpo": DpoSection(loss_type=loss), "train": train, "launch": launch}))

    def fit(loss: str | tuple[str, ...], size: int) -> int:
        train = pairs.train.model_copy(update={"memory_bytes": need(budget, 2 * size, None)})
        spec = pairs.model_copy(update={"dpo": DpoSection(loss_type=loss), "train": train})
        return fit_round(spec, network, plan)[1].per_device_train_batch_size

    for num_processes, size in ((1, 1), (4, 4)):
        check("sigmoid", num_processes, size)
        with pytest.raises(InputError, match="sorts the pairs of a micro-batch, of which each process has one at a time"):
            check(loss, num_processes, size)
    check(loss, 2, 4)
    assert (fit("sigmoid", 1), fit(loss, 2)) == (1, 2)
    with pytest.raises(InputError, match="sorts the pairs of a micro-batch"):
        fit(loss, 1)
