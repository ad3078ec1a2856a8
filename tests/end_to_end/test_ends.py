"""What was trained as the end of an answer is where plain transformers stops, in a process of its own, and `hft eval` too."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hftcli.runs.run import Run

QUESTION, ANSWER = "Name a bird.", "A heron stands in the water."
TALK = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
PAIR = {"prompt": TALK["messages"][:1], "chosen": TALK["messages"][1:], "rejected": [{"role": "assistant", "content": "No."}]}
JINJA = """{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ '<|im_start|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"""
MAX_NEW_TOKENS = 40
# What a user who has never heard of hft writes.
GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, plain = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
if plain:
    inputs = tokenizer(plain, return_tensors="pt")
else:
    messages = [{"role": "user", "content": "Name a bird."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs.pop("token_type_ids", None)
length = inputs["input_ids"].shape[1]
ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0][length:].tolist()
print(json.dumps([ids, tokenizer.decode(ids), tokenizer.decode(inputs["input_ids"][0])]))
"""


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory) -> Path:
    """A base model with no chat template, whose own generation stops at a token that none of the templates ends with."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "MiniMind2-Small")
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=6400, max_position_embeddings=512, initializer_range=0.3, eos_token_id=7)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def teach(hft, settings, base, tmp_path) -> Callable[..., Path]:
    """Teach the base one row by heart; the last round's checkpoint."""

    def run(row: dict, command: str = "sft", **changes: object) -> Path:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        values = {
            "model.path": base, "data.path": tmp_path / "rows.jsonl", "data.max_length": 64, "eval.tasks": "[]",
            "freeze.trainable_fraction": 1.0, "train.bf16": "false", "train.max_steps": 60, "train.learning_rate": 5e-3,
            "train.warmup_steps": 0, "train.global_batch_size": 1, "train.per_device_train_batch_size": 1,
        }  # fmt: skip
        hft(command, "--output", tmp_path / "run", *settings(values | changes))
        return Run(tmp_path / "run").last_finished.checkpoint

    return run


def generate(folder: Path, plain: str = "") -> tuple[list[int], str, str]:
    """Token ids and text that are generated in a process of its own, and the text of the prompt."""
    done = subprocess.run([sys.executable, "-c", GENERATE, folder, plain], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def assert_stops(folder: Path, end: str, plain: str = "") -> str:
    """Returns: the text of the prompt."""
    ids, text, prompt = generate(folder, plain)
    assert text.lstrip() == ANSWER + end
    assert len(ids) < MAX_NEW_TOKENS
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [ids[-1], 7]
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    return prompt


def assert_eval_stops(hft, model: Path, prompt: str, folder: Path) -> None:
    """`hft eval` asks the same prompt as a plain text, which tells nothing of the template's end."""
    (folder / "birds").mkdir()
    (folder / "birds" / "test.json").write_text(json.dumps([{"prompt": prompt, "answer": ANSWER}]))
    (folder / "birds" / "task.yaml").write_text(f"max_new_tokens: {MAX_NEW_TOKENS}")
    output = folder / "eval.json"
    hft("eval", "--model", model, "--tasks", "birds", "--root", folder, "--max-length", 128, "--output", output)
    assert json.loads(output.read_text())["tasks"]["birds"]["score"] == 1
    (item,) = output.with_suffix(".items.jsonl").read_text().splitlines()
    assert json.loads(item)["prediction"] == ANSWER


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("chatml", "<|im_end|>"),
        pytest.param("tulu", "<|endoftext|>", marks=pytest.mark.slow),
        pytest.param("jinja", "<|im_start|>", marks=pytest.mark.slow),
    ],
)
def test_a_base_model_stops_where_its_template_ends(hft, teach, tmp_path, template, end):
    if template == "jinja":
        template = tmp_path / "own.jinja"
        template.write_text(JINJA)
    checkpoint = teach(TALK, **{"model.chat_template": template})
    prompt = assert_stops(checkpoint, end)
    assert_eval_stops(hft, checkpoint, prompt, tmp_path)
    ends = Run(tmp_path / "run").last_finished.read_result().ends
    assert (ends.trained, ends.added_ids) == ((end,), ends.trained_ids)
    assert f"answers were trained to end with {end} ({ends.trained_ids[0]}); generation stops at" in hft(
        "sft", "--output", tmp_path / "run", "--recipe", tmp_path / "run" / "recipe.yaml"
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_a_model_stops_after_a_completion(teach):
    checkpoint = teach({"prompt": "Name a bird:", "completion": f" {ANSWER}"})
    assert assert_stops(checkpoint, "<|endoftext|>", "Name a bird:") == "Name a bird:"


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"checkpoint.format": "delta"}, {"method.lora": "{r: 16}"}], ids=["delta", "lora"])
def test_a_merged_model_stops_too(hft, teach, tmp_path, change):
    checkpoint = teach(TALK, **{"model.chat_template": "chatml", **change})
    if "checkpoint.format" in change:
        ends = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
        assert ends == [2, 7]
        hft("merge", "--delta", checkpoint, "--output", tmp_path / "merged")
        checkpoint = tmp_path / "merged"
    assert_stops(checkpoint, "<|im_end|>")


@pytest.mark.slow
def test_a_reset_and_an_interpolation_stop_where_the_tuned_model_does(hft, base, teach, tmp_path):
    checkpoint = teach(TALK, **{"model.chat_template": "chatml"})
    hft("merge", "--base", base, "--tuned", checkpoint, "--interpolate", 1, "--output", tmp_path / "mean")
    assert_stops(tmp_path / "mean", "<|im_end|>")
    hft("reset", "--base", base, "--tuned", checkpoint, "--set", "freeze.seed=7", "--output", tmp_path / "reset")
    assert json.loads((tmp_path / "reset" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.slow
def test_preferences_carry_the_end_of_the_answers(teach):
    checkpoint = teach(PAIR, "dpo", **{"model.chat_template": "chatml", "train.max_steps": 2})
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.slow
def test_a_sequence_of_tasks_carries_the_end_from_round_to_round(hft, teach, tmp_path):
    """The second round's own start names the end already."""
    for task in ("birds", "birds-again"):
        (tmp_path / task).mkdir()
        for split in ("train", "test"):
            rows = [{"prompt": "Name a bird:", "answer": f" {ANSWER}"}]
            (tmp_path / task / f"{split}.json").write_text(json.dumps(rows))
        (tmp_path / task / "task.yaml").write_text(f"max_new_tokens: {MAX_NEW_TOKENS}")
    teach(TALK, "continual", **{"data.path": "null", "data.root": tmp_path, "continual.tasks": "[birds,birds-again]"})
    first, second = Run(tmp_path / "run").rounds
    for round_ in (first, second):
        ids, text, _ = generate(round_.checkpoint, "Name a bird:")
        assert text == f" {ANSWER}<|endoftext|>"
        assert len(ids) < MAX_NEW_TOKENS
        assert round_.read_scores().after["birds"].score == 1
    assert first.read_result().ends.added_ids == first.read_result().ends.trained_ids
    assert second.read_result().ends.added_ids == ()
    configs = [(round_.checkpoint / "generation_config.json").read_bytes() for round_ in (first, second)]
    assert configs[0] == configs[1]
