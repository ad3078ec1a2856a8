r"""TRACE (arXiv 2310.06762): eight tasks in sequence, in three languages and in code, with the prompts as released.

    {"prompt": "Solve the following math problem.\nQuestion:\nWhat is half of 12?\nAnswer:", "answer": "6"}

`Lima` lies beside the tasks and is for replay alone. No row ships with hft: most of the datasets forbid it, or say nothing.
"""

from pathlib import Path

from hftcli.tasks import folder
from hftcli.tasks.examples import Benchmark, Protocol, Split, Task
from hftcli.tasks.folder import TaskSheet, read_rows

# TRACE lets every answer have 512 tokens. Here a task has no more than decides its score: whole answers and first characters
# are decided once the longest right one fits (a letter, a number of 18 characters), and a model that goes on writing has lost
# the one and settled the other. The free texts hold the longest right answers of vocabularies of 32,000 and 6,400 tokens.
SHORT, NUMBER, CODE_LINE, SIMPLIFIED, SUMMARY = 8, 32, 128, 384, 512

MATH = TaskSheet(
    metric="number",
    max_new_tokens=NUMBER,
    instruction="Solve the following math problem.\nQuestion:\n",
    cue="\nAnswer:",
    cut="end",
)
SHEETS = {
    "C-STANCE": TaskSheet(
        metric="letter",
        max_new_tokens=SHORT,
        instruction="判断以下文本对指定对象的态度，选择一项：A.支持，B.反对，C.中立。输出A，B或者C。\n文本：\n",
        cue="\n对象：\n",  # the target follows
        cut="end",
    ),
    "FOMC": TaskSheet(
        metric="letter",
        max_new_tokens=SHORT,
        instruction="What is the monetary policy stance for the following text? "
        "A. dovish, B. hawkish, C. neutral. Choose one from A, B and C.\nText:\n",
        cue="\nStance:",
        cut="end",
    ),
    "MeetingBank": TaskSheet(
        metric="rouge_l",
        max_new_tokens=SUMMARY,
        instruction="Write a summary of the following meeting transcripts.\nMeeting transcripts:\n",
        cue="\nSummary:",
        cut="end",
    ),
    # The lines next to the one that is asked for say most.
    "Py150": TaskSheet(metric="edit_similarity", max_new_tokens=CODE_LINE, cut="start"),
    "ScienceQA": TaskSheet(
        metric="first_character",
        max_new_tokens=SHORT,
        instruction="Choose an answer for the following question and give your reasons.\n\nQuestion:\n",
        cue="\n\nChoices:\n",  # the choices follow
        cut="end",
    ),
    "NumGLUE-cm": MATH,
    "NumGLUE-ds": MATH,
    "20Minuten": TaskSheet(
        metric="sari",
        max_new_tokens=SIMPLIFIED,
        instruction="Provide a simplified version of the following paragraph in German.\n\nParagraph:\n",
        cue="\n\nSimplification:",
        cut="end",
    ),
}
REPLAY = "Lima"
ORDERS = {
    "1": tuple(SHEETS),
    "2": ("NumGLUE-cm", "NumGLUE-ds", "FOMC", "20Minuten", "C-STANCE", "Py150", "MeetingBank", "ScienceQA"),
}
# Full fine-tuning: the paper's appendix against the released scripts. Both draw answers at temperature 0.1.
EPOCHS = {"paper": (1, 1, 5, 5, 1, 5, 5, 5), "scripts": (5, 3, 7, 5, 3, 5, 5, 7)}
TEMPERATURE = 0.1
# The set with 5000 training rows a task, which is the paper's: rows in train, eval and test.
NUM_ROWS = {
    "C-STANCE": (5000, 2000, 2000),
    "FOMC": (5000, 496, 496),
    "MeetingBank": (5000, 687, 692),
    "Py150": (5000, 2000, 2000),
    "ScienceQA": (5000, 2000, 2000),
    "NumGLUE-cm": (5000, 41, 81),
    "NumGLUE-ds": (5000, 164, 325),
    "20Minuten": (5000, 200, 200),
}
SOURCE = (
    "download TRACE-Benchmark.zip (drive.google.com/file/d/1S0SmU0WEw5okW_XvP2Ns0URflNzZq6sV, "
    "from github.com/BeyonderXX/TRACE), "
    "run `python scripts/prepare_trace.py TRACE-Benchmark.zip --output DIR`, and set data.root=DIR; "
    "it must hold DIR/<task>/train.json and test.json for each task"
)


def locate(task: str, root: Path, split: Split) -> Path | None:
    """The JSON file of a split; the replay rows are trained on only."""
    return None if task == REPLAY and split != "train" else folder.locate(task, root, split)


def load(task: str, path: Path) -> Task:
    """The task, with the metric and the limits that TRACE gives it."""
    sheet = SHEETS[task] if task in SHEETS else TaskSheet()
    return sheet.make_task(f"trace/{task}", read_rows(path))


TRACE = Benchmark(
    tasks=tuple(SHEETS),
    extra=(REPLAY,),
    orders=ORDERS,
    locate=locate,
    load=load,
    source=SOURCE,
    protocols={name: Protocol(dict(zip(SHEETS, epochs, strict=True)), TEMPERATURE) for name, epochs in EPOCHS.items()},
    num_rows=NUM_ROWS,
)
