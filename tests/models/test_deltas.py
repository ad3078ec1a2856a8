"""Delta checkpoints: what they hold, what they stand on, and that all who read one read the full model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models.small_models import SIZES, assert_same, draw, read_all, train
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hftcli.errors import ModelError
from hftcli.models.checkpoint import load_weights
from hftcli.models.deltas import hash_checkpoint, open_stack
from hftcli.models.description import fetch_checkpoint
from hftcli.models.proof import verify_checkpoint
from hftcli.models.reader import CheckpointReader


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A base, and three rounds on it: `full/N` starts from `full/N-1`, `delta/N` from `delta/N-1`."""
    folder = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    train(folder / "base", folder / "full" / "0", folder / "delta" / "0")
    for index in (1, 2):
        train(folder / "full" / str(index - 1), folder / "full" / str(index), folder / "aside", index)
        train(folder / "delta" / str(index - 1), folder / "aside", folder / "delta" / str(index), index)
    return folder


def test_a_delta_holds_what_trained_and_no_more(chain):
    plan = draw(chain / "base")
    stored = load_file(chain / "delta" / "0" / "delta.safetensors")
    whole = load_file(chain / "full" / "0" / "model.safetensors")
    assert_same(stored, {name: whole[name] for name in plan.trained})
    record = json.loads((chain / "delta" / "0" / "delta.json").read_text())
    assert record["fingerprint"] == plan.fingerprint
    assert record["base"]["files"].keys() == {"config.json", "model.safetensors"}
    others = {path.name for path in (chain / "full" / "0").iterdir()} - {"model.safetensors"}
    for name in others:
        assert (chain / "delta" / "0" / name).read_bytes() == (chain / "full" / "0" / name).read_bytes()
    assert {path.name for path in (chain / "delta" / "0").iterdir()} == others | {"delta.json", "delta.safetensors"}


@pytest.mark.parametrize("index", ["0", "1", "2"])
def test_a_chain_of_deltas_is_read_and_loaded_as_the_full_model(chain, index):
    delta, full = fetch_checkpoint(str(chain / "delta" / index)), chain / "full" / index
    assert len(open_stack(delta).deltas) == int(index) + 1
    assert_same(read_all(delta), read_all(full))
    loaded, expected = load_weights(delta, torch.float32), load_weights(full, torch.float32)
    assert_same(dict(loaded.named_parameters()), dict(expected.named_parameters()))
    assert loaded.config.to_dict() == expected.config.to_dict() | {"_name_or_path": loaded.config._name_or_path}


def test_the_rounding_of_a_delta_in_another_data_type_is_that_of_the_full_model(chain, tmp_path):
    """Also where a third type is loaded: what is frozen goes through the delta's type."""
    train(chain / "base", tmp_path / "full", tmp_path / "delta", dtype="float16")
    assert_same(read_all(tmp_path / "delta"), read_all(tmp_path / "full"))
    for dtype in (torch.float32, torch.bfloat16):
        one, two = (load_weights(tmp_path / form, dtype) for form in ("delta", "full"))
        assert_same(dict(one.named_parameters()), dict(two.named_parameters()))


def test_of_embeddings_a_delta_holds_the_rows_of_the_tokens_that_were_seen(chain, tmp_path):
    """Two rounds that saw other tokens, the second in another data type; where 29 of 32 were seen, all rows are kept."""
    name = "model.embed_tokens.weight"
    start = chain / "base"
    for index, (seen, dtype) in enumerate([(slice(3, 9), None), (slice(7, 20), "bfloat16")]):
        train(start, tmp_path / "full", tmp_path / "delta" / str(index), index, dtype, seen=seen)
        stored = load_file(tmp_path / "delta" / str(index) / "delta.safetensors")
        assert stored[f"{name}/rows"].tolist() == list(range(32))[seen]
        assert len(stored[name]) == len(stored[f"{name}/rows"])
        assert_same(read_all(tmp_path / "delta" / str(index)), read_all(tmp_path / "full"))
        one, two = (load_weights(folder, torch.float32) for folder in (tmp_path / "delta" / str(index), tmp_path / "full"))
        assert_same(dict(one.named_parameters()), dict(two.named_parameters()))
        start = tmp_path / "delta" / str(index)
    train(chain / "base", tmp_path / "full", tmp_path / "whole", seen=slice(3, None))
    assert load_file(tmp_path / "whole" / "delta.safetensors").keys() & {name, f"{name}/rows"} == {name}


def test_a_delta_is_verified_as_a_full_checkpoint_is(chain, tmp_path):
    plan = draw(chain / "base")
    assert verify_checkpoint(chain / "base", chain / "delta" / "0", plan, {}).passed
    moved, still = plan.frozen[1], plan.trained[0]
    shutil.copytree(chain / "delta" / "0", tmp_path / "delta")
    file = tmp_path / "delta" / "delta.safetensors"
    weights = load_file(file)
    weights[moved] = load_file(chain / "base" / "model.safetensors")[moved] + 1
    del weights[still]
    save_file(weights, file, {"format": "pt"})
    record = json.loads((tmp_path / "delta" / "delta.json").read_text())
    record["tensors"] = list(weights)
    (tmp_path / "delta" / "delta.json").write_text(json.dumps(record))
    found = verify_checkpoint(chain / "base", tmp_path / "delta", plan, {})
    assert (found.violations, found.unmoved) == ((moved,), (still,))


def test_experts_that_files_keep_apart_are_stored_as_the_model_has_them(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    plan = train(tmp_path / "base", tmp_path / "full", tmp_path / "delta")
    assert any("experts" in name for name in plan.trained)
    assert any("experts" in name for name in plan.frozen)
    assert_same(read_all(tmp_path / "delta"), read_all(tmp_path / "full"))
    one, two = (load_weights(tmp_path / form, torch.float32) for form in ("delta", "full"))
    assert_same(dict(one.named_parameters()), dict(two.named_parameters()))


@pytest.fixture
def copied(chain, tmp_path) -> Path:
    """The base and two deltas, free to be harmed."""
    shutil.copytree(chain / "base", tmp_path / "base")
    train(tmp_path / "base", tmp_path / "aside", tmp_path / "delta" / "0")
    train(tmp_path / "delta" / "0", tmp_path / "aside", tmp_path / "delta" / "1", 1)
    return tmp_path


def flip_last_bit(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


@pytest.mark.parametrize(
    ("harmed", "message"),
    [
        ("base/model.safetensors", "model.safetensors has other bytes"),
        ("base/config.json", "config.json has other bytes"),
        ("delta/0/delta.safetensors", "delta.safetensors has other bytes"),
        ("delta/0/delta.json", "delta.json has other bytes"),
    ],
)
def test_a_base_with_one_flipped_bit_is_refused_by_name(copied, harmed, message):
    flip_last_bit(copied / harmed)
    with pytest.raises(ModelError, match=message):
        fetch_checkpoint(str(copied / "delta" / "1"))


def test_a_base_with_a_file_more_or_less_is_refused_by_name(copied):
    shutil.copy(copied / "base" / "model.safetensors", copied / "base" / "model-2.safetensors")
    with pytest.raises(ModelError, match="model-2.safetensors is not of it"):
        open_stack(copied / "delta" / "1")
    (copied / "base" / "model-2.safetensors").unlink()
    (copied / "base" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.safetensors is missing"):
        open_stack(copied / "delta" / "1")


def test_a_base_that_was_moved_is_found_where_it_is_said_to_be(copied):
    expected = read_all(copied / "delta" / "1")
    (copied / "base").rename(copied / "moved")
    with pytest.raises(ModelError, match="there is no such folder"):
        open_stack(copied / "delta" / "1")
    reader = CheckpointReader(copied / "delta" / "1", tuple(expected), base=copied / "moved")
    assert_same({name: reader.read(name) for name in expected}, expected)


def test_the_rounds_of_a_run_that_was_moved_or_copied_find_one_another(copied, monkeypatch):
    """The base of the first stays where it is; what stands at the old place now is another model."""
    rounds = copied / "run" / "rounds"
    train(copied / "base", copied / "aside", rounds / "00-a" / "checkpoint")
    train(rounds / "00-a" / "checkpoint", copied / "aside", rounds / "01-b" / "checkpoint", 1)
    expected = read_all(rounds / "01-b" / "checkpoint")
    (copied / "run").rename(copied / "moved")
    last = copied / "moved" / "rounds" / "01-b" / "checkpoint"
    assert_same(read_all(last), expected)
    monkeypatch.chdir(last)
    assert [delta.folder.parent.name for delta in open_stack(Path()).deltas] == ["00-a", ""]
    shutil.copytree(copied / "moved", copied / "run")
    flip_last_bit(rounds / "00-a" / "checkpoint" / "delta.safetensors")
    assert_same(read_all(last), expected)
    flip_last_bit(last.parent.parent / "00-a" / "checkpoint" / "delta.safetensors")
    with pytest.raises(ModelError, match=f"{rounds}/00-a/checkpoint is not the base that .* has other bytes"):
        open_stack(last)


def test_another_base_is_refused_and_so_is_a_base_for_a_full_checkpoint(copied):
    shutil.copytree(copied / "base", copied / "other")
    flip_last_bit(copied / "other" / "model.safetensors")
    with pytest.raises(ModelError, match="other is not the base that .* model.safetensors has other bytes"):
        open_stack(copied / "delta" / "1", base=copied / "other")
    (copied / "base").rename(copied / "moved")
    with pytest.raises(ModelError, match="other is not the base that"):
        open_stack(copied / "delta" / "1", base=copied / "other")
    with pytest.raises(ModelError, match="moved is not a delta"):
        open_stack(copied / "moved", base=copied / "other")


def test_a_delta_that_lacks_a_tensor_is_not_filled_up_from_its_base(copied):
    file = copied / "delta" / "1" / "delta.safetensors"
    weights = load_file(file)
    gone = next(iter(weights))
    save_file({name: values for name, values in weights.items() if name != gone}, file)
    with pytest.raises(ModelError, match=f"its delta.json and its weights differ in {gone}"):
        load_weights(copied / "delta" / "1", torch.float32)


def test_the_hash_of_a_checkpoint_changes_with_what_lies_below_it(copied):
    """Two deltas with the same tensors on other bases are other models."""
    before = hash_checkpoint(copied / "delta" / "0")
    flip_last_bit(copied / "base" / "model.safetensors")
    train(copied / "base", copied / "aside", copied / "delta" / "0")
    assert hash_checkpoint(copied / "delta" / "0")["delta.json"] != before["delta.json"]


def test_a_delta_of_llama_2_7b_is_a_half_and_eight_rounds_are_less_than_six_tenths(tmp_path):
    """By the plans alone: two bytes a weight, eight rounds with halves of their own, which see half of the tokens each."""
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    plans = [draw(tmp_path, index) for index in range(8)]
    full = plans[0].num_parameters
    assert max(plan.num_trainable for plan in plans) / full <= 0.55
    deltas = sum(plan.num_trainable for plan in plans)
    assert deltas / (8 * full) == pytest.approx(0.519, abs=0.001)
    assert (full + deltas) / (full + 8 * full) == pytest.approx(0.572, abs=0.001)
    unseen = 8 * 16000 * (4096 - 2)  # two: a row's number takes four bytes
    assert (full + deltas - unseen) / (full + 8 * full) <= 0.57
