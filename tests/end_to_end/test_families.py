"""Every family that came without a run of its own: a small model is loaded, planned, trained, verified, asked and merged."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from freezing.families import CONFIGS
from models.small_models import TOKENIZER, read_all
from transformers import AutoConfig, AutoModelForCausalLM

from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import FreezePlan
from hftcli.launching.processes import StopRequest
from hftcli.models.arithmetic import merge_delta
from hftcli.models.proof import verify_round
from hftcli.recipe.sections import CheckpointSection, DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.files import read_model, write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import RoundSpec, Scoring
from hftcli.training.round import run_round

NEW = (
    "smollm3", "olmo3", "granite", "glm4", "qwen3_next", "qwen3_5_text", "llama4_text", "gemma3n_text", "gpt_oss", "falcon_h1",
    "mamba2",
)  # fmt: skip
STARCODER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def write_start(folder: Path, family: str, config: dict[str, object]) -> Path:
    torch.manual_seed(0)
    config = config | {name: len(TOKENIZER) for name in ("vocab_size", "vocab_size_per_layer_input") if name in config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    for name, values in model.named_parameters():
        if name.endswith("correct_output_scale"):  # transformers begins it at 0, where what it scales learns nothing
            values.data.fill_(1.0)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_a_small_model_of_every_new_family_goes_the_whole_way(family: str, tmp_path: Path):
    start = write_start(tmp_path / "start", family, CONFIGS[family])
    task = "tinyworld/newcomers"
    spec = RoundSpec(
        objective="sft", index=0, model=ModelSection(path=str(start)), data=DataSection(max_length=64, max_examples=32),
        task=task, freeze=FreezeRule(), checkpoint=CheckpointSection(format="delta"), launch=LaunchSection(num_processes=1),
        train=TrainSection(bf16=False, max_steps=2, learning_rate=1e-2, warmup_steps=0, global_batch_size=4),
        scoring=Scoring(after=(task,), max_examples=2),
    )  # fmt: skip
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    round_.folder.mkdir(parents=True)
    write_model(round_.spec_path, spec)
    run_round(round_, StopRequest(round_))
    assert round_.read_result().num_steps == 2
    assert verify_round(round_).passed

    merge_delta(round_.checkpoint, tmp_path / "merged")
    before, after = read_all(start), read_all(tmp_path / "merged")
    plan = read_model(round_.plan_path, FreezePlan)
    assert plan.frozen
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(plan.trained)


@pytest.mark.slow
def test_a_family_that_nobody_knows_trains_by_its_recipe_alone(hft, settings, tmp_path: Path):
    """`hft plan` proposes, the user pastes, and the run does the rest."""
    start = write_start(tmp_path / "start", "starcoder2", STARCODER | {"vocab_size": 40, "tie_word_embeddings": False})
    refused = hft("plan", "--model", start, code=2)
    assert "no roles are known for model_type 'starcoder2'" in refused.stderr
    assert yaml.safe_load(refused.stdout)["freeze"]["roles"] == {
        "embedding": "model.embed_tokens",
        "attention": "model.layers.*.self_attn.(q_proj|k_proj|v_proj|o_proj)",
        "mlp": "model.layers.*.mlp.(c_fc|c_proj)",
        "norm": "model.layers.*.(input_layernorm|post_attention_layernorm)",
        "final_norm": "model.norm",
        "head": "lm_head",
    }
    values = {
        "model.path": start, "data.path": "tinyworld/skill", "data.max_examples": 16, "data.max_length": 64,
        "train.max_steps": 2, "train.learning_rate": 0.01, "train.global_batch_size": 4, "train.bf16": False,
        "launch.num_processes": 1, "eval.tasks": "[]",
    }  # fmt: skip
    assert "hft plan" in hft("sft", "--output", tmp_path / "run", *settings(values), code=2).stderr
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(refused.stdout)
    planned = json.loads(hft("plan", recipe, *settings(values), "--json").stdout)
    assert planned["num_trainable_units"] == planned["num_units"] / 2 == 12
    hft("sft", "--recipe", recipe, "--output", tmp_path / "run", *settings(values))
    hft("verify", tmp_path / "run")
    assert "c_proj" in (tmp_path / "run" / "report.html").read_text()
    recipe.write_text(refused.stdout.replace("(c_fc|c_proj)", "c_proj"))
    error = hft("plan", recipe, *settings(values), code=2).stderr
    assert "no role is known for parameter model.layers.0.mlp.c_fc.weight and 2 others" in " ".join(error.split())
