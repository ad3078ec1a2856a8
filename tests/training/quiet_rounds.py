"""What the tests of directions and columns share: a model of two layers, and short rounds from it, in this process."""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hftcli import PACKAGE
from hftcli.freezing.rule import FreezeRule
from hftcli.launching.processes import StopRequest
from hftcli.recipe.sections import CheckpointSection, DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import EarlierRound, RoundSpec
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.round import run_round

TINYWORLD = PACKAGE / "tinyworld" / "model"
LEARNING_RATE = 3e-3


def make_start(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model of two layers, with biases and grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=704,
        max_position_embeddings=256, attention_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINYWORLD).save_pretrained(folder)
    return folder


def make_spec(start: Path, freeze: dict, place: int = 0, earlier: tuple[Path, ...] = (), **values: object) -> RoundSpec:
    train = {"bf16": False, "max_steps": 4, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_steps": 0}
    sections = {"checkpoint": CheckpointSection(), "objective": "sft", "launch": LaunchSection(num_processes=1)}
    task = ("tinyworld/newcomers", "tinyworld/topic")[place]
    if "dpo" not in values:
        values = {"task": task, "data": DataSection(max_length=64, max_examples=16)} | values
    return RoundSpec(
        index=place, model=ModelSection(path=str(start)), freeze=FreezeRule.model_validate(freeze),
        train=TrainSection(
            **train | {"global_batch_size": 8, "per_device_train_batch_size": 8, "max_grad_norm": 0.0} | values.pop("train", {})
        ),
        earlier=tuple(EarlierRound(task=task, folder=str(folder)) for folder in earlier), **sections | values,
    )  # fmt: skip


def run(folder: Path, spec: RoundSpec) -> Round:
    round_ = Round(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(round_.spec_path, spec)
    run_round(round_, StopRequest(round_))
    return round_


def make_pairs_spec(start: Path, freeze: dict, reference: str) -> RoundSpec:
    data = DataSection(path="tinyworld/preferences", max_length=64, max_examples=16)
    return make_spec(start, freeze, objective="dpo", dpo=DpoSection(), reference=reference, data=data)


def read_model(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def go_back(done: Round, step: int, folder: Path) -> Round:
    """A round as it was when it was killed after a step."""
    shutil.copytree(done.folder, folder)
    round_ = Round(folder)
    round_.result_path.unlink()
    shutil.rmtree(round_.checkpoint)
    for later in round_.saved_steps:
        if later > step:
            shutil.rmtree(round_.steps / str(later))
    return round_


def read_inputs(model: torch.nn.Module, modules: dict[str, str], texts: list[list[int]]) -> dict[str, np.ndarray]:
    """What modules read of texts, one text at a time, (tokens, inputs) in float64."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in modules}
    handles = [
        model.get_submodule(module).register_forward_pre_hook(
            lambda layer, given, name=name: found[name].append(given[0][0].double().numpy())
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for ids in texts:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def read_batch(round_: Round) -> dict[str, torch.Tensor]:
    """All rows of a round, padded."""
    rows = tokenize_rows(read_assignment(round_.read_spec()), lambda done, total: None).train
    longest = max(map(len, rows["input_ids"]))
    fill = {"input_ids": 0, "labels": -100}
    padded = {key: [[*row, *[value] * (longest - len(row))] for row in rows[key]] for key, value in fill.items()}
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows["input_ids"]]
    return {key: torch.tensor(value) for key, value in (padded | {"attention_mask": mask}).items()}
