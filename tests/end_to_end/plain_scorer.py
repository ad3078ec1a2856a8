"""A second opinion on a saved model, from its folder alone: transformers, torch, and nothing of hft.

A task's rows go through the model together: in bfloat16 the sums of a matrix product depend on how many rows it has.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Rows = list[tuple[str, str]]  # prompts and answers


@dataclass(frozen=True)
class Opinion:
    """What a model scores on rows of prompt and answer: exact match in [0, 1], nats per token, and what it wrote."""

    score: float
    nll: float
    written: list[str]


class PlainModel:
    """A checkpoint as anyone loads it.

    Args:
        mixed: compute in bfloat16 by torch's autocast, with the folder's weights in float32, which holds them exactly.
    """

    def __init__(self, folder: Path, mixed: bool):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.mixed = mixed

    def computing(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed)

    def read(self, rows: Rows) -> list[tuple[float, int]]:
        """Nats of each answer with its end token, and its tokens."""
        known = [self.tokenizer(prompt).input_ids for prompt, _ in rows]
        whole = [[*self.tokenizer(prompt + answer).input_ids, self.tokenizer.eos_token_id] for prompt, answer in rows]
        assert all(ids[: len(start)] == start for ids, start in zip(whole, known, strict=True))
        longest = max(map(len, whole))
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in whole])
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in whole])
        with torch.no_grad(), self.computing():
            logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits.float()
        found = []
        for logits_TV, ids, start in zip(logits_BTV, whole, known, strict=True):
            answer_N = torch.tensor(ids[len(start) :])
            nats_N = torch.nn.functional.cross_entropy(logits_TV[len(start) - 1 : len(ids) - 1], answer_N, reduction="none")
            found.append((nats_N.double().sum().item(), len(nats_N)))
        return found

    def read_mean(self, rows: Rows) -> float:
        """Nats per token of all answers."""
        nats, counts = map(sum, zip(*self.read(rows), strict=True))
        return nats / counts

    def write(self, prompts: list[str], num_tokens: int) -> list[str]:
        """The likeliest answers, token by token."""
        self.tokenizer.pad_token, self.tokenizer.padding_side = self.tokenizer.eos_token, "left"
        known = self.tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad(), self.computing():
            ids_BT = self.model.generate(
                **known, do_sample=False, max_new_tokens=num_tokens, eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        decoded = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_BT]
        return [text[len(prompt) :] for text, prompt in zip(decoded, prompts, strict=True)]

    def score(self, rows: Rows, num_tokens: int) -> Opinion:
        """What it makes of a task; `num_tokens` is where an answer is cut."""
        written = self.write([prompt for prompt, _ in rows], num_tokens)
        num_right = sum(text.strip() == answer.strip() for text, (_, answer) in zip(written, rows, strict=True))
        return Opinion(num_right / len(rows), self.read_mean(rows), written)
