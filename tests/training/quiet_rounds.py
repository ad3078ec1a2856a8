"""What the tests of what trains share: a model of two layers, short rounds from it, and what must be true of them alike."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hftcli import PACKAGE
from hftcli.freezing.rule import FreezeRule
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.models.proof import verify_round
from hftcli.models.reader import CheckpointReader
from hftcli.recipe.asking import AskingSection
from hftcli.recipe.sections import CheckpointSection, DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.spec import EarlierRound, RoundSpec, Scoring
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.round import run_round

TINYWORLD = PACKAGE / "tinyworld" / "model"
LEARNING_RATE = 3e-3
LEARNED, KNOWN = "tinyworld/newcomers", "tinyworld/facts"
ONCE = Scoring(
    before=(LEARNED, KNOWN), after=(LEARNED, KNOWN), learned=(LEARNED,), known=(KNOWN,), max_examples=8,
    asking=AskingSection(chat=False, generate=False),
)  # fmt: skip
# Settings of PEFT's adapters that suit layers of 32, 16 and 48 inputs and outputs; the rest is PEFT's own.
SUITED = {
    "ADALORA": {"init_r": 6, "target_r": 3},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "LORA": {"r": 4, "use_dora": True, "use_rslora": True},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "PSOFT": {"r": 8},
    "OSF": {"effective_rank": 8},
    "RANDLORA": {"r": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [32, 39, 75, 93]},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 16, "vector_length": 16, "topk": 2},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 64},
}
OTHER_WAYS = pytest.mark.parametrize(
    "values",
    [
        {"train": {"activation_checkpointing": True}},
        pytest.param({"train": {"per_device_train_batch_size": 4}}, marks=pytest.mark.slow),
        pytest.param({"checkpoint": CheckpointSection(format="delta")}, marks=pytest.mark.slow),
        {"launch": LaunchSection(num_processes=1, offload="optimizer")},
    ],
    ids=["checkpointed", "accumulated", "delta", "offloaded"],
)


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


def run_with_steps(folder: Path, start: Path, freeze: dict) -> Round:
    """A round with all its step checkpoints."""
    return run(folder, make_spec(start, freeze, checkpoint=CheckpointSection(save_steps=1, keep=9)))


def launch(folder: Path, spec: RoundSpec) -> Round:
    """A round in processes of its own, and proved."""
    round_ = Round(folder)
    folder.mkdir(parents=True)
    write_model(round_.spec_path, spec)
    launch_round(round_, spec.launch, lambda progress: None)
    assert verify_round(round_).passed
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


def train_by_hand(round_: Round, own: dict[str, tuple], decay: float) -> None:
    """Insist that a round of two steps on one batch left what AdamW leaves, in float64: what is frozen does not decay either.

    Args:
        own: by parameter of which a part trains, its index; others of the plan train whole.
    """
    plan, batch = round_.read_plan(), read_batch(round_)
    model = read_model(Path(round_.read_spec().model.path))
    states: dict[str, list[np.ndarray]] = {}
    for step in (1, 2):
        model.zero_grad()
        model(**batch).loss.backward()
        for name, value in model.named_parameters():
            if name not in plan.trained:
                continue
            part = own.get(name, ...)
            gradient = value.grad.double().numpy()[part]
            first, second = states.setdefault(name, [np.zeros_like(gradient) for _ in range(2)])
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            values = value.detach().double().numpy()
            if not name.endswith(("bias", "norm.weight")):
                values[part] *= 1 - LEARNING_RATE * decay
            values[part] -= LEARNING_RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            value.data = torch.from_numpy(values).float()
    compare_weights(round_, dict(model.named_parameters()), 2e-5)


def read_losses(round_: Round) -> list[float]:
    """Of its steps, in their order."""
    return [row["loss"] for row in round_.read_metrics()]


def read_all_losses(folder: Path, start: Path, *freezes: dict) -> list[list[float]]:
    """Of every step of rounds that choose what trains in other ways."""
    specs = [make_spec(start, freeze, train={"logging_steps": 1}) for freeze in freezes]
    return [read_losses(run(folder / str(place), spec)) for place, spec in enumerate(specs)]


def compare_weights(round_: Round, expected: Mapping[str, torch.Tensor], most: float) -> None:
    """Insist on the weights of a round's checkpoint, full or a delta."""
    reader = CheckpointReader(round_.checkpoint, tuple(expected))
    for name, value in expected.items():
        largest = (reader.read(name).double() - value.detach().double()).abs().max()
        assert largest < most, (name, largest)


def read_weights(round_: Round) -> dict[str, torch.Tensor]:
    """Those of a full checkpoint."""
    return load_file(round_.checkpoint / "model.safetensors")


def assert_goes_on(done: Round, step: int, folder: Path, *paths: str) -> None:
    """Insist that a round which was killed after a step ends in the same bits, in its checkpoint and in other files."""
    round_ = go_back(done, step, folder)
    run_round(round_, StopRequest(round_))
    assert round_.read_result().resumed_from == step
    for path in ("checkpoint/model.safetensors", *paths):
        assert (round_.folder / path).read_bytes() == (done.folder / path).read_bytes(), path
    assert round_.read_plan() == done.read_plan()


def compare_references(folder: Path, start: Path, freeze: dict) -> Round:
    """Insist that every reference of preferences gives the same losses; the round with the shared one, which copies weights."""
    rounds = [run(folder / name, make_pairs_spec(start, freeze, name)) for name in ("precompute", "shared")]
    assert read_losses(rounds[1]) == pytest.approx(read_losses(rounds[0]), abs=1e-5)
    return rounds[1]
