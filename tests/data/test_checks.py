"""What can be known of data, tokenizer and model before weights are loaded."""

from pathlib import Path

import pytest
from data.written_rows import ROW, write_jsonl
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hftcli.data.checks import check_positions, check_token_ids, check_tokenizer
from hftcli.data.prepare import prepare_dataset, prepare_pairs
from hftcli.data.templates import find_template
from hftcli.errors import DataError, ModelError
from hftcli.freezing.roles import FAMILIES
from hftcli.models.description import describe_model, find_max_positions, load_tokenizer
from hftcli.recipe.sections import TrainSection

# Every family's own name for its positions, and small numbers for the rest.
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 16,
    "num_experts_per_tok": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OWN_SIZES = {
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention"], "activation_sparsity_pattern": [0.0]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
}
MAMBA2 = {"num_heads": 4, "head_dim": 16, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "n_groups": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_and_embeddings_of_every_family(family: str, tmp_path: Path):
    own = {"gpt2": GPT2, "mamba2": MAMBA2}.get(family)
    values = own or {**SMALL, **OWN_SIZES.get(family, {}), "max_position_embeddings": 40}
    AutoConfig.for_model(family, **values).save_pretrained(tmp_path)
    described = describe_model(str(tmp_path))
    if family == "mamba2":
        assert (described.max_positions, described.num_embeddings, described.num_heads) == (None, 96, 1)
        return
    assert (described.max_positions, described.num_embeddings) == (40, 96)
    check_positions(40, described.max_positions)
    with pytest.raises(DataError, match=r"data\.max_length is 41, but the model has 40 positions") as caught:
        check_positions(41, described.max_positions)
    assert caught.value.fix == "set data.max_length to 40 or less"


def test_positions_by_their_other_names():
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        assert find_max_positions({"hidden_size": 3, name: 17}) == 17
    assert find_max_positions({"hidden_size": 3, "alibi": True}) is None


def test_tokens_beyond_the_embeddings_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})  # 258 tokens before it
    plain = write_jsonl(tmp_path / "a.jsonl", [ROW])
    added = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "<|tool|>Hello"}]}
    _, report = prepare_dataset(plain, TrainSection(), tokenizer, tmp_path / "cache")
    assert report.max_token_id == 257
    check_token_ids(report, tokenizer, 258)
    data = write_jsonl(tmp_path / "b.jsonl", [ROW, added])
    for packing in (False, True):
        _, report = prepare_dataset(data, TrainSection(packing=packing), tokenizer, tmp_path / "cache")
        check_token_ids(report, tokenizer, 259)
        with pytest.raises(DataError) as caught:
            check_token_ids(report, tokenizer, 258)
        message = f"{data.path}: the rows hold the token '<|tool|>' with id 258, and the model has 258 embeddings"
        assert caught.value.message == message
    pair = {"prompt": "<|tool|>", "chosen": "a", "rejected": "b"}
    _, report = prepare_pairs(write_jsonl(tmp_path / "c.jsonl", [pair]), tokenizer, tmp_path / "cache")
    assert report.max_token_id == 258


def test_tokenizer_without_end_and_pad(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="the tokenizer has no end token to stop with, and none to pad with") as caught:
        check_tokenizer(bare, 1000)
    assert "eos_token" in caught.value.fix
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="none to pad with"):
        check_tokenizer(load_tokenizer(tmp_path), 1000)
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(load_tokenizer(tmp_path), 258)  # it pads with its end token
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    check_tokenizer(tokenizer, 259)
    with pytest.raises(ModelError, match=r"the tokenizer pads with <pad> \(id 258\), and the model has 258 embeddings"):
        check_tokenizer(tokenizer, 258)


def test_named_templates(tokenizer: PreTrainedTokenizerBase, minimind: PreTrainedTokenizerBase, tmp_path: Path):
    source = tokenizer.chat_template
    tokenizer.chat_template = {"rag": source, "tool_use": source + " "}
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has the chat templates rag, tool_use, and none of them is called default") as caught:
        find_template(read)
    assert caught.value.fix.startswith("set model.chat_template to chatml, tulu or a Jinja file")
    tokenizer.chat_template = {"default": source, "tool_use": source + " "}
    assert find_template(tokenizer).source == source
    assert find_template(tokenizer).choose_source([{"type": "function"}]) == source + " "
