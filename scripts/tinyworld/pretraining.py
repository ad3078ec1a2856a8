"""A small Llama, pretrained on the corpus."""

import itertools
import math
import random
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tinyworld.corpus import write_epoch
from tinyworld.tokenizer import CONTEXT, Encoder
from tinyworld.world import World
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQUENCE_TOKENS, BATCH, STEPS, WARMUP = 128, 32, 1600, 100
LEARNING_RATE = 3e-3


def pack_sequences(world: World, encoder: Encoder, rng: random.Random, held_out: frozenset[str]) -> Iterator[list[int]]:
    """Endless sequences of whole documents, cut to length.

    Each begins with the start of a document, as every prompt will later.
    """
    sequence: list[int] = []
    while True:
        for document in write_epoch(world, rng, held_out):
            sequence += encoder.encode(document)
            if len(sequence) >= SEQUENCE_TOKENS:
                yield sequence[:SEQUENCE_TOKENS]
                sequence = []


def create_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.04,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def schedule_rate(step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def pretrain(model: LlamaForCausalLM, sequences: Iterator[list[int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_rate)
    model.train()
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        ids = torch.tensor(list(itertools.islice(sequences, BATCH)))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
