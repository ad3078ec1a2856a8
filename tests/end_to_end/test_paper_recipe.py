"""The paper's recipe on a real pretrained chat model and real instructions, with only model, data, steps and batch changed."""

from statistics import mean

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli.runs.run import Round


@pytest.mark.slow
def test_tulu_on_a_real_model(hft, settings, shared, tmp_path):
    change = {
        "model.path": shared / "models" / "MiniMind2-Small",
        "data.path": shared / "data" / "sft" / "alpaca_en_demo.jsonl",
        "data.max_length": 256,
        "data.max_examples": 40,
        "train.max_steps": 20,  # four to a pass over the data, so that passes compare the same rows
        "train.global_batch_size": 8,
        "train.per_device_train_batch_size": 2,
    }
    hft("sft", "--recipe", "tulu", "--output", tmp_path / "run", *settings(change))
    round_ = Round(tmp_path / "run" / "rounds" / "00-sft")
    losses = [row["loss"] for row in round_.read_metrics()]
    assert mean(losses[-4:]) < mean(losses[:4]) - 0.3
    tokenizer = AutoTokenizer.from_pretrained(round_.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(round_.checkpoint)
    asked = [{"role": "user", "content": "Name three colours."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    generated = model.generate(input_ids=prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    hft("verify", tmp_path / "run")
