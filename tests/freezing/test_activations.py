"""Activations against what autograd keeps, FLOPs against counts by hand, and the backward pass that ends early."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from freezing.shapes import make_llama
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.masking_utils import flash_attention_mask, flex_attention_mask
from trl.trainer.utils import add_fused_lm_head

from hftcli import PACKAGE
from hftcli.freezing.activations import Adapters, Network, Workload
from hftcli.freezing.budget import estimate_memory
from hftcli.freezing.passes import count_activations
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan, make_plan
from hftcli.models.checkpoint import freeze_model, halve_frozen
from hftcli.models.description import describe_model
from hftcli.training.loss import DPO_OUTPUTS, SFT_OUTPUTS, keep_logits, set_loss_kernel
from hftcli.training.probe import SavedTensors, compute_loss, make_inputs, make_random_model, measure_steps
from hftcli.training.trainers import checkpoint_layers

EMBEDDED = PACKAGE / "tinyworld" / "model"
PREFIX = FreezeRule(frozen_prefix=0.34)  # two of the embedded model's six layers


def describe(folder: Path | str, rule: FreezeRule) -> tuple[Network, FreezePlan]:
    described = describe_model(str(folder))
    units = assign_roles(described.model_type, described.parameters)
    return Network(described.model_type, units, described.num_heads), make_plan(units, rule, 0)


def check_measured(folder: Path | str, rule: FreezeRule, work: Workload, attn_implementation: str | None = None) -> float:
    """Weights, gradients and states to the byte; gives estimated over measured activations."""
    network, plan = describe(folder, rule)
    measured = measure_steps(make_random_model(str(folder), attn_implementation), plan, work)
    precision = "mixed" if work.arithmetic == "autocast" else "float32"
    memory = estimate_memory(plan.num_parameters, plan.num_trainable, precision=precision, num_processes=1, zero_stage=0)
    assert measured.weights_bytes == memory.weights_bytes
    assert measured.gradients_bytes == memory.gradients_bytes
    assert measured.optimizer_bytes == memory.optimizer_bytes
    activations, _ = count_activations(network, frozenset(plan.trained), work)
    return (activations.saved_bytes + activations.cast_bytes) / measured.activations_bytes


@pytest.mark.parametrize(
    ("work", "share", "attn_implementation"),
    [
        (Workload(2, 96), 0.5, None),
        (Workload(1, 128), 1.0, None),
        (Workload(2, 64, packed=True), 0.5, None),
        (Workload(2, 96, attention="eager"), 0.5, "eager"),
        (Workload(2, 96, loss="plain"), 0.5, None),
        (Workload(1, 96, loss="plain", arithmetic="autocast"), 1.0, None),
        (Workload(2, 96, arithmetic="autocast"), 0.5, None),
        (Workload(2, 96, checkpoint_every=3), 0.5, None),
    ],
    ids=["half", "full", "packed", "eager", "plain loss", "plain loss in autocast", "autocast", "every third layer"],
)
def test_activations_are_those_that_autograd_keeps(work, share, attn_implementation):
    ratio = check_measured(EMBEDDED, FreezeRule(trainable_fraction=share), work, attn_implementation)
    assert ratio == pytest.approx(1, abs=0.002)


def test_activations_of_wholly_checkpointed_layers():
    """The hooks do not see the rotary angles, which the layers' recomputation holds."""
    work = Workload(2, 96, checkpoint_every=1)
    assert 1 <= check_measured(EMBEDDED, FreezeRule(), work) < 1.05


@pytest.mark.parametrize("role", ["norm", "embedding"])
def test_adapters_of_norms_and_embeddings_pass_gradients_down_to_them(role: str):
    """As deep as full fine-tuning's, but without a gradient of any matrix."""
    network, plan = describe(EMBEDDED, FreezeRule(trainable_fraction=1))
    adapted = {unit.parameters[0].name for unit in network.units if unit.role == role}
    work, adapters = Workload(2, 96), Adapters(0, name="PEFT's", shapes=((8,),))
    kept, flops = count_activations(network, adapted, work, adapters)
    full_kept, full = count_activations(network, frozenset(plan.trained), work)
    assert (flops.forward, flops.activation_gradient) == (full.forward, full.activation_gradient)
    assert flops.weight_gradient == 0
    assert 0.5 * full_kept.saved_bytes < kept.saved_bytes < full_kept.saved_bytes
    low_rank = {unit.parameters[0].name for unit in network.units if unit.role in ("attention", "mlp")}
    _, own = count_activations(network, low_rank, work, Adapters(8))
    assert own == count_activations(network, low_rank, work, Adapters(8, name="LORA", shapes=((8,),)))[1]


SETTINGS = [
    ("stories15M", 0.5, None, 64),
    ("stories15M", 1.0, 1, 64),
    ("MiniMind2-Small", 0.5, None, 64),
    ("MiniMind2-Small", 1.0, 2, 64),
]


@pytest.mark.parametrize(
    ("model", "share", "every", "length"),
    [*SETTINGS, *(pytest.param(*setting[:3], 256, marks=pytest.mark.slow) for setting in SETTINGS)],
)
def test_activations_of_real_models(shared, model, share, every, length):
    """MiniMind2 groups its keys and values; both models tie the head to the embeddings."""
    ratio = check_measured(
        shared / "models" / model, FreezeRule(trainable_fraction=share), Workload(2, length, checkpoint_every=every)
    )
    assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("arithmetic", ["float32", "autocast"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_activations_with_flash_attention(packed, arithmetic):
    """A kernel that needs no mask: torch's own for the CPU, which keeps what flash-attn's keeps."""
    AttentionInterface.register("without_mask", attend_flash)
    AttentionMaskInterface.register("without_mask", flash_attention_mask)
    work = Workload(2, 96, packed=packed, attention="flash", arithmetic=arithmetic)
    assert check_measured(EMBEDDED, FreezeRule(), work, "without_mask") == pytest.approx(1, abs=0.005)


def attend_flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    return found.transpose(1, 2).contiguous(), None


FLEX = [(None, False, "float32"), (None, True, "autocast"), ("MiniMind2-Small", True, "float32"),
        ("MiniMind2-Small", False, "autocast")]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of calls within transformers and torch
@pytest.mark.parametrize(
    ("model", "packed", "arithmetic"),
    [case if case[0] is None else pytest.param(*case, marks=pytest.mark.slow) for case in FLEX],
)
def test_activations_with_flex_attention(monkeypatch, request, model, packed, arithmetic):
    """What its graph keeps is counted after the forward pass; on a CPU torch refuses it for want of a backward pass alone."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    AttentionInterface.register("by_blocks", attend_flex)
    AttentionMaskInterface.register("by_blocks", flex_attention_mask)
    work = Workload(2, 128, packed=packed, attention="flash", arithmetic=arithmetic)
    folder = EMBEDDED if model is None else request.getfixturevalue("shared") / "models" / model
    network, plan = describe(folder, FreezeRule())
    model = make_random_model(str(folder), "by_blocks")
    freeze_model(model, plan)
    if arithmetic == "autocast":
        halve_frozen(model)
    set_loss_kernel(model.train(), work.loss)
    inputs = make_inputs(model.config.vocab_size, work, torch.device("cpu"))
    saved = SavedTensors(model)
    with saved.watch(), torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
        loss = compute_loss(model, inputs)
    activations, _ = count_activations(network, frozenset(plan.trained), work)
    assert loss.requires_grad
    assert (activations.saved_bytes + activations.cast_bytes) / saved.num_bytes == pytest.approx(1, abs=0.005)


def attend_flex(module, query, key, value, attention_mask, scaling=None, **kwargs):
    found, _ = flex_attention.flex_attention(
        query, key, value, block_mask=attention_mask, enable_gqa=True, scale=scaling,
        return_aux=flex_attention.AuxRequest(lse=True),
    )  # fmt: skip
    return found.transpose(1, 2).contiguous(), None


def test_activations_of_a_layer_by_hand():
    """One layer, full fine-tuning, one sequence, float32: what each operation keeps, written out."""
    units = assign_roles("llama", make_llama(num_layers=1, hidden=8, inner=24, keys=4, vocabulary=10))
    work = Workload(1, 5)
    activations, flops = count_activations(Network("llama", units, 2), {p.name for u in units for p in u.parameters}, work)
    a_token = {
        "tokens": 8,
        "norms": 3 * (4 * 8 + 4 + 4 * 8),  # input, scale, normalized
        "inputs of q, k, v and of gate, up": 2 * 4 * 8,
        "query, key, value, output": 4 * (8 + 4 + 4 + 8),
        "logarithms of the sums of the scores": 4 * 2,
        "angles": 4 * 2 * 4,
        "gate, active, up, product": 4 * 4 * 24,
        "hidden states of the loss": 4 * 8,
        "targets, logarithms, entropies, mask": 8 + 4 + 4 + 1,
    }
    assert activations.saved_bytes == 5 * sum(a_token.values())
    weights = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24
    head, scores = 2 * 8 * 10, 4 * 8 * 2.5  # causal attention: half of the scores
    assert flops.forward == 2 * weights + scores + head
    assert flops.activation_gradient == 2 * weights + 2.5 * scores + head
    assert flops.weight_gradient == 2 * weights + head
    assert flops.recompute == head
    again = count_activations(
        Network("llama", units, 2), {p.name for u in units for p in u.parameters}, replace(work, checkpoint_every=1)
    )[1]
    assert again.recompute == head + 2 * weights + scores - 2 * 8 * 24  # all but the last multiplication


def test_flops_of_llama_2_7b():
    """Half the matrices save a sixth of the FLOPs of the layers, an eighth with checkpointing: a little less with the head."""
    units = assign_roles("llama", make_llama(32, 4096, 11008, 4096, 32000))
    network = Network("llama", units, 32)
    everything = frozenset(parameter.name for unit in units for parameter in unit.parameters)

    def compare(rule: FreezeRule, every: int | None) -> float:
        work = Workload(1, 2048, attention="flash", arithmetic="bfloat16", checkpoint_every=every)
        trained = frozenset(make_plan(units, rule, 0).trained)
        return count_activations(network, trained, work)[1].total / count_activations(network, everything, work)[1].total

    assert compare(FreezeRule(), None) == pytest.approx(1 - 0.157, abs=0.01)
    assert compare(FreezeRule(), 1) == pytest.approx(1 - 0.118, abs=0.01)
    assert compare(FreezeRule(frozen_prefix=0.25), None) == pytest.approx(0.75, abs=0.02)
    assert compare(FreezeRule(frozen_prefix=0.25), 1) == pytest.approx(0.75, abs=0.02)


def test_an_unknown_family_is_not_guessed():
    assert count_activations(Network("gpt2", (), 4), set(), Workload(1, 8)) is None


@pytest.mark.parametrize("every", [None, 1])
def test_the_backward_pass_ends_above_a_frozen_prefix(every):
    """Nothing is kept below it, nothing is computed again there, and what trains gets the gradients of a whole pass."""
    network, plan = describe(EMBEDDED, PREFIX)
    model = load_embedded()
    work = Workload(2, 64, loss="plain", checkpoint_every=every)
    inputs = make_inputs(model.config.vocab_size, work, torch.device("cpu"))
    expected = take_gradients(model, inputs)
    freeze_model(model, plan)

    calls: Counter[int] = Counter()
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: calls.update([index]))
    if every is not None:
        set_up_checkpointing(model, every)
    saved = SavedTensors(model)
    with saved.watch():
        loss = compute_loss(model, inputs)
    activations, flops = count_activations(network, frozenset(plan.trained), work)
    assert saved.num_bytes == pytest.approx(activations.saved_bytes, rel=0.05)
    loss.backward()
    assert calls == {index: 2 if every and index >= 2 else 1 for index in range(6)}
    assert model.model.embed_tokens.weight.grad is None
    for name in plan.trained:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name])
    _, flops_of_all = count_activations(network, {*plan.trained, *plan.frozen}, work)
    assert flops.activation_gradient < 0.75 * flops_of_all.activation_gradient


def load_embedded(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The embedded model in float32, from a start in some data type, with the plain loss."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=dtype).float().train()
    set_loss_kernel(model, "plain")
    return model


def set_up_checkpointing(model: torch.nn.Module, every: int) -> None:
    """As the trainer does, and then without its hook."""
    kwargs = {"every_n_layers": every, "use_reentrant": False}
    args = TrainingArguments(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs, use_cpu=True)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad, "transformers sets no hook any more"
    checkpoint_layers(model, args)
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def take_gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    compute_loss(model, inputs).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("every", [1, 2, 4])
def test_checkpointing_some_layers_changes_no_gradient(every):
    _, plan = describe(EMBEDDED, FreezeRule())
    model = load_embedded()
    freeze_model(model, plan)
    inputs = make_inputs(model.config.vocab_size, Workload(2, 64), torch.device("cpu"))
    expected = take_gradients(model, inputs)
    args = TrainingArguments(
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"every_n_layers": every, "use_reentrant": False},
        use_cpu=True,
    )
    checkpoint_layers(model, args)
    checkpoint_layers(model, args)  # as often as one likes: no hook is left behind
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [index % every == 0 for index in range(6)]
    found = take_gradients(model, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("outputs", [SFT_OUTPUTS, DPO_OUTPUTS])
def test_both_loss_kernels_are_the_model_itself(outputs):
    """Loss and gradients, with prompts of two lengths that train no token; and what DPO asks besides."""
    _, plan = describe(EMBEDDED, FreezeRule())
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).train()
    freeze_model(model, plan)
    inputs = make_inputs(model.config.vocab_size, Workload(2, 64), torch.device("cpu"))
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :9] = inputs["labels"][1, :30] = inputs["labels"][1, -1] = -100
    loss = model(**inputs).loss
    loss.backward()
    expected = {name: model.get_parameter(name).grad for name in plan.trained}
    model.zero_grad()

    add_fused_lm_head(model, outputs=outputs)
    chunked = model(**inputs, fused_lm_head=True)
    gradients = take_gradients(model, inputs)
    keep_logits(model, outputs)
    plain = model(**inputs, fused_lm_head=True)
    for name in (*outputs, "label_mask"):
        torch.testing.assert_close(getattr(plain, name), getattr(chunked, name), rtol=1e-4, atol=1e-5)
    assert compute_loss(model, inputs).item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in take_gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_batch_that_trains_no_token_has_a_gradient_of_zeros():
    """As with TRL's kernel: another micro-batch of the step, or another rank, has tokens."""
    model = load_embedded()
    inputs = make_inputs(model.config.vocab_size, Workload(1, 16), torch.device("cpu"))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    model(**inputs, fused_lm_head=True).log_probs.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_a_frozen_half_held_in_bfloat16_is_the_one_that_autocast_rounds():
    """To the bit, from a start in bfloat16: a frozen weight has no update that a float32 copy could keep."""
    _, plan = describe(EMBEDDED, FreezeRule())
    found = []
    for halve in (False, True):
        model = load_embedded(torch.bfloat16)
        freeze_model(model, plan)
        if halve:
            halve_frozen(model)
        torch.manual_seed(0)
        inputs = make_inputs(model.config.vocab_size, Workload(2, 64), torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(take_gradients(model, inputs))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])
