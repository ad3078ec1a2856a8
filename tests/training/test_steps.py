"""Step checkpoints: one that is not whole, or not this round's, is never loaded."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hftcli.errors import InputError, NewerFile
from hftcli.launching.command import worker_environment
from hftcli.models import device
from hftcli.recipe.loading import load_recipe
from hftcli.runners import prepare_single
from hftcli.runs.run import Round
from hftcli.runs.seals import list_files
from hftcli.runs.spec import EarlierRound, RoundSpec
from hftcli.training.steps import MANIFEST_NAME, Origin, choose_step, clear_remains, read_step, remove_steps
from hftcli.training.worker import explain_failure

FILES = "memory_0.pt optimizer.pt rng_state.pth scheduler.pt step.json trained.safetensors trainer_state.json".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Round:
    """A round of four steps with a checkpoint at each, of which two are kept; no front has cleared them away."""
    changes = {
        "output": tmp_path_factory.mktemp("runs") / "run",
        "data.max_examples": 8,
        "train.max_steps": 4,
        "train.global_batch_size": 4,
        "train.per_device_train_batch_size": 4,
        "checkpoint.save_steps": 1,
        "eval.tasks": "[]",
    }
    _, round_ = prepare_single(load_recipe(None, [f"{key}={value}" for key, value in changes.items()]))
    launch = round_.read_spec().launch
    environment = {**os.environ, **worker_environment(launch)}
    subprocess.run(
        [sys.executable, "-m", "hftcli.training.worker", str(round_.folder)], env=environment, check=True, capture_output=True
    )
    return round_


@pytest.fixture
def round_(trained, tmp_path) -> Round:
    """A copy to damage."""
    shutil.copytree(trained.folder, tmp_path / "00-sft")
    return Round(tmp_path / "00-sft")


@pytest.fixture
def origin(trained) -> Origin:
    manifest = read_step(trained.steps / "4")
    return Origin(manifest.spec, manifest.fingerprint, manifest.tokens_digest, manifest.start_key)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "one bit": flip, "removed": Path.unlink}


def test_the_files_of_a_checkpoint_are_those_damaged_below(trained):
    assert trained.saved_steps == [4, 3]
    assert list_files(trained.steps / "4") == sorted(FILES)


def test_the_frozen_half_is_not_stored_again(trained):
    """For each trained weight, and for no other, a float32 master and two moments, and a little besides."""
    plan = trained.read_plan()
    assert load_file(trained.steps / "4" / "trained.safetensors").keys() == set(plan.trained)
    num_bytes = sum(path.stat().st_size for path in (trained.steps / "4").iterdir())
    assert 12 * plan.num_trainable <= num_bytes <= 12 * plan.num_trainable + 200_000


def test_what_step_checkpoints_cost_is_told(trained):
    result = trained.read_result()
    assert result.step_saves.num_saves == 4
    assert 0 < result.step_saves.seconds < result.seconds["training"]
    files = read_step(trained.steps / "4").files
    assert result.step_saves.num_bytes == sum(seal.num_bytes for seal in files.values())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(round_, origin, name, damage):
    DAMAGES[damage](round_.steps / "4" / name)
    with pytest.raises(InputError, match=f"4 is damaged: {name}"):
        read_step(round_.steps / "4")
    assert choose_step(round_, origin) == round_.steps / "3"
    DAMAGES[damage](round_.steps / "3" / name)
    with pytest.raises(InputError, match="no step checkpoint is whole") as caught:
        choose_step(round_, origin)
    assert "steps/4 is damaged" in caught.value.message
    assert "steps/3 is damaged" in caught.value.message


def test_every_bit_of_the_manifest_counts(round_):
    """It is small, so each of its bytes is tried."""
    path = round_.steps / "4" / MANIFEST_NAME
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            read_step(round_.steps / "4")


def test_a_whole_checkpoint_under_another_step_is_refused(round_):
    (round_.steps / "4").rename(round_.steps / "5")
    with pytest.raises(InputError, match="is damaged"):
        read_step(round_.steps / "5")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "f" * 64}, "the freeze plan"),
        ({"tokens_digest": "d" * 64}, "the rows"),
        ({"start_key": "s" * 64}, "the start's weights"),
    ],
)
def test_another_origin_is_refused_and_named(round_, origin, change, named):
    with pytest.raises(InputError, match=f"was written by another round; it differs in {named}"):
        choose_step(round_, replace(origin, **change))


def test_another_recipe_or_number_of_ranks_is_refused_with_the_reason(round_, origin):
    train = origin.spec.train.model_copy(update={"learning_rate": 1.0})
    with pytest.raises(InputError, match="it differs in train.learning_rate"):
        choose_step(round_, replace(origin, spec=origin.spec.model_copy(update={"train": train})))
    launch = origin.spec.launch.model_copy(update={"num_processes": 2})
    with pytest.raises(InputError, match="by 1 processes at ZeRO 2, and this start has 2 at ZeRO 2"):
        choose_step(round_, replace(origin, spec=origin.spec.model_copy(update={"launch": launch})))


@pytest.mark.parametrize(("held", "taken"), [(True, (None, True)), (False, (False,))])
def test_a_step_of_the_first_forms_whose_true_left_bfloat16_to_the_device_is_taken(round_, origin, held, taken):
    spec = json.loads((round_.steps / "4" / MANIFEST_NAME).read_text())["spec"]
    spec["version"], spec["train"]["bf16"] = 2, held
    rewrite_manifest(round_.steps / "4", spec=spec, version=2, precision=None)
    for asked in (None, True, False):
        given = replace(origin, spec=change_train(origin.spec, bf16=asked))
        if asked in taken:
            assert choose_step(round_, given) == round_.steps / "4"
        else:
            with pytest.raises(InputError, match=r"it differs in train\.bf16"):
                choose_step(round_, given)


def test_a_step_is_not_gone_on_from_in_another_precision(round_, origin, monkeypatch):
    """The quick start's steps are in float32; a device that is faster in bfloat16 would go on in that."""
    spec = json.loads((round_.steps / "4" / MANIFEST_NAME).read_text())["spec"]
    spec["train"]["bf16"] = None
    rewrite_manifest(round_.steps / "4", spec=spec)
    given = replace(origin, spec=change_train(origin.spec, bf16=None))
    monkeypatch.setattr(device, "is_faster_in_bfloat16", lambda: False)
    assert choose_step(round_, given) == round_.steps / "4"
    monkeypatch.setattr(device, "is_faster_in_bfloat16", lambda: True)
    with pytest.raises(InputError, match="was computed in float32, and this start computes in bfloat16") as caught:
        choose_step(round_, given)
    assert caught.value.fix == "start it where it computes in float32, or begin again in another --output"


def change_train(spec: RoundSpec, **changes: object) -> RoundSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update=changes)})


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """A manifest with other content, and the hash of that content."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    del manifest["digest"]
    manifest |= changes | {"digest": ""}
    manifest["digest"] = hashlib.sha256(json.dumps(manifest, indent=2).encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def test_a_checkpoint_without_a_hash_of_its_tokens_is_taken_and_that_is_said(round_, origin, caplog):
    rewrite_manifest(round_.steps / "4", version=1, tokens_digest="", data_key="of another hft")
    assert choose_step(round_, origin) == round_.steps / "4"
    assert "they could not be compared" in caplog.text
    with pytest.raises(InputError, match="differs in the freeze plan"):
        choose_step(round_, replace(origin, fingerprint="f" * 64))


def test_a_step_of_a_run_that_was_moved_is_gone_on_from(round_, origin):
    """What its start and its rows are is told by hashes; which tasks came before is not."""
    spec = json.loads((round_.steps / "4" / MANIFEST_NAME).read_text())["spec"]
    spec["model"]["path"], spec["data"]["path"], spec["data"]["root"] = "/old/model", "/old/rows.jsonl", "/old/tasks"
    spec["earlier"] = [{"task": "a", "folder": "/old/rounds/00-a"}]
    rewrite_manifest(round_.steps / "4", spec=spec)
    given = replace(origin, spec=origin.spec.model_copy(update={"earlier": (EarlierRound(task="a", folder="/new/00-a"),)}))
    assert choose_step(round_, given) == round_.steps / "4"
    with pytest.raises(InputError, match="it differs in the rows"):
        choose_step(round_, replace(given, tokens_digest="d" * 64))
    other = given.spec.model_copy(update={"earlier": (EarlierRound(task="b", folder="/old/rounds/00-a"),)})
    with pytest.raises(InputError, match="it differs in earlier$"):
        choose_step(round_, replace(given, spec=other))
    rewrite_manifest(round_.steps / "4", version=1, tokens_digest="", data_key="k")
    with pytest.raises(InputError, match="it differs in data.path, data.root$"):
        choose_step(round_, given)


def test_a_checkpoint_that_lacks_a_key_with_a_default_is_taken(round_, origin):
    spec = json.loads((round_.steps / "4" / MANIFEST_NAME).read_text())["spec"]
    del spec["checkpoint"]["format"], spec["train"]["weight_decay"], spec["version"]
    rewrite_manifest(round_.steps / "4", spec=spec)
    assert choose_step(round_, origin) == round_.steps / "4"


def test_a_checkpoint_of_other_libraries_goes_on_with_a_word(round_, origin, caplog):
    assert read_step(round_.steps / "4").versions["torch"] == version("torch")
    assert choose_step(round_, origin) == round_.steps / "4"
    assert caplog.text == ""
    rewrite_manifest(round_.steps / "4", versions={"torch": "1.0", "trl": version("trl"), "gone": "7"})
    assert choose_step(round_, origin) == round_.steps / "4"
    assert f"was computed with torch 1.0, and goes on with torch {version('torch')}\n" in caplog.text


def test_a_checkpoint_of_a_newer_hft_is_refused_and_none_before_it_taken(round_, origin):
    rewrite_manifest(round_.steps / "4", version=5, colour="green")
    with pytest.raises(NewerFile, match=r"4/step\.json was written by a newer hft: its form has version 5"):
        choose_step(round_, origin)
    rewrite_manifest(round_.steps / "4", version=4)
    with pytest.raises(InputError, match=r"4/step\.json is of another version of hft: Extra inputs"):
        read_step(round_.steps / "4")


def test_what_was_being_written_is_no_checkpoint_and_is_cleared(round_, origin):
    (round_.steps / "4").rename(round_.steps / "checkpoint-4")
    (round_.steps / "3").rename(round_.steps / ".3")
    assert choose_step(round_, origin) is None
    (round_.steps / ".DS_Store").touch()  # a file manager's
    clear_remains(round_)
    assert [path.name for path in round_.steps.iterdir()] == [".DS_Store"]


def test_the_last_one_is_kept(round_, origin):
    remove_steps(round_, keep=1)
    assert round_.saved_steps == [4]
    remove_steps(round_, keep=1)
    assert choose_step(round_, origin) == round_.steps / "4"


def test_out_of_memory_says_what_to_change(round_):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    error = explain_failure(caught.value, round_)
    assert error.message.startswith("out of memory: ")
    assert "00-sft goes on from its checkpoint at step 4" in error.message
    assert "lower train.per_device_train_batch_size" in error.fix
    assert explain_failure(torch.OutOfMemoryError("CUDA out of memory."), round_).fix == error.fix
