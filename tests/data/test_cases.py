"""Small inputs in the kind of public reports about other tools, each with the outcome that is right."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Hft = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def rows(shared: Path) -> Path:
    return shared / "cases" / "rows"


@pytest.fixture(scope="module")
def models(rows: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, made once."""
    folder = tmp_path_factory.mktemp("models")
    command = [sys.executable, str(rows / "make_models.py"), str(shared / "models" / "MiniMind2-Small"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def look(hft: Hft, rows: Path, models: Path, shared: Path) -> Callable[..., dict]:
    """`look("llama", "one.jsonl")`: what `hft data` says of a file."""

    def run(model: str, file: str, *more: str, code: int = 0) -> dict | str:
        path = models / model if (models / model).is_dir() else shared / "models" / model
        options = ["--set", f"model.path={path}", "--set", f"data.path={rows / file}", "--set", "data.max_length=256", *more]
        done = hft("data", *options, "--json", code=code)
        return done.stderr if code else json.loads(done.stdout)

    return run


def read(summary: dict) -> tuple[str, list[str]]:
    """The text of the sample, and its trained pieces."""
    return "".join(piece["text"] for piece in summary["sample"]), [p["text"] for p in summary["sample"] if p["trained"]]


def test_a_turn_marked_as_not_to_be_trained_is_not(look):
    text, trained = read(look("llama", "train_flag.jsonl"))
    assert "A brick is a fruit." in text
    assert trained == ["An apple.<|im_end|>"]


def test_system_prompt_and_history_are_rendered(look):
    text, trained = read(look("llama", "alpaca_system.jsonl"))
    for said in ("<|im_start|>system\nAnswer in two words.<|im_end|>", "Do you know birds?", "Yes.", "Which bird is it?"):
        assert text.count(said) == 1
    assert "You are a helpful assistant" not in text
    assert trained[-1] == "A heron.<|im_end|>"


def test_the_list_of_tools_is_rendered(look):
    text, trained = read(look("llama", "messages_tools.jsonl", "--set", "data.max_length=512"))
    assert '"description": "look a word up"' in text
    assert trained == ['<tool_call>\n{"name": "look_up", "arguments": {"word": "heron"}}\n</tool_call><|im_end|>']


def test_a_template_that_strips_thoughts_is_refused(look, rows: Path):
    said = look("llama", "think.jsonl", "--set", f"model.chat_template={rows / 'strip.jinja'}", code=2)
    assert "row 1: turn 2, the assistant's: 'Six sevens are forty-two.' is not in the text that the chat template makes" in said


def test_a_prompt_that_brings_its_beginning_has_one(look):
    summary = look("stories15M", "prompt_is_bos.jsonl")
    text, trained = read(summary)
    assert text.count("<s>") == text.count("</s>") == 1
    assert trained == [" A heron.</s>"]
    assert summary["doubled"] == {"beginning": 1, "end": 1}


def test_an_answer_that_brings_its_end_has_one(look):
    summary = look("llama", "end_token_in_answer.jsonl")
    assert read(summary)[1] == ["A bird.<|im_end|>"]
    assert summary["doubled"] == {"end": 1}


def test_a_blank_input_is_none(look):
    text, trained = read(look("llama", "ws_input.jsonl"))
    assert "<|im_start|>user\na<|im_end|>" in text
    assert trained == ["c<|im_end|>"]


def test_bad_rows_are_named_or_dropped(look):
    assert "empty_out.jsonl: row 2: field 'output' is empty" in look("llama", "empty_out.jsonl", code=2)
    summary = look("llama", "empty_out.jsonl", "--set", "data.bad_rows=drop")
    assert (summary["num_rows"], summary["num_used"], summary["num_bad"]) == (2, 1, 1)


def test_a_damaged_page_is_no_traceback(look):
    said = look("llama", "flip.parquet", code=2)
    assert "flip.parquet: not a Parquet file, or a damaged one" in said
    assert "Traceback" not in said


def test_tokens_beyond_the_embeddings_are_refused(look):
    said = look("vocab", "tool_tok.jsonl", code=2)
    assert "the rows hold the token '<|tool|>' with id 6400, and the model has 6400 embeddings" in said


@pytest.mark.parametrize(
    ("model", "file", "more", "said"),
    [
        ("vocab", "tool_tok.jsonl", {}, "the rows hold the token '<|tool|>' with id 6400"),
        ("gpt2", "long558.jsonl", {"data.max_length": 1024}, "data.max_length is 1024, but the model has 512 positions"),
        ("noeos", "six.jsonl", {}, "the tokenizer has no end token to stop with, and none to pad with"),
        ("multi2", "six.jsonl", {}, "has the chat templates rag, tool_use, and none of them is called default"),
        ("llama", "flip.parquet", {}, "not a Parquet file, or a damaged one"),
        ("llama", "sixx.jsonl", {}, "did you mean"),
    ],
)
def test_what_would_fail_in_training_is_said_before(
    model: str, file: str, more: dict, said: str, hft: Hft, settings: Callable, rows: Path, models: Path, tmp_path: Path
):
    values = {"model.path": models / model, "data.path": rows / file, **more}
    done = hft("sft", "--recipe", rows / "base.yaml", "--output", tmp_path / "run", *settings(values), code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_odd_pairs_of_text(hft: Hft, shared: Path, tmp_path: Path):
    folder = shared / "cases" / "runs"
    values = [f"data.path={folder / 'dpo_odd_text_pairs.jsonl'}", f"model.path={shared / 'models' / 'stories260K'}"]
    options = [part for value in values for part in ("--set", value)]
    summary = json.loads(hft("data", "--recipe", folder / "dpo.yaml", *options, "--json").stdout)
    assert summary["doubled"] == {"beginning": 1, "end": 2, "prompt": 1}
    for name, end in (("chosen", " Red</s>"), ("rejected", " Car </s>")):
        assert "".join(piece["text"] for piece in summary[name]) == f"<s> [INST] Name a colour. [/INST]{end}"
