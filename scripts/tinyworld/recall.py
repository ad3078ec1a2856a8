"""How much of the world the model recalls without looking anything up."""

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MIN_RECALL = 0.95


@torch.no_grad()
def measure_recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """The share of rows that greedy decoding answers exactly, end of turn included.

    Greedy decoding gives the answer exactly when each of its tokens is the likeliest one
    after those before it, so one pass over the answered question tells.
    """
    model.eval()
    right = 0
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        prompts, wholes = [], []
        for row in batch:
            answered = [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
            prompts.append(encode_messages(tokenizer, row["prompt"], True))
            wholes.append(encode_messages(tokenizer, answered, False))
        longest = max(map(len, wholes))
        ids = torch.tensor([w + [tokenizer.pad_token_id] * (longest - len(w)) for w in wholes])
        predicted = model(input_ids=ids).logits.argmax(-1).tolist()
        for prompt, whole, guess in zip(prompts, wholes, predicted, strict=True):
            right += guess[len(prompt) - 1 : len(whole) - 1] == whole[len(prompt) :]
    return right / len(rows)


def encode_messages(tokenizer: PreTrainedTokenizerFast, messages: list[dict], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer.encode(text)
