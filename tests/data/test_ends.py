"""The end that was trained, read off the tokens of every kind of rows."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from hftcli.data.ends import find_trained_ends
from hftcli.data.prepare import prepare_dataset, prepare_pairs, prepare_task
from hftcli.data.templates import set_chat_template
from hftcli.models.description import load_tokenizer
from hftcli.recipe.sections import DataSection, TrainSection
from hftcli.tasks.examples import Example, Task

TALK = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "A heron stands in the water."}]
PLAIN = {"prompt": "Name a bird. ", "completion": "A heron."}
PAIR = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [{"role": "assistant", "content": "No."}]}
# Ends turns with a token of its own, behind a word that is a token of the vocabulary's added ones too.
JINJA = """{% for message in messages %}{{ message['role'] + ':\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def folder(shared) -> Path:
    return shared / "models" / "MiniMind2-Small"


def load(folder: Path, template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    set_chat_template(tokenizer, template)
    return tokenizer


def find(rows: list[dict], tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int = 64, **train) -> list[str]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(path=str(file), max_length=max_length)
    if "chosen" in rows[0]:
        tokens, _ = prepare_pairs(data, tokenizer, folder / "cache")
    else:
        tokens, _ = prepare_dataset(data, TrainSection(**train), tokenizer, folder / "cache")
    return tokenizer.convert_ids_to_tokens(list(find_trained_ends(tokens, max_length, tokenizer)))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), ("tulu", "<|im_end|>"), ("jinja", "<|endoftext|>")])
def test_a_conversation_ends_as_its_template_ends_it(folder, tmp_path, template, end, only, packing):
    """Also where all of it is trained, the line's end behind the end token among it, and where rows are packed."""
    if template == "jinja":
        template = tmp_path / "own.jinja"
        template.write_text(JINJA)
    tokenizer = load(folder, str(template))
    rows = [{"messages": TALK}, {"messages": TALK * 2}]
    assert find(rows, tokenizer, tmp_path, assistant_only_loss=only, packing=packing) == [end]


def test_the_end_token_of_the_tokenizer_ends_tulu_and_plain_answers(folder, tmp_path):
    tokenizer = load(folder, "tulu")
    tokenizer.eos_token = "<|endoftext|>"
    assert find([{"messages": TALK}], tokenizer, tmp_path) == ["<|endoftext|>"]
    assert find([PLAIN], tokenizer, tmp_path) == ["<|endoftext|>"]


def test_pairs_end_as_their_answers_do(folder, tmp_path):
    assert find([PAIR, PAIR], load(folder, "chatml"), tmp_path) == ["<|im_end|>"]


def test_tasks_end_as_their_answers_do(folder, tmp_path):
    tokenizer = load(folder, "chatml")
    for prompt in ("Name a bird.", [{"role": "user", "content": "Name a bird."}]):
        task = Task("birds", (Example(prompt, "A heron."), Example(prompt, "A crane.")))
        tokens, _ = prepare_task(task, DataSection(max_length=64), tokenizer, tmp_path)
        assert find_trained_ends(tokens, 64, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_an_answer_that_was_cut_tells_of_no_end(folder, tmp_path):
    """Its last token is special by chance, since another part of the text is: nothing is said of the end."""
    tokenizer = load(folder, "chatml")
    long = [TALK[0], {"role": "assistant", "content": "<|endoftext|>" * 90}]
    assert find([{"messages": long}], tokenizer, tmp_path) == []
    assert find([{"messages": long}, {"messages": TALK}], tokenizer, tmp_path) == ["<|im_end|>"]


def test_what_ends_a_few_answers_only_is_no_end(folder, tmp_path):
    tokenizer = load(folder, "chatml")
    template = tmp_path / "bare.jinja"
    template.write_text(JINJA.replace("{{ '<|endoftext|>' }}", ""))
    set_chat_template(tokenizer, str(template))
    odd = [TALK[0], {"role": "assistant", "content": "A heron.<|im_start|>"}]
    rows = [{"messages": TALK}] * 150 + [{"messages": odd}]
    assert find(rows, tokenizer, tmp_path) == []
    assert find([{"messages": odd}], tokenizer, tmp_path) == ["<|im_start|>"]
