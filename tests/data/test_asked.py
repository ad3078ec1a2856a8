"""Questions of tasks that bring beginnings and ends of their own: trained and asked as rows are, with one of each."""

from dataclasses import replace
from pathlib import Path

import pytest
from data.written_rows import CUE, INSTRUCTION, make_long
from transformers import PreTrainedTokenizerBase

from hftcli.data.asked import tidy_task
from hftcli.data.prepare import prepare_task
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.errors import DataError
from hftcli.measuring.questions import tokenize_task
from hftcli.recipe.sections import DataSection
from hftcli.tasks.examples import Example, Task


def test_a_question_has_one_beginning_and_one_end(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    brought = Example("<s>Which?\nAnswer:", " A heron.</s>", body=(3, 10))
    task = Task("t", (brought, Example("Which?\nAnswer:", " A heron.", body=(0, 7))), max_new_tokens=16)
    rows, report = prepare_task(task, DataSection(max_length=64), byte_tokenizer, tmp_path)
    assert [byte_tokenizer.decode(row["input_ids"]) for row in rows] == ["<s>Which?\nAnswer: A heron.</s>"] * 2
    assert rows[0] == rows[1]
    assert (report.doubled, report.num_special) == ({"beginning": 1, "end": 1}, 0)
    asked = tokenize_task(task, 64, byte_tokenizer)
    assert [byte_tokenizer.decode(prompt) for prompt in asked.prompts] == ["<s>Which?\nAnswer:"] * 2
    assert asked.rows[0] == asked.rows[1]
    assert asked.faults == {}
    choices = replace(brought, options=(" A heron.</s>", " An owl.</s>"))
    listed = tokenize_task(Task("t", (choices,), "choice", bare_prompt="<s>Answer:"), 64, byte_tokenizer)
    assert listed.task.examples[0].options == (" A heron.", " An owl.")
    for question, beginning in ((listed.questions[0], "<s>Which?"), (listed.bare_questions[0], "<s>Answer:")):
        assert byte_tokenizer.decode(question.prompt).startswith(beginning)


@pytest.mark.parametrize("cut", ["start", "middle", "end"])
def test_the_cut_takes_the_same_of_a_body(cut: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    plain = make_long("".join(map(chr, range(65, 90))))
    first, last = plain.body
    brought = replace(plain, prompt="<s>" + plain.prompt, body=(first + 3, last + 3))
    rows, report = prepare_task(
        Task("t", (plain, brought), cut=cut), DataSection(max_length=len(INSTRUCTION + CUE) + 13), byte_tokenizer, tmp_path
    )
    assert rows[0] == rows[1]
    assert report.num_truncated == 2


def test_conversations_are_asked_without_what_the_template_prints(byte_tokenizer: PreTrainedTokenizerBase):
    byte_tokenizer.chat_template = CHAT_TEMPLATES["tulu"]  # <s> before the first turn, </s> after the assistant's
    brought = Example([{"role": "user", "content": "<s>Which?"}], "A heron.</s>")
    plain = Example([{"role": "user", "content": "Which?"}], "A heron.")
    task, counts = tidy_task(Task("t", (brought, plain)), byte_tokenizer)
    assert task.examples == (plain, plain)
    assert counts == {"doubled": {"beginning": 1, "end": 1}, "num_special": 0, "special_tokens": {}}


def test_other_special_tokens_stay_and_are_said(
    byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    task = Task("t", (Example("Which <pad> one?", " A heron."), Example("Which?", " An owl.")))
    rows, report = prepare_task(task, DataSection(max_length=64), byte_tokenizer, tmp_path)
    assert byte_tokenizer.decode(rows[0]["input_ids"]) == "<s>Which <pad> one? A heron.</s>"
    assert (report.num_special, report.special_tokens) == (1, {"<pad>": 1})
    assert "task t: special tokens stand in the text of 1 questions (<pad>)" in caplog.text


def test_an_answer_of_special_tokens_alone_is_refused(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    task = Task("t", (Example("Which?", " A heron."), Example("Which?", " </s>")))
    for use in (
        lambda: prepare_task(task, DataSection(max_length=64), byte_tokenizer, tmp_path),
        lambda: tokenize_task(task, 64, byte_tokenizer),
    ):
        with pytest.raises(DataError, match="task t: question 2: its answer is nothing but special tokens: ' </s>'"):
            use()
