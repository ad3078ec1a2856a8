"""Recipes that would fail in training, or after it has begun, fail at once, with exit code 2 and the name of what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hftcli.doctor.doctor import Finding
from hftcli.errors import InputError
from hftcli.recipe.loading import load_recipe
from hftcli.runners import prepare_continual, prepare_single
from hftcli.training.outlook import foresee_run

CHAT = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b c"}]}
PLAIN = {"prompt": "a b", "completion": " c"}
PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Small models and rows, whole and faulty."""
    folder = tmp_path_factory.mktemp("place")
    words = ["<unk>", "</s>", "a", "b", "c", "user", "assistant"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = Whitespace()
    sizes = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=7, n_positions=32, n_embd=8, n_layer=2, n_head=2))
    for name, model, end in (("llama", llama, "</s>"), ("gpt2", gpt2, "</s>"), ("endless", llama, None)):
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=end).save_pretrained(folder / name)
    llama.save_pretrained(folder / "wordless")
    for name, rows in {
        "chat": [CHAT] * 6, "plain": [PLAIN] * 6, "pair": [PAIR] * 6, "gap": [PLAIN, {"prompt": "a"}], "odd": [{"x": 1}],
        "none": [],
    }.items():  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.jsonl").write_text('{"prompt": "a"\n')
    (folder / "good.jinja").write_text(TEMPLATE)
    (folder / "broken.jinja").write_text("{% for m in messages %}")
    (folder / "angry.jinja").write_text("{{ raise_exception('no system prompt') }}")
    (folder / "host").write_text("nothing here")
    return folder


@pytest.fixture
def foretell(place, tmp_path, monkeypatch) -> Callable[..., tuple[dict, list[Finding]]]:
    """What `hft --dry-run` does, in this process."""
    monkeypatch.chdir(place)

    def run(changes: dict[str, object], objective: str = "sft") -> tuple[dict, list[Finding]]:
        rows = "pair" if objective == "dpo" else "plain"
        values = {
            "model.path": "llama", "data.path": f"{rows}.jsonl", "data.max_length": 16, "train.bf16": False,
            "train.global_batch_size": 4, "train.per_device_train_batch_size": 4, "launch.num_processes": 1,
            "output": tmp_path / "run", **changes,
        }  # fmt: skip
        recipe = load_recipe(None, [f"{key}={value}" for key, value in values.items()], objective)
        prepared = prepare_continual(recipe) if objective == "continual" else prepare_single(recipe)[0]
        return foresee_run(recipe, prepared, lambda *count: None)

    return run


@pytest.fixture
def foresee(foretell) -> Callable[..., dict]:
    """The outlooks alone."""
    return lambda *given: foretell(*given)[0]


FAILING: list[tuple[str, dict[str, object], str]] = [
    ("sft", {"data.path": "missing.jsonl"}, "data.path missing.jsonl: no such file"),
    ("sft", {"data.path": "none.jsonl"}, "none.jsonl: there are no rows"),
    ("sft", {"data.path": "broken.jsonl"}, "broken.jsonl:1: not JSON"),
    ("sft", {"data.path": "gap.jsonl"}, "row 2: field 'completion' is missing"),
    ("sft", {"data.path": "odd.jsonl"}, "the columns x are of no known format"),
    ("sft", {"data.path": "pair.jsonl"}, "they are preference pairs"),
    ("dpo", {"data.path": "plain.jsonl"}, "the columns prompt, completion are of no known format"),
    ("sft", {"data.path": "chat.jsonl"}, "no chat template"),
    ("sft", {"data.path": "chat.jsonl", "model.chat_template": "missing.jinja"}, "missing.jinja: no such file"),
    ("sft", {"data.path": "chat.jsonl", "model.chat_template": "broken.jinja"}, "broken.jinja:1: not a Jinja template"),
    ("sft", {"data.path": "chat.jsonl", "model.chat_template": "angry.jinja"}, "does not render the conversation"),
    ("sft", {"data.path": "chat.jsonl", "model.chat_template": "chatml"}, "chatml ends turns with <|im_end|>"),
    ("sft", {"eval.held_out.path": "missing.jsonl"}, "eval.held_out.path missing.jsonl: no such file"),
    ("sft", {"eval.tasks": "[missing.jsonl]"}, "missing.jsonl: no such file"),
    ("sft", {"eval.tasks": "[tinyworld/fact]"}, "unknown task 'tinyworld/fact'"),
    ("sft", {"data.max_length": 65}, "data.max_length is 65, but the model has 64 positions"),
    ("sft", {"model.path": "gpt2", "data.max_length": 33}, "data.max_length is 33, but the model has 32 positions"),
    ("sft", {"model.path": "nowhere/at/all"}, "model.path nowhere/at/all: no such folder"),
    ("sft", {"model.path": "wordless"}, "the tokenizer does not load"),
    ("sft", {"model.path": "endless"}, "the tokenizer has no end token"),
    ("sft", {"model.attn_implementation": "flash_attention_2"}, "model.attn_implementation flash_attention_2"),
    ("sft", {"model.attn_implementation": "fast"}, "model.attn_implementation fast"),
    ("sft", {"train.optim": "adamw"}, "train.optim: input should be"),
    ("sft", {"train.optim": "galore_adamw"}, "galore_adamw chooses layers by name"),
    ("sft", {"train.optim": "adamw_bnb_8bit"}, "train.optim adamw_bnb_8bit needs bitsandbytes"),
    ("sft", {"train.report_to": "dvclive"}, "train.report_to dvclive needs dvclive"),
    ("sft", {"train.report_to": "tensorbord"}, "train.report_to: input should be"),
    ("sft", {"train.lr_scheduler_type": "curly"}, "train.lr_scheduler_type: input should be"),
    ("sft", {"train.lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau follows an evaluation"),
    ("sft", {"train.lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr does not take"),
    ("sft", {"train.max_steps": 3, "train.warmup_steps": 0, "train.lr_scheduler_type": "polynomial",
             "train.lr_scheduler_kwargs": "{lr_end: 1}"}, "polynomial does not take"),
    ("sft", {"train.max_steps": 9, "train.lr_scheduler_type": "polynomial", "train.lr_scheduler_kwargs": "{lr_end: -1}"},
     "the learning rate is -"),
    ("sft", {"train.max_steps": 9, "train.lr_scheduler_type": "polynomial", "train.lr_scheduler_kwargs": "{power: -1}"},
     "and train.learning_rate, its peak, is 2e-05"),
    ("sft", {"train.max_steps": 9, "train.lr_scheduler_type": "cosine_with_min_lr",
             "train.lr_scheduler_kwargs": "{min_lr: 1}"}, "and train.learning_rate, its peak, is 2e-05"),
    ("sft", {"train.max_steps": 9, "train.lr_scheduler_type": "inverse_sqrt", "train.lr_scheduler_kwargs": "{timescale: 0}"},
     "division by zero"),
    ("sft", {"train.max_steps": 1, "train.warmup_steps": 5}, "the learning rate is 0 in all 1 steps"),
    ("sft", {"train.max_steps": 9, "method.peft": "{type: ADALORA, tinit: 500}"}, "leave ADALORA no step of 9 to move"),
    ("sft", {"train.activation_offloading": True}, "there is no GPU"),
    ("sft", {"train.router_aux_loss_coef": 0.1}, "the model is no mixture of experts"),
    ("sft", {"train.eos_token": "</s>"}, "train.eos_token is not taken"),
    ("sft", {"train.global_batch_size": 6}, "train.global_batch_size is 6, not a multiple of"),
    ("sft", {"launch.hostfile": "host"}, "host"),
    ("dpo", {"reference": "shared", "launch.num_processes": 2, "launch.zero_stage": 3, "train.per_device_train_batch_size": 2},
     "reference: shared lays the trained half"),
    ("dpo", {"dpo.loss_type": "exo_pair"}, "not defined at dpo.label_smoothing 0"),
    ("continual", {"data.path": "null", "data.root": "missing", "continual.tasks": "a"}, "missing"),
    ("continual", {"data.path": "null", "method.gem": "{}", "launch.num_processes": 2, "continual.tasks": "tinyworld/sum",
                   "train.per_device_train_batch_size": 2}, "method.gem changes the gradient"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "changes", "expected"), FAILING)
def test_it_fails_before_there_are_weights(foresee, monkeypatch, objective, changes, expected):
    with pytest.raises(InputError) as caught:
        foresee(changes, objective)
    assert caught.value.exit_code == 2
    assert expected in caught.value.message


def test_a_later_round_is_looked_ahead_of_as_the_first_is(foresee, tmp_path):
    """The second task has one step of 4 rows, and cannot be measured at three."""
    for task, number in (("long", 20), ("short", 4)):
        (tmp_path / "tasks" / task).mkdir(parents=True)
        rows = json.dumps([{"prompt": f"{index}?", "answer": "a"} for index in range(number)])
        for split in ("train", "eval", "test"):
            (tmp_path / "tasks" / task / f"{split}.json").write_text(rows)
    changes = {
        "model.path": "tinyworld", "data.path": "null", "data.root": tmp_path / "tasks", "continual.tasks": "[long, short]",
        "data.max_length": 64, "eval.num_points": 3,
    }  # fmt: skip
    with pytest.raises(InputError, match="eval.num_points is 3, and the round has 1 steps"):
        foresee(changes, "continual")


def test_what_would_not_fail_is_foretold(foresee):
    (outlook,) = foresee({"train.num_train_epochs": 3}).values()
    assert (outlook.num_steps, outlook.num_sequences, outlook.num_warmup_steps) == (6, 6, 1)
    assert outlook.data.num_used == 6
    (outlook,) = foresee({"train.global_batch_size": 8}).values()
    assert (outlook.num_steps, outlook.num_warmup_steps, outlook.is_warmup_dropped) == (1, 0, True)
    (outlook,) = foresee({}, "dpo").values()
    assert (outlook.num_steps, outlook.num_sequences, outlook.data.num_sequences) == (2, 6, 12)
    names = ["tinyworld/sum", "tinyworld/sale"]
    changes = {"model.path": "tinyworld", "data.path": "null", "data.max_length": 64, "continual.tasks": json.dumps(names)}
    outlooks = foresee(changes, "continual")
    assert list(outlooks) == ["00-sum", "01-sale"]
    assert {outlook.num_steps for outlook in outlooks.values()} == {150}  # 600 rows in batches of 4
    assert len({outlook.fingerprint for outlook in outlooks.values()}) == 2


@pytest.mark.parametrize("how", [["--dry-run"], []])
def test_the_command_says_so_and_ends_with_2(hft, settings, place, tmp_path, how):
    values = {
        "model.path": place / "llama", "data.path": place / "plain.jsonl", "data.max_length": 16, "train.bf16": False,
        "train.warmup_steps": 9,
    }  # fmt: skip
    done = hft("sft", "--output", tmp_path / "run", *how, *settings(values), code=2)
    assert "no recipe: 1 epoch at learning rate 2e-05 (linear), batches of 32" in done.stderr
    assert "hft: the learning rate is 0 in all 1 steps: train.warmup_steps 9 takes every one" in done.stderr
    assert "loading" not in done.stderr
    assert done.stdout == ""


def test_the_default_recipe_trains_on_a_handful_of_rows(hft, settings, place, tmp_path):
    values = {"model.path": place / "llama", "data.path": place / "plain.jsonl", "data.max_length": 16}
    dry = hft("sft", "--dry-run", "--output", tmp_path / "run", *settings(values)).stdout.splitlines()
    assert dry[0] == "# 00-sft"
    assert "6 of 6 (prompt-completion); " in dry[1]
    assert "steps   1 of 32 sequences out of 6; learning rate up to 2e-05, linear, without a warm-up" in dry[2]
    assert all(line.startswith("#") for line in dry[:-1])
    assert dry[-1].endswith(str(tmp_path / "run" / "rounds" / "00-sft"))
    done = hft("sft", "--output", tmp_path / "run", *settings(values))
    assert "without a warm-up, which would take the only step" in done.stderr
    rows = (tmp_path / "run" / "rounds" / "00-sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["learning_rate"] for row in rows] == [2e-5]


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        # q_proj of two layers, 8 x 8, under one rank: 2 x (8 + 8) weights.
        ({"method.peft": "{type: LORA, r: 1, target_modules: [q_proj]}", "freeze.trainable_fraction": 1}, 12 * 32),
        # Three steps train both layers: 7 matrices of 8 x 8 and two norms of 8 each; embeddings and head are frozen.
        ({"freeze": "{group: layer, redraw: {every: 1, order: cyclic}, embeddings: freeze, head: freeze}",
          "train.max_steps": 3}, 4 * 2 * (7 * 64 + 16) + 8 * (7 * 64 + 16)),
        ({"freeze": "{group: layer, redraw: {every: 1, order: cyclic, states: keep}, embeddings: freeze, head: freeze}",
          "train.max_steps": 3}, 12 * 2 * (7 * 64 + 16)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("missing", [0, 1])
def test_step_checkpoints_are_counted_by_what_they_hold(foretell, place, tmp_path, monkeypatch, changes, num_bytes, missing):
    """Masters and moments of adapters, not of the weights below; of draws, masters of all and moments of the largest."""
    kept = sum(file.stat().st_size for file in (place / "llama").glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=kept + 3 * num_bytes - missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    (found,) = [finding for finding in foretell(changes)[1] if finding.check == "disk"]
    assert (found.status == "fault") == bool(missing), found.message
