"""Biases alone: which they are, what they cost, two steps by hand, and which models have none."""

from pathlib import Path

import pytest
import torch
from freezing.families import CONFIGS, build_units
from safetensors.torch import load_file
from training.quiet_rounds import LEARNING_RATE, make_spec, make_start, read_batch, read_model, run
from transformers import AutoConfig, AutoModelForCausalLM

from hftcli.errors import ModelError
from hftcli.freezing.activations import Network, Workload
from hftcli.freezing.budget import Budget
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.models.proof import verify_round
from hftcli.training.probe import measure_steps

BITFIT = {"grain": "biases", "trainable_fraction": 1.0, "embeddings": "freeze", "head": "freeze"}
HAVE_BIASES = ("qwen2", "gpt_neox", "gpt2", "gpt_oss")


@pytest.mark.parametrize("family", HAVE_BIASES)
def test_all_biases_train_and_nothing_else(family: str):
    """As the paper has it, those of norms among them; the final norm's weight is none."""
    units = build_units(family, **CONFIGS[family])
    plan = make_plan(units, FreezeRule.model_validate(BITFIT), 0)
    names = [parameter.name for unit in units for parameter in unit.parameters]
    assert list(plan.trained) == [name for name in names if name.endswith("bias")]
    assert plan.num_trainable < 0.1 * plan.num_parameters


def test_embeddings_and_head_have_their_own_keys():
    units = build_units("gpt_neox", **CONFIGS["gpt_neox"])
    plan = make_plan(units, FreezeRule.model_validate({"grain": "biases", "head": "freeze"}), 0)
    trained = {unit.role for unit in units for parameter in unit.parameters if parameter.name in plan.trained}
    assert {"gpt_neox.embed_in.weight"} == {name for name in plan.trained if not name.endswith("bias")}
    assert trained == {"embedding", "attention", "mlp", "norm", "final_norm"}
    own = [unit.name for unit in units if unit.role == "mlp"]
    assert sum(f"{name}.bias" in plan.trained for name in own) == len(own) // 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "olmo2"])
def test_a_model_without_biases_is_refused(family: str):
    with pytest.raises(ModelError, match="no biases") as caught:
        make_plan(build_units(family, **CONFIGS[family]), FreezeRule.model_validate(BITFIT), 0)
    assert "LN_TUNING" in caught.value.fix


@pytest.mark.parametrize("embeddings", ["train", "freeze"])
def test_the_plan_counts_what_a_step_holds(embeddings: str):
    """Gradients and states to the byte; of activations, what flows above the first bias."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 96}
    units = build_units("qwen2", **sizes)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes), dtype=torch.float32)
    rule = FreezeRule.model_validate(BITFIT | {"embeddings": embeddings})
    network = Network("qwen2", units, 4)
    work = Workload(2, 32, loss="plain")
    budget = Budget(make_plan(units, rule, 0), "float32", 1, 0, network, work, on_gpu=False)
    measured = measure_steps(model, budget.plan, work)
    assert measured.gradients_bytes == budget.half.gradients_bytes == 4 * budget.plan.num_trainable
    assert measured.optimizer_bytes == budget.half.optimizer_bytes
    assert budget.half_step is not None
    assert measured.activations_bytes == pytest.approx(budget.half_step[0].saved_bytes, rel=0.01)


def test_two_steps_are_those_of_adamw_on_the_biases(tmp_path: Path):
    start = make_start(tmp_path / "start")
    train = {"max_steps": 2, "global_batch_size": 16, "per_device_train_batch_size": 16}
    round_ = run(tmp_path / "00", make_spec(start, BITFIT, train=train))
    assert verify_round(round_).passed
    model, batch = read_model(start), read_batch(round_)
    biases = [value.requires_grad_(name.endswith("bias")) for name, value in model.named_parameters()]
    optimizer = torch.optim.AdamW([value for value in biases if value.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    before, after = (load_file(folder / "model.safetensors") for folder in (start, round_.checkpoint))
    for name, value in model.named_parameters():
        assert torch.allclose(after[name], value, rtol=0, atol=2e-6), name
        assert torch.equal(before[name], after[name]) is not name.endswith("bias"), name


def test_every_family_with_biases_is_known_as_such():
    """So that the refusal says what is so."""
    found = set()
    for family, sizes in CONFIGS.items():
        names = [parameter.name for unit in build_units(family, **sizes) for parameter in unit.parameters]
        found |= {family} if any(name.endswith("bias") for name in names) else set()
    assert set(HAVE_BIASES) <= found
