"""A start with tensors of three data types, through every command: the files read by hand, beside the files of the start."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from raw_weights import flip_bit, mix_types, read_raw
from safetensors.torch import load_file, save_file

from hftcli import PACKAGE
from hftcli.models.proof import verify_round
from hftcli.runs.files import write_model
from hftcli.runs.records import Checksums
from hftcli.runs.run import Round, Run
from hftcli.runs.seals import list_files, seal_files

SHORT = {"train.max_steps": 3, "eval.tasks": "[]", "train.bf16": "false"}
RECIPES = {"sft": "tinyworld", "dpo": "tinyworld-dpo", "continual": "tinyworld-continual"}
RUNS = {
    "sft": ("sft", {}),
    "delta": ("sft", {"checkpoint.format": "delta"}),
    "autocast": ("sft", {"train.bf16": "true"}),
    "dpo": ("dpo", {}),
    "continual": (
        "continual",
        {"continual.tasks": "[tinyworld/topic,tinyworld/sum]", "data.max_examples": 32, "eval.max_examples": 4},
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    shutil.copytree(PACKAGE / "tinyworld" / "model", folder)
    mix_types(folder)
    extra = {"model.rotary_emb.inv_freq": torch.rand(4), "mask": torch.ones(3, 3, dtype=torch.bool)}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", {"format": "pt"})
    assert {dtype for dtype, _, _ in read_raw(folder).values()} == {"F32", "BF16", "F16", "BOOL"}
    return folder


@pytest.fixture(scope="module")
def runs(hft, settings, start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, (command, change) in RUNS.items():
        where = ("--recipe", RECIPES[command], "--output", folder / name)
        hft(command, *where, *settings({"model.path": start, **SHORT, **change}))
    return folder


def assert_kept(start: Path, checkpoint: Path, round_: Round) -> None:
    before, after, plan = read_raw(start), read_raw(checkpoint), round_.read_plan()
    assert after.keys() == before.keys()
    for name, (dtype, shape, content) in before.items():
        assert after[name][:2] == (dtype, shape), name
        assert after[name][2] == content or name in plan.trained, name
    assert any(after[name] != before[name] for name in plan.trained)


@pytest.mark.slow
def test_every_round_keeps_every_type_and_what_is_frozen_to_the_byte(hft, runs, start):
    for folder in sorted(runs.iterdir()):
        before = start
        for round_ in Run(folder).rounds:
            if folder.name != "delta":
                assert_kept(before, round_.checkpoint, round_)
                before = round_.checkpoint
            verification = round_.read_result().verification
            assert (verification.num_extras, verification.converted_to) == (2, None)
        assert "bit-identical to the start," in hft("verify", folder).stdout


@pytest.mark.slow
def test_merge_and_reset_keep_them_too(hft, runs, start, tmp_path):
    """The reset half has the bytes of the base, the interpolation at its ends those of the one model and of the other."""
    round_ = Round(runs / "delta" / "rounds" / "00-sft")
    hft("merge", "--delta", runs / "delta", "--output", tmp_path / "merged")
    assert_kept(start, tmp_path / "merged", round_)
    assert read_raw(tmp_path / "merged") == read_raw(runs / "sft" / "rounds" / "00-sft" / "checkpoint")
    hft("reset", "--base", start, "--tuned", runs / "delta", "--set", "freeze.seed=7", "--output", tmp_path / "reset")
    plan = json.loads((tmp_path / "reset" / "merge.json").read_text())["plan"]
    base, tuned, found = (read_raw(folder) for folder in (start, tmp_path / "merged", tmp_path / "reset"))
    assert found == {name: base[name] if name in plan["frozen"] else tuned[name] for name in base}
    for weight, expected in ((0, base), (1, tuned)):
        output = tmp_path / str(weight)
        hft("merge", "--base", start, "--tuned", tmp_path / "merged", "--interpolate", weight, "--output", output)
        assert read_raw(output) == expected


def seal(round_: Round) -> None:
    """Give a harmed checkpoint the seals of a whole one: what is found now is found by the comparison with the start."""
    write_model(round_.checksums_path, Checksums(files=seal_files(round_.checkpoint, list_files(round_.checkpoint))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "delta"])
def test_a_flipped_bit_in_any_tensor_is_found(hft, runs, name, tmp_path):
    shutil.copytree(runs / name, tmp_path / "run")
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    (file,) = round_.checkpoint.glob("*.safetensors")
    whole, frozen = file.read_bytes(), round_.read_plan().frozen
    for tensor in read_raw(round_.checkpoint):
        flip_bit(file, tensor)
        assert verify_round(round_).damaged
        if tensor in frozen:
            seal(round_)
            assert verify_round(round_).violations == (tensor,)
        file.write_bytes(whole)
        seal(round_)
    assert verify_round(round_).passed
    flip_bit(file, tensor)
    assert f"checkpoint/{file.name} has other bytes" in hft("verify", tmp_path / "run", code=3).stdout


@pytest.mark.slow
def test_a_changed_bit_or_type_of_what_is_frozen_ends_with_code_3(hft, runs, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "run")
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    file = round_.checkpoint / "model.safetensors"
    before = load_file(file)
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        name = next(name for name in round_.read_plan().frozen if before[name].dtype == dtype)
        save_file(before | {name: before[name].to(other)}, file, {"format": "pt"})
        seal(round_)
        shown = hft("verify", tmp_path / "run", code=3).stdout
        assert f"stored in another data type: {name}" in shown
        assert json.loads(hft("verify", tmp_path / "run", "--json", code=3).stdout)["violations"] == [f"00-sft: {name}"]
    save_file(before, file, {"format": "pt"})
    flip_bit(file, name)
    seal(round_)
    assert f"frozen, but moved: {name}" in hft("verify", tmp_path / "run", code=3).stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_keep_them_in_bfloat16_where_deepspeed_holds_all_in_bfloat16(hft, settings, start, tmp_path, stage):
    """And what trains has the start's own values as its masters: no update is larger than the steps together."""
    change = {"launch.num_processes": 2, "launch.zero_stage": stage, "train.per_device_train_batch_size": 16}
    rate = {"train.learning_rate": 1e-6, "train.lr_scheduler_type": "constant", "train.warmup_steps": 0}
    where = ("--recipe", "tinyworld", "--output", tmp_path / "run")
    hft("sft", *where, *settings({"model.path": start, **SHORT, **change, **rate, "train.bf16": "true"}))
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    before, after, frozen = read_raw(start), read_raw(round_.checkpoint), round_.read_plan().frozen
    assert {name: tensor[:2] for name, tensor in before.items()} == {name: tensor[:2] for name, tensor in after.items()}
    assert all(before[name] == after[name] for name in (*frozen, "mask", "model.rotary_emb.inv_freq"))
    result = round_.read_result()
    assert result.verification.passed
    assert result.precision == "bfloat16"
    assert all(0 < update <= 3.1e-6 for update in result.updates.values())


def test_a_frozen_tensor_that_moved_in_memory_is_told(hft, settings, start, tmp_path):
    """The file is right all the same; what was trained on was not the start."""
    hft("sft", "--recipe", "tinyworld", "--output", tmp_path / "run", *settings({"model.path": start, **SHORT}))
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    result = round_.read_result()
    moved = result.verification.model_copy(update={"moved_in_memory": ("model.norm.weight",)})
    write_model(round_.result_path, result.model_copy(update={"verification": moved}))
    assert "moved in memory while training: model.norm.weight" in hft("verify", tmp_path / "run", code=3).stdout
