"""DPO's references: what they hold, what they leave alone, and when they are taken again."""

from types import SimpleNamespace

import pytest
import torch
from training.preferences import compute_loss, make_trainer

from hftcli.errors import InputError
from hftcli.freezing.rule import FreezeRule
from hftcli.measuring.moments import Moments, write_moments
from hftcli.methods.expectations import Expectations, write_expectations
from hftcli.recipe.sections import DataSection, DpoSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.spec import RoundSpec
from hftcli.training.references import make_reference_key, read_log_probs, write_log_probs


def test_the_shared_reference_leaves_the_trained_tensors_in_place(tmp_path):
    trainer = make_trainer(tmp_path, "shared")
    before = [(parameter.data_ptr(), parameter.detach().clone()) for parameter in trainer.model.parameters()]
    compute_loss(trainer)
    for parameter, (address, values) in zip(trainer.model.parameters(), before, strict=True):
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, values)
    trained = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trainer.reference.num_bytes == trained


def test_precomputed_log_probs_are_reused_and_another_s_are_refused(tmp_path):
    first = make_trainer(tmp_path, "precompute").reference
    again = make_trainer(tmp_path, "precompute").reference
    assert (first.is_reused, again.is_reused) == (False, True)
    assert torch.equal(first.log_probs_P2, again.log_probs_P2)
    with pytest.raises(InputError, match="holds the reference of another model or of other pairs"):
        read_log_probs(first.path, num_pairs=4)
    other = first.path.rename(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds the reference of another model"):
        read_log_probs(other, num_pairs=3)
    other.write_bytes(b"not a file of tensors")
    with pytest.raises(InputError, match="is damaged"):
        read_log_probs(other, num_pairs=3)


@pytest.mark.parametrize("kind", ["references", "moments", "expectations"])
def test_what_another_run_writes_into_the_cache_at_the_same_time_is_left_to_it(tmp_path, kind):
    write = {
        "references": lambda path: write_log_probs(path, torch.ones(3, 2)),
        "moments": lambda path: write_moments(path, Moments({"x": torch.ones(1, 2, 2)}, ("rows",))),
        "expectations": lambda path: write_expectations(path, Expectations(*torch.ones(4, 1).unbind())),
    }[kind]
    half_written = tmp_path / ".key.safetensors"
    half_written.write_bytes(b"another run's")
    write(tmp_path / "key.safetensors")
    assert half_written.read_bytes() == b"another run's"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.safetensors", "key.safetensors"]


def test_the_key_covers_weights_tokens_precision_and_options(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    def make_key(
        tokens: str = "t", mixed: bool = False, dtype: str | None = None, num_processes: int = 1, seed: int = 0,
        offload: str = "none", **dpo: object,
    ) -> str:  # fmt: skip
        spec = RoundSpec(
            objective="dpo", index=0, model=ModelSection(path="m", dtype=dtype), data=DataSection(path="d"),
            freeze=FreezeRule(), train=TrainSection(), launch=LaunchSection(num_processes=num_processes, offload=offload),
            dpo=DpoSection(**dpo), reference="precompute",
        )  # fmt: skip
        plan = SimpleNamespace(fingerprint=f"half {seed}")
        return make_reference_key(spec, tmp_path, tokens, mixed, plan)

    keys = [make_key(), make_key("u"), make_key(mixed=True), make_key(dtype="bfloat16"), make_key(ld_alpha=0.5)]
    (tmp_path / "model.safetensors").write_bytes(b"weights of another model")
    keys.append(make_key())
    assert len(set(keys)) == len(keys)
    assert make_key(beta=0.7) == make_key()
    assert make_key(seed=1, num_processes=2) == make_key()  # in float32 both are the same numbers
    in_bfloat16 = [make_key(mixed=True), make_key(mixed=True, seed=1), make_key(mixed=True, num_processes=2)]
    assert len(set(in_bfloat16)) == 3  # one process holds what trains in float32, DeepSpeed nothing
    offloaded = [make_key(mixed=True, offload="optimizer", seed=seed) for seed in (0, 1)]
    assert len({*in_bfloat16, *offloaded}) == 5  # what trains is rounded, and the rest is as it was
