"""The tokenizers that the tests of data share."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hftcli.data.templates import CHAT_TEMPLATES

SPECIAL = (
    "<s> </s> <pad> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> "
    "<end_of_turn> <|user|> <|assistant|> <|end|> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>"
).split()


def make_bytes() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, and ChatML's two."""
    backend = make_bytes()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = CHAT_TEMPLATES["chatml"]
    return made


@pytest.fixture
def minimind(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "MiniMind2-Small")


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, the special tokens of several families, and a beginning before every text."""
    backend = make_bytes()
    # DeepSeek's borders are not declared special.
    backend.add_tokens([AddedToken(token, special="｜" not in token or "end" in token) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
