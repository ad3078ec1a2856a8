"""Quiet LoRA: what its A reads, its two steps by hand, its rounds, its proof, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training.quiet_rounds import go_back, make_spec, make_start, run
from transformers import AutoModelForCausalLM

from hftcli.errors import RecipeError
from hftcli.launching.processes import StopRequest
from hftcli.launching.watch import launch_round
from hftcli.models.proof import verify_round
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import LaunchSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.training.round import run_round

WHOLE = {"trainable_fraction": 1.0}
PREFIX = "base_model.model."


def make_method(**values: object) -> MethodSection:
    return MethodSection.model_validate({"lora": {"quiet": True, "r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | values})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("quiet") / "start")


@pytest.fixture(scope="module")
def done(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Round:
    spec = make_spec(start, WHOLE, method=make_method())
    spec = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"save_steps": 2, "keep": 3})})
    return run(tmp_path_factory.mktemp("quiet") / "00", spec)


def list_matrices(round_: Round) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tensors = load_file(round_.adapter / "adapter_model.safetensors")
    names = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    return {name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]) for name in names}


def test_adapters_read_the_quiet_half_alone(done: Round, start: Path):
    """The least eigenvectors of the moments that the round left, by numpy, and nothing of the others in A or the change."""
    assert done.read_result().verification.passed
    plan = done.read_plan()
    before, after = (load_file(folder / "model.safetensors") for folder in (start, done.checkpoint))
    matrices, moments = list_matrices(done), load_file(done.moments_path)
    assert len(matrices) == 14
    sources = json.loads(plan.model_dump_json())["directions"]
    for name, (reads, writes) in matrices.items():
        bases = load_file(done.bases_path)[sources[f"{name}.weight"]["input"]]
        assert bases.shape == (1, reads.shape[1], reads.shape[1] // 2)
        closed = np.eye(reads.shape[1]) - (open_ := bases[0].double().numpy()) @ open_.T
        assert np.linalg.norm(reads.double().numpy() @ closed) < 1e-6 * np.linalg.norm(reads)
        change = 8 / 4 * writes.double() @ reads.double()
        assert change.norm() > 1e-3
        torch.testing.assert_close(after[f"{name}.weight"].double(), before[f"{name}.weight"] + change, rtol=0, atol=1e-6)
    assert moments.keys() >= {item["input"] for item in sources.values()}


def test_peft_makes_the_same_model_of_the_adapter(done: Round, start: Path):
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(done.checkpoint)(ids).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), done.adapter)
        assert (loaded(ids).logits - merged).abs().max() < 1e-4
        assert (loaded.merge_and_unload()(ids).logits - merged).abs().max() < 1e-4


def test_what_trains_is_what_was_counted(done: Round):
    step = load_file(done.saved_steps and done.steps / str(done.saved_steps[0]) / "trained.safetensors")
    held = {name.rpartition("lora_")[2]: value.shape for name, value in step.items() if "layers.0.mlp.down_proj" in name}
    assert held == {"A.default.weight": (4, 24), "B.default.weight": (32, 4)}


def test_a_planted_change_is_found(done: Round, tmp_path: Path):
    other = Round(shutil.copytree(done.folder, tmp_path / "00"))
    path = other.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("o_proj.lora_A.weight"))
    tensors[name][2, 5] += 1e-5 * tensors[name].abs().max()
    save_file(tensors, path, {"format": "pt"})
    found = verify_round(other)
    assert [leaked.partition(" (")[0] for leaked in found.leaked] == [f"adapter/{name}"]
    assert not found.passed


def test_a_round_that_was_killed_ends_in_the_same_bits(done: Round, tmp_path: Path):
    round_ = go_back(done, 2, tmp_path / "00")
    shutil.rmtree(round_.adapter)
    run_round(round_, StopRequest(round_))
    assert round_.read_result().resumed_from == 2
    for path in ("checkpoint/model.safetensors", "adapter/adapter_model.safetensors", "quiet/moments.safetensors"):
        assert (round_.folder / path).read_bytes() == (done.folder / path).read_bytes(), path


def test_a_next_round_begins_another_adapter_in_other_directions(done: Round, tmp_path: Path):
    spec = make_spec(done.checkpoint, WHOLE, 1, (done.folder,), method=make_method(use_rslora=True))
    second = run(tmp_path / "01", spec)
    assert second.read_result().verification.passed
    assert second.read_result().earlier.sources == ("the model's own samples", f"round {done.read_plan().fingerprint}")
    before, after = (load_file(round_.checkpoint / "model.safetensors") for round_ in (done, second))
    for name, (reads, writes) in list_matrices(second).items():
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 8 / 4**0.5 * writes @ reads)


def test_adapters_stand_where_a_rank_by_scores_has_them(start: Path, tmp_path: Path):
    """In blocks, which are heads of the attention's output: 4 of 8 inputs each."""
    round_ = run(tmp_path / "00", make_spec(start, {"rank": "magnitude", "blocks": 16}, method=make_method()))
    plan = round_.read_plan()
    assert round_.read_result().verification.passed
    assert {f"{name}.weight" for name in list_matrices(round_)} == plan.directions.keys() == set(plan.trained)
    heads = [part for part in plan.directions.values() if part.input.endswith("heads")]
    assert heads
    assert {(part.num_blocks, part.width, part.num_open) for part in heads} == {(4, 8, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_end_where_one_process_does(done: Round, start: Path, tmp_path: Path, stage: int):
    spec = make_spec(
        start, WHOLE, method=make_method(), launch=LaunchSection(num_processes=2, zero_stage=stage),
        train={"per_device_train_batch_size": 4},
    )  # fmt: skip
    round_ = Round(tmp_path / "00")
    round_.folder.mkdir()
    write_model(round_.spec_path, spec)
    launch_round(round_, spec.launch, lambda progress: None)
    assert round_.read_result().verification.passed
    assert round_.read_plan() == done.read_plan()
    one, two = (load_file(each.checkpoint / "model.safetensors") for each in (done, round_))
    for name, values in one.items():
        assert torch.allclose(values, two[name], rtol=0, atol=1e-5), (name, (values - two[name]).abs().max())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.lora={quiet: 1.5}", "method.lora.quiet: input should be less than 1"),
        ("method.lora={quiet: 0}", "method.lora.quiet: input should be greater than 0"),
        ("method.lora={quiet: true, use_dora: true}", "use_dora is not taken"),
        (
            "freeze.blocks=32",
            "freeze.blocks would have no effect beside freeze.grain matrices: drop it",
        ),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str):
    with pytest.raises(RecipeError, match=said):
        load_recipe(None, [override])
    load_recipe(None, ["method.lora={quiet: true}", "freeze.blocks=32", "freeze.keep.path=tinyworld/facts"])
