"""What is handed to TRL: no key of the user's is lost, and packing keeps rows apart."""

import platform
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hftcli import PACKAGE
from hftcli.data.prepare import prepare_dataset
from hftcli.errors import InputError
from hftcli.freezing.rule import FreezeRule
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.recipe.trainer_keys import SFT_ONLY, SHARED, Passed
from hftcli.runs.spec import RoundSpec
from hftcli.training.loss import set_loss_kernel
from hftcli.training.probe import compute_loss
from hftcli.training.trainers import SPENT_KEYS, find_padding, make_training_arguments


def make_spec(**train: object) -> RoundSpec:
    return RoundSpec(
        objective="sft", index=0, model=ModelSection(path="m"), data=DataSection(path="d", max_length=96), freeze=FreezeRule(),
        train=TrainSection(**train), launch=LaunchSection(num_processes=1),
    )  # fmt: skip


def test_every_training_key_reaches_the_trainer(tmp_path):
    given = {"learning_rate": 3e-4, "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "packing": True, "max_grad_norm": 0.5}
    args = make_training_arguments(make_spec(**given), tmp_path)
    assert {key: getattr(args, key) for key in given} == given


def test_what_hft_sets_itself_cannot_be_given(tmp_path):
    """A key that both could set would be lost without a word."""
    plain = make_training_arguments(make_spec(), tmp_path).to_dict()
    own = {
        "max_length",
        "gradient_accumulation_steps",
        "output_dir",
        "save_strategy",
        "use_cpu",
        "disable_tqdm",
        "dataset_kwargs",
    }
    assert own <= plain.keys()
    assert not any(isinstance({**SHARED, **SFT_ONLY}[key], Passed) for key in own)
    assert TrainSection.model_fields.keys() >= SPENT_KEYS


def test_accumulation_follows_from_the_global_batch(tmp_path):
    spec = make_spec(global_batch_size=24, per_device_train_batch_size=4)
    assert make_training_arguments(spec, tmp_path).gradient_accumulation_steps == 6
    with pytest.raises(InputError, match="train.global_batch_size is 10, not a multiple of"):
        make_training_arguments(make_spec(global_batch_size=10), tmp_path)


def test_a_value_that_trl_refuses_is_the_users_fault(tmp_path):
    with pytest.raises(InputError, match="TRL refuses these settings"):
        make_training_arguments(make_spec(dataloader_prefetch_factor=2), tmp_path)


def test_lengths_are_rounded_up_a_little(tmp_path):
    """And not where the user says otherwise, or where the longest row would get longer."""
    assert [find_padding(length) for length in (8, 64, 128, 512, 1024, 2048)] == [None, 2, 4, 16, 16, 16]
    assert [find_padding(length) for length in (1000, 999, 1023)] == [None, None, None]
    assert make_training_arguments(make_spec(), tmp_path).pad_to_multiple_of == 3
    assert make_training_arguments(make_spec(pad_to_multiple_of=8), tmp_path).pad_to_multiple_of == 8
    assert make_training_arguments(make_spec(packing=True), tmp_path).pad_to_multiple_of is None


@pytest.mark.parametrize("kernel", ["plain", "chunked"])
def test_rounding_a_length_up_changes_no_loss(kernel):
    folder = PACKAGE / "tinyworld" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_loss_kernel(model, kernel)
    rows = [{"input_ids": list(range(3, 24)), "labels": [-100] * 5 + list(range(8, 24))}]
    losses = []
    for multiple in (None, 16):
        batch = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=multiple)(rows)
        assert batch["input_ids"].shape == (1, 21 if multiple is None else 32)
        losses.append(compute_loss(model, batch).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_packed_rows_do_not_see_each_other(tmp_path):
    """The log-probabilities of every trained token are those of its row alone."""
    folder = PACKAGE / "tinyworld" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    data = DataSection(path="tinyworld/skill", max_length=128, max_examples=12)
    nats = []
    for packing in (False, True):
        rows, report = prepare_dataset(data, TrainSection(packing=packing), tokenizer, tmp_path)
        batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=packing)(list(rows))
        labels_BT = batch.pop("labels")
        batch = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            log_probs_BTV = model(**batch, use_cache=False).logits.log_softmax(-1)
        targets_BT = labels_BT[:, 1:]
        trained_BT = targets_BT != -100
        picked = log_probs_BTV[:, :-1].gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
        nats.append(picked[trained_BT].sort().values)
    assert report.num_sequences < report.num_used
    torch.testing.assert_close(nats[0], nats[1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or torch.cuda.is_available(), reason="only glibc on a CPU is told to keep freed memory"
)
def test_a_cpu_keeps_the_memory_of_a_step_for_the_next_one():
    """64 MiB, freed and taken again ten times, are 163,840 pages of 4 KiB; few of them come from the kernel anew."""
    code = """
import resource, torch, hftcli.training.trainers
from hftcli.models.device import keep_freed_memory
keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2**24)
before = count()
for _ in range(10):
    torch.ones(2**24)
print(count() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 40_000
