"""What the tests of methods share: a round's specification and rows, its trainer, and two short rounds from it."""

from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.data.tokens import TOKEN_FEATURES
from hftcli.freezing.roles import assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.methods import make_methods
from hftcli.models.checkpoint import load_model
from hftcli.models.description import describe_model
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import EarlierRound, RoundSpec
from hftcli.training.round import run_round
from hftcli.training.trainers import TaskTrainer, make_training_arguments

START = PACKAGE / "tinyworld" / "model"


def make_spec(method: dict, earlier: tuple[tuple[str, Path], ...] = (), share: float = 0.5, **train: object) -> RoundSpec:
    settings = {"bf16": False, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    return RoundSpec(
        objective="sft", index=len(earlier), model=ModelSection(path=str(START)), data=DataSection(max_length=32), task="new",
        freeze=FreezeRule(trainable_fraction=share), train=TrainSection(**settings | train),
        launch=LaunchSection(num_processes=1), method=MethodSection.model_validate(method),
        earlier=tuple(EarlierRound(task=task, folder=str(folder)) for task, folder in earlier),
    )  # fmt: skip


def make_rows(*firsts: int) -> Dataset:
    """Rows of four tokens, the last two of which are trained; the first tells them apart."""
    rows = [{"input_ids": [first, 5, 6 + first % 40, 7], "labels": [-100, -100, 6 + first % 40, 7]} for first in firsts]
    return Dataset.from_list(rows, features=TOKEN_FEATURES)


def halve(folder: Path) -> Path:
    """The embedded model in bfloat16."""
    AutoModelForCausalLM.from_pretrained(START, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(START).save_pretrained(folder)
    return folder


def make_trainer(spec: RoundSpec, rows: dict[str, Dataset], folder: Path) -> TaskTrainer:
    described = describe_model(str(START))
    units = assign_roles(described.model_type, described.parameters)
    plan = make_plan(units, spec.freeze, spec.index)
    methods = make_methods(spec)
    dataset = rows["new"]
    for method in methods:
        plan = method.narrow_plan(plan, units)
        dataset = method.prepare_rows(dataset, rows)
    model = load_model(spec.model, START, plan, mixed=False, sharded=False)
    for method in methods:
        method.prepare_model(model, plan, START, mixed=False, sharded=False)
    args = make_training_arguments(spec, folder)
    return TaskTrainer(model, args, dataset, AutoTokenizer.from_pretrained(START), [], methods, "plain")


def train(spec: RoundSpec, rows: dict[str, Dataset], folder: Path) -> dict[str, torch.Tensor]:
    """How far each parameter moved."""
    trainer = make_trainer(spec, rows, folder)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}


def run_rounds(folder: Path, method: dict, start: Path = START, train: dict | None = None, **launch: object) -> list[Round]:
    """Two short rounds on the embedded sequence, one from the other; `train` are settings that are others than here."""
    settings = {"bf16": False, "max_steps": 4, "learning_rate": 1e-3, "global_batch_size": 8} | (train or {})
    tasks = ["tinyworld/newcomers", "tinyworld/topic"]
    rounds = [Round(folder / f"{place:02d}") for place in range(2)]
    for place, round_ in enumerate(rounds):
        spec = RoundSpec(
            objective="sft", index=place, data=DataSection(max_length=64, max_examples=64), task=tasks[place],
            model=ModelSection(path=str(rounds[place - 1].checkpoint if place else start)), freeze=FreezeRule(),
            train=TrainSection(**settings),
            launch=LaunchSection(**{"num_processes": 1} | launch), method=MethodSection.model_validate(method),
            earlier=tuple(EarlierRound(task=tasks[before], folder=str(rounds[before].folder)) for before in range(place)),
        )  # fmt: skip
        round_.folder.mkdir(parents=True)
        write_model(round_.spec_path, spec)
        if spec.launch.num_processes == 1:
            run_round(round_, StopRequest(round_))
        else:
            launch_round(round_, spec.launch, lambda progress: None)
        assert round_.read_result().verification.passed
    return rounds


def read_weights(round_: Round) -> dict[str, torch.Tensor]:
    return load_file(round_.checkpoint / "model.safetensors")
