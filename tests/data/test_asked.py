"""Questions of tasks that bring beginnings and ends of their own: trained and asked as rows are, with one of each."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from data.written_rows import CUE, INSTRUCTION, make_long, read_template, say, tokenize
from transformers import PreTrainedTokenizerBase

from hftcli.data.asked import tidy_task
from hftcli.data.prepare import prepare_task
from hftcli.data.templates import CHAT_TEMPLATES
from hftcli.data.tokens import IGNORED, tokenize_prompts
from hftcli.errors import DataError
from hftcli.measuring.questions import tokenize_task
from hftcli.recipe.sections import DataSection
from hftcli.tasks.examples import Example, Task

SPECIAL = Task("t", (Example("Which?", " An owl."), Example("Which <pad> one?", " A heron.")))


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
    """From the cache too."""
    for _ in range(2):
        caplog.clear()
        rows, report = prepare_task(SPECIAL, DataSection(max_length=64), byte_tokenizer, tmp_path)
        assert byte_tokenizer.decode(rows[1]["input_ids"]) == "<s>Which <pad> one? A heron.</s>"
        assert (report.num_special, report.special_tokens) == (1, {"<pad>": 1})
        assert [record.message for record in caplog.records] == [
            "task t: special tokens stand in the text of 1 questions (<pad>) and end or open turns there"
        ]


@pytest.mark.parametrize(("policy", "more"), [("refuse", "$"), ("escape", ", which .* in rows alone, and not in questions$")])
def test_other_special_tokens_are_refused_where_rows_are(
    policy: str, more: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    data = DataSection(max_length=64, special_tokens_in_text=policy)
    bare = replace(SPECIAL, examples=SPECIAL.examples[:1])
    assert prepare_task(bare, data, byte_tokenizer, tmp_path)[1].num_special == 0
    for use in (
        lambda: prepare_task(SPECIAL, data, byte_tokenizer, tmp_path),
        lambda: tokenize_task(SPECIAL, 64, byte_tokenizer, policy),
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert re.search(f"^task t: question 2: its text holds the special tokens <pad>{more}", caught.value.message)
        assert caught.value.fix == "take them out, or set data.special_tokens_in_text: keep"


def test_an_answer_of_special_tokens_alone_is_refused(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    task = Task("t", (Example("Which?", " A heron."), Example("Which?", " </s>")))
    for use in (
        lambda: prepare_task(task, DataSection(max_length=64), byte_tokenizer, tmp_path),
        lambda: tokenize_task(task, 64, byte_tokenizer),
    ):
        with pytest.raises(DataError, match="task t: question 2: its answer is nothing but special tokens: ' </s>'"):
            use()


# What a template prints before an answer, and what its generation prompt ends with.
THOUGHT = "<think>\n\n</think>\n\n"
BETWEEN = {
    "nothing": ("", ""),
    "an empty thought, as Qwen 3": (THOUGHT, ""),
    "a blank, as Llama 2": (" ", ""),
    "less than the prompt, as R1": ("", "<think>\n"),
    "the end of the prompt's thought": (THOUGHT, "<think>\n"),
}


TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if m.role == 'assistant' %}{% generation %}{{ 'BEFORE' + m.content.strip() + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\nPROMPTED' }}{% endif %}"""


@pytest.mark.parametrize("name", BETWEEN)
def test_a_question_is_asked_up_to_where_training_puts_the_answer(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    before, prompted = BETWEEN[name]
    tokenizer.chat_template = TEMPLATE.replace("BEFORE", before).replace("PROMPTED", prompted)
    end = tokenizer.eos_token_id
    texts = [f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{before}" for asked in ("Which one?", "Answer:")]
    opening, bare = (tokenizer(text)["input_ids"] for text in texts)
    answers = [tokenizer(text)["input_ids"] for text in ("Paris", "Rome")]
    rows = [{"messages": [say("user", "Which one?"), say("assistant", text)]} for text in ("Paris", "Rome")]
    trained = [ids for ids, _ in tokenize(rows, tokenizer, tmp_path)]
    line = tokenizer("\n")["input_ids"]
    assert trained == [[*opening, *answer, end, *line] for answer in answers]

    question = Example([say("user", "Which one?")], "Paris")
    asked = tokenize_task(Task("t", (question,), max_new_tokens=16, stops="\n"), 256, tokenizer)
    (layout,), ((ids, labels),) = asked.layouts, asked.rows
    assert (layout.prompt, layout.lead, layout.answers) == (opening, "", [[*answers[0], end, *line]])
    assert ids == trained[0]
    assert [label for label in labels if label != IGNORED] == [*answers[0], end]
    assert asked.faults == {}
    assert tokenize_prompts([question], "middle", 256, tokenizer) == [opening]

    listed = replace(question, options=("Paris", " Rome"))
    several = tokenize_task(Task("t", (listed,), "closed_book", 16, stops="\n"), 256, tokenizer)
    assert several.layouts[0].prompt == opening
    assert several.layouts[0].answers == answers
    choice = tokenize_task(Task("t", (listed,), "choice", bare_prompt=[say("user", "Answer:")]), 256, tokenizer)
    for found, prompt in ((several.questions[0], opening), (choice.questions[0], opening), (choice.bare_questions[0], bare)):
        assert (found.prompt, found.options, found.nums_scored) == (prompt, answers, [5, 4])


def test_an_answer_with_a_thought_of_its_own_is_asked_before_it(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.chat_template = read_template("qwen3")
    answer = "<think>\nFrance.\n</think>\n\nParis"
    [(ids, _)] = tokenize([{"messages": [say("user", "Which one?"), say("assistant", answer)]}], tokenizer, tmp_path)
    asked = tokenize_task(Task("t", (Example([say("user", "Which one?")], answer),), max_new_tokens=64), 256, tokenizer)
    assert tokenizer.decode(asked.prompts[0]) == "<|im_start|>user\nWhich one?<|im_end|>\n<|im_start|>assistant\n"
    assert asked.prompts[0] + asked.layouts[0].answers[0] == ids
    assert asked.faults == {}


def test_a_template_that_prints_no_answer_is_refused(tokenizer: PreTrainedTokenizerBase):
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="does not print what the assistant answers"):
        tokenize_prompts([Example([say("user", "Which one?")], "")], "middle", 64, tokenizer)
