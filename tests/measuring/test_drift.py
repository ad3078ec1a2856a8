"""Drift: numbers of a loop by hand, and what is true of any estimate of a divergence."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.data.tokens import IGNORED
from hftcli.errors import DataError, InputError, ModelError
from hftcli.measuring.drift import draw_answers, draw_texts, measure_drift, measure_ratio, read_prompts, read_texts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models():
    """The embedded model, and one that has moved from it."""
    folder = PACKAGE / "tinyworld" / "model"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    moved = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in moved.parameters():
            value.add_(value.std() * 0.1 * torch.randn(value.shape, generator=generator))
    return base, moved, AutoTokenizer.from_pretrained(folder)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_drift_is_that_of_one_row_at_a_time(models):
    base, moved, tokenizer = models
    texts = ["The fox is red.", "Where does the old cat live? In a box by the sea", "A"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = [(ids[0], [IGNORED, *ids[0][1:]]), (ids[1][:6], [IGNORED] * 3 + ids[1][3:6]), (ids[1][6:], [IGNORED, *ids[1][7:]])]
    drift = measure_drift(base, moved, rows, [0, 1, 1], "texts", CPU)
    kl = before = after = count = 0
    for row, labels in rows:
        with torch.no_grad():
            first, second = (model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1) for model in (base, moved))
        for place in range(1, len(row)):
            if labels[place] != IGNORED:
                kl += (first[place - 1].exp() * (first[place - 1] - second[place - 1])).sum().item()
                before -= first[place - 1, row[place]].item()
                after -= second[place - 1, row[place]].item()
                count += 1
    assert (drift.num_tokens, drift.num_texts) == (count, 2)
    assert drift.kl == pytest.approx(kl / count, rel=1e-3)
    assert drift.base_nll == pytest.approx(before / count, rel=1e-4)
    assert drift.model_nll == pytest.approx(after / count, rel=1e-4)
    assert drift.nll_change == pytest.approx((after - before) / count, rel=1e-3)
    same = measure_drift(base, base, rows, [0, 1, 1], "texts", CPU)
    assert (same.kl, same.nll_change, same.nll_change_error) == (0, 0, 0)


def test_on_samples_of_the_base_the_change_of_cross_entropy_estimates_the_divergence(models):
    base, moved, tokenizer = models
    rows = draw_texts(base, tokenizer, CPU)
    assert rows == draw_texts(base, tokenizer, CPU)
    drift = measure_drift(base, moved, rows, range(len(rows)), "samples", CPU)
    assert drift.kl > 5 * drift.kl_error > 0
    assert abs(drift.nll_change - drift.kl) < 3 * drift.nll_change_error
    assert drift.kl_error < drift.nll_change_error
    # A text ends with the end token where it ends before its time.
    ended = [ids for ids, _ in rows if len(ids) < max(len(ids) for ids, _ in rows)]
    assert ended
    assert all(ids[-1] == tokenizer.eos_token_id for ids in ended)


def test_a_tokenizer_that_begins_no_text_is_to_be_mended_in_every_command(models, monkeypatch):
    """Of which only one takes texts in place of those that the base writes."""
    monkeypatch.setattr("hftcli.measuring.drift.find_beginning", lambda tokenizer: [])
    with pytest.raises(ModelError, match="has no token to begin a text with") as caught:
        draw_texts(models[0], models[-1], CPU)
    assert caught.value.fix == "give its bos_token; hft eval takes a file of --text instead"


def test_the_mean_per_token_and_its_error_are_those_by_hand():
    mean, error = measure_ratio(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 2.0]))
    # 11 / 3; residuals 2 - 11/3 and 9 - 22/3; twice the sum of their squares, 2 (25 + 25) / 9; its root over 3 tokens.
    assert (mean, error) == (pytest.approx(11 / 3), pytest.approx(math.sqrt(100 / 9) / 3))
    assert measure_ratio(torch.tensor([2.0]), torch.tensor([4.0])) == (0.5, None)


def test_texts_are_read_in_pieces(models, tmp_path):
    _, _, tokenizer = models
    path = write_lines(tmp_path / "text.jsonl", {"text": "The fox is red. " * 8}, {"text": ""}, {"text": "A cat."})
    rows, owners = read_texts(path, 16, None, tokenizer)
    whole = tokenizer("The fox is red. " * 8)["input_ids"]
    assert [token for (ids, _), owner in zip(rows, owners, strict=True) if owner == 0 for token in ids] == whole
    assert owners == [0] * (len(rows) - 1) + [1]
    for ids, labels in rows:
        assert len(ids) <= 16
        assert labels == [IGNORED, *ids[1:]]
    assert len(read_texts(path, 16, 1, tokenizer)[0]) == len(rows) - 1
    with pytest.raises(DataError, match="row 1: expected .* got the keys prompt"):
        read_texts(write_lines(tmp_path / "other.jsonl", {"prompt": "x"}), 16, None, tokenizer)


def test_prompts_are_read_with_their_answers_or_answered_by_the_base(models, tmp_path):
    base, _, tokenizer = models
    answered, none, _ = read_prompts(
        str(write_lines(tmp_path / "a.jsonl", {"prompt": "One and two is", "answer": " three"})), None, 64, None, tokenizer
    )
    (ids, labels), *_ = answered
    assert none == []
    assert tokenizer.decode([token for token in labels if token != IGNORED]) == f" three{tokenizer.eos_token}"
    array = tmp_path / "b.json"
    array.write_text(json.dumps([{"prompt": "One and two is"}, {"prompt": "The fox"}]))
    none, prompts, ends = read_prompts(str(array), None, 128, None, tokenizer)
    assert (none, ends) == ([], [])
    assert [tokenizer.decode(prompt) for prompt in prompts] == ["One and two is", "The fox"]
    for prompt, (ids, labels) in zip(prompts, draw_answers(base, prompts, tokenizer, CPU), strict=True):
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    assert len(read_prompts("tinyworld/facts", None, 128, 7, tokenizer)[0]) == 7


def test_answers_of_the_base_end_where_a_turn_ends(models, tmp_path):
    base, _, tokenizer = models
    prompts = [tokenizer(text)["input_ids"] for text in ("One and two is", "The fox", "A cat")]
    whole = [ids[len(prompt) :] for prompt, (ids, _) in zip(prompts, draw_answers(base, prompts, tokenizer, CPU), strict=True)]
    end = whole[0][2]
    for prompt, drawn, (ids, labels) in zip(
        prompts, whole, draw_answers(base, prompts, tokenizer, CPU, ends=[end]), strict=True
    ):
        expected = drawn[: drawn.index(end) + 1] if end in drawn else drawn
        assert (ids, labels) == (prompt + expected, [IGNORED] * len(prompt) + expected)
    turning = copy.deepcopy(tokenizer)
    turning.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    turning.chat_template = CHAT_TEMPLATES["chatml"]
    path = write_lines(tmp_path / "turns.jsonl", {"prompt": [{"role": "user", "content": "The fox"}]})
    _, _, ends = read_prompts(str(path), None, 128, None, turning)
    assert ends == sorted([tokenizer.eos_token_id, turning.convert_tokens_to_ids("<|im_end|>")])


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"answer": "x"}], 'row 1: expected {"prompt"'),
        ([{"prompt": "x", "answer": "y"}, {"prompt": "z"}], 'row 2: expected {"prompt": "...", "answer": "..."}'),
        ([{"prompt": [{"role": "user", "content": "word " * 200}]}], "prompt 1 has"),
        ([{"prompt": "x", "answer": ["y"]}], 'row 1: expected {"prompt": "...", "answer": "..."}'),
        (
            [{"prompt": "x", "chat_template_kwargs": {"enable_thinking": False}}],
            "row 1: the key 'chat_template_kwargs' carries",
        ),
        ([{"prompt": "x", "context": "y"}], "row 1: the key 'context' carries meaning"),
        ([{"prompt": "x", "answer": "y", "tools": [{}]}], "row 1: the key 'tools' carries meaning"),
        ([{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}], "row 1: prompt[1], the last"),
        ([{"prompt": "x"}, {"prompt": "y", "answer": "z"}], "row 2 has an answer, and the first row has none"),
        (
            [{"prompt": "x", "answer": "y"}, {"prompt": [{"role": "user", "content": "x"}], "answer": "y"}],
            "row 2: its prompt is messages, and the first row's a text",
        ),
        ([{"prompt": [{"role": "user", "text": "y"}]}], "row 1: field 'prompt[0].content' is missing"),
    ],
)
def test_prompts_of_another_form_are_named(models, tmp_path, rows, fault):
    path = write_lines(tmp_path / "p.jsonl", *rows)
    with pytest.raises(InputError) as raised:
        read_prompts(str(path), None, 100, None, models[2])
    assert fault in raised.value.message
