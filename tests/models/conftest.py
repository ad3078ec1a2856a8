"""A small model on disk."""

import pytest
import torch
from models.small_models import SIZES
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small Llama in bfloat16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(path)
    return path
