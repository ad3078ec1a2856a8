"""Benchmarks: their orders, their rows as released, what is refused, and the check of the rows."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from hftcli import PACKAGE
from hftcli.errors import DataError, InputError
from hftcli.recipe.sections import ContinualSection
from hftcli.tasks import check_tasks, find_sequence, load_task
from hftcli.tasks.check import check_sequence, format_report
from hftcli.tasks.folder import TaskSheet
from hftcli.tasks.standard import STANDARD
from hftcli.tasks.trace import SHEETS, TRACE

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_trace.py"
INVENTED = [{"prompt": f"Say {word}.\nAnswer:", "answer": word} for word in ("fox", "hen", "mole")]


@pytest.fixture(scope="module")
def trace_root(shared) -> str:
    return str(shared / "data" / "trace")


def write_rows(path: Path, rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_task(folder: Path, **splits: object) -> str:
    """A task's folder; its root."""
    for split, rows in ({"train": INVENTED, "test": INVENTED[:1]} | splits).items():
        write_rows(folder / f"{split}.json", rows)
    return str(folder.parent)


def find(tasks: str | tuple[str, ...], root: str | None = None, **settings: str):
    return find_sequence(ContinualSection(tasks=tasks, **settings), root)


# Sequences


def test_the_embedded_sequence_needs_nothing():
    sequence = find("tinyworld")
    assert sequence.tasks == tuple(f"tinyworld/{task}" for task in ("newcomers", "topic", "reverse", "sale", "sum"))
    assert (sequence.epochs, sequence.temperature, sequence.order) == (None, 0.0, "1")


def test_trace_has_two_orders_and_two_protocols(trace_root):
    first = find("trace", trace_root, protocol="paper")
    assert [first.epochs[task] for task in first.tasks] == [1, 1, 5, 5, 1, 5, 5, 5]
    assert first.temperature == 0.1
    second = find("trace", trace_root, order="2", protocol="scripts")
    assert second.tasks[:2] == ("trace/NumGLUE-cm", "trace/NumGLUE-ds")
    assert second.epochs["trace/C-STANCE"] == 5
    assert second.epochs["trace/20Minuten"] == 7
    assert set(second.tasks) == set(first.tasks)


def test_the_standard_streams_have_four_tasks_and_fifteen():
    assert [len(STANDARD.orders[name]) for name in "123456"] == [4, 4, 4, 15, 15, 15]
    for tasks in STANDARD.orders.values():
        assert len(set(tasks)) == len(tasks)
        assert set(tasks) <= set(STANDARD.tasks)


def test_a_list_of_tasks_is_its_own_order(trace_root):
    sequence = find("trace/FOMC, tinyworld/sum,NumGLUE-cm", trace_root)
    assert sequence.tasks == ("trace/FOMC", "tinyworld/sum", "NumGLUE-cm")
    assert sequence.order is None
    assert find(("trace/Py150", "trace/FOMC"), trace_root, protocol="paper").epochs == {"trace/Py150": 5, "trace/FOMC": 1}


@pytest.mark.parametrize(
    ("tasks", "settings", "message", "fix"),
    [
        ("trce", {}, "unknown task 'trce'", "did you mean trace?"),
        ("FOMC", {}, "unknown task 'FOMC'", "did you mean trace/FOMC?"),
        ("trace/fomc", {}, "continual.tasks: unknown task 'trace/fomc'", "did you mean trace/FOMC?"),
        ("zebra/42", {}, "unknown task 'zebra/42'", "known: tinyworld/facts"),
        ("../secrets", {}, "unknown task '../secrets'", ""),
        ("..", {}, "unknown task '..'", ""),
        ("", {}, "unknown task ''", ""),
        ((), {}, "names no task", "tinyworld"),
        (("tinyworld", "mine"), {}, "'tinyworld' is a benchmark, not a task", "newcomers"),
        ("tinyworld/sum,tinyworld/sum", {}, "tinyworld/sum stands there 2 times", "once"),
        ("tinyworld/facts", {}, "tinyworld/facts has no train rows", ""),
        ("tinyworld", {"order": "2"}, "tinyworld has no order '2'", "known: 1"),
        ("tinyworld/sum", {"order": "1"}, "would have no effect", "drop it"),
        ("tinyworld", {"protocol": "paper"}, "continual.protocol paper", "trace"),
        ("trace", {}, "data.root is missing", "prepare_trace.py"),
        ("standard", {}, "data.root is missing", "CL_Benchmark"),
    ],
)
def test_sequences_that_are_refused(tasks, settings, message, fix):
    with pytest.raises(InputError) as raised:
        find(tasks, **settings)
    assert message in raised.value.message
    assert fix in raised.value.fix


# TRACE's rows


@pytest.mark.parametrize("task", SHEETS)
def test_what_is_never_cut_of_a_trace_prompt(task, trace_root):
    cues = {
        "C-STANCE": "\n态度：",
        "FOMC": "\nStance:",
        "MeetingBank": "\nSummary:",
        "Py150": "",
        "ScienceQA": "\n\nAnswer:",
        "NumGLUE-cm": "\nAnswer:",
        "NumGLUE-ds": "\nAnswer:",
        "20Minuten": "\n\nSimplification:",
    }
    instruction = SHEETS[task].instruction
    for split in ("train", "eval", "test"):
        loaded = load_task(f"trace/{task}", trace_root, split)
        assert loaded.cut == ("start" if task == "Py150" else "end")
        for example in loaded.examples:
            start, end = example.body
            assert example.prompt[:start] == instruction
            assert example.prompt[end:].endswith(cues[task])
            assert example.prompt[end:].startswith(SHEETS[task].cue)
            assert 0 < start < end or (task == "Py150" and end == len(example.prompt))


def test_targets_and_choices_are_never_cut(trace_root):
    for task, word in (("C-STANCE", "对象"), ("ScienceQA", "Choices:\nA.")):
        example = load_task(f"trace/{task}", trace_root, max_examples=1).examples[0]
        assert word in example.prompt[example.body[1] :]


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [(f"trace/{task}", "stories15M") for task in ("C-STANCE", "FOMC", "NumGLUE-cm", "NumGLUE-ds", "Py150", "20Minuten")]
    + [(f"tinyworld/{task}", "") for task in ("newcomers", "topic", "reverse", "sale", "sum")],
)
def test_right_answers_fit_with_their_end_token(name, tokenizer, request):
    if tokenizer:
        shared = request.getfixturevalue("shared")
        root, file = str(shared / "data" / "trace"), shared / "models" / tokenizer / "tokenizer.json"
    else:
        root, file = None, PACKAGE / "tinyworld" / "model" / "tokenizer.json"
    encode = Tokenizer.from_file(str(file)).encode
    task = load_task(name, root)
    longest = max(len(encode(example.answer, add_special_tokens=False)) for example in task.examples)
    assert longest + 1 <= task.max_new_tokens


def test_lima_is_for_replay_only(trace_root):
    assert load_task("trace/Lima", trace_root, "train", max_examples=5).examples[4].answer
    assert load_task("Lima", trace_root, "train").examples
    with pytest.raises(DataError, match="trace/Lima has no test rows"):
        check_tasks(("trace/Lima",), trace_root)


# The standard streams


def test_a_standard_prompt_names_the_labels(tmp_path):
    write_rows(tmp_path / "TC" / "agnews" / "labels.json", ["World", "Sports"])
    write_rows(tmp_path / "TC" / "agnews" / "test.json", [{"sentence": "Kessel wins.", "label": "Sports"}])
    write_rows(tmp_path / "COPA" / "COPA" / "train.json", [{"sentence": "Choose A or B.", "label": "A"}])
    task = load_task("standard/agnews", str(tmp_path))
    (example,) = task.examples
    assert example.prompt == (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports \nKessel wins.\nAnswer:"
    )
    assert example.prompt[slice(*example.body)] == "Kessel wins."
    assert (example.answer, task.metric) == ("Sports", "normalized_match")
    assert load_task("standard/COPA", str(tmp_path), "train").examples[0].prompt == "Choose A or B.\nAnswer:"
    with pytest.raises(DataError, match=r"TC/yahoo/train\.json is missing"):
        find("standard", str(tmp_path), order="3")


# Folders of tasks


def test_a_folder_of_tasks_with_its_sheet(tmp_path):
    root = write_task(tmp_path / "animals")
    task = load_task("animals", root)
    assert (task.name, task.metric, task.max_new_tokens, task.cut) == ("animals", "exact_match", 512, "middle")
    assert task.examples[0].body == (0, len("Say fox.\nAnswer:"))
    sheet = "metric: number\nmax_new_tokens: 4\ninstruction: 'Say '\ncue: \"\\nAnswer:\"\ncut: start\n"
    (tmp_path / "animals" / "task.yaml").write_text(sheet)
    task = load_task("animals", root, "train", max_examples=2)
    assert (task.metric, task.max_new_tokens, task.cut, len(task.examples)) == ("number", 4, "start", 2)
    assert [example.prompt[slice(*example.body)] for example in task.examples] == ["fox.", "hen."]


def test_the_cue_stands_where_it_is_last():
    sheet = TaskSheet(instruction="Q:", cue="\nA:")
    assert sheet.find_body("Q: one\nA: two\nA: three\nA:") == (2, 22)
    assert sheet.find_body("one\nA:") == (0, 3)
    assert sheet.find_body("Q: no cue") == (2, 9)


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        ("metrc: sari", r"task\.yaml: unknown key 'metrc' \(did you mean metric\?\)"),
        ("metric: blue", r"task\.yaml: metric: unknown metric 'blue'"),
        ("max_new_tokens: 0", r"task\.yaml: max_new_tokens: .*greater than or equal to 1, got 0"),
        ("- metric", r"task\.yaml: the sheet: .*valid dictionary"),
        ("metric: [", r"task\.yaml: not YAML"),
    ],
)
def test_sheets_that_are_refused(sheet, message, tmp_path):
    root = write_task(tmp_path / "animals")
    (tmp_path / "animals" / "task.yaml").write_text(sheet)
    with pytest.raises(DataError, match=message):
        load_task("animals", root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"prompt": "a", "answer": "b"}, {"prompt": "a"}]',
            r'row 2: expected \{"prompt": "\.\.\.", .* got \{"prompt": str\}',
        ),
        ('[{"prompt": "a", "answer": 3}]', r"row 1: .*\"answer\": int"),
        ('["a"]', r"row 1: .*got a str"),
        ('{"prompt": "a", "answer": "b"}', "expected a JSON array of rows"),
        ("[]", "got an empty array"),
        ('{"prompt": "a"}\n{"prompt": "b"}', r"test\.json:2: not JSON: Extra data"),
        ("[{", r"test\.json:1: not JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_rows_that_are_refused(text, message, tmp_path):
    root = write_task(tmp_path / "animals")
    (tmp_path / "animals" / "test.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as raised:
        load_task("animals", root)
    assert str(tmp_path / "animals" / "test.json") in raised.value.message


def test_folders_that_are_refused(tmp_path):
    root = write_task(tmp_path / "animals")
    with pytest.raises(InputError, match="unknown task 'animal'") as raised:
        find("animal", root)
    assert raised.value.fix == "did you mean animals?"
    (tmp_path / "animals" / "test.json").unlink()
    with pytest.raises(DataError, match=r"animals/test\.json is missing"):
        find("animals", root)
    with pytest.raises(DataError, match="no such folder"):
        find("animals", root + "/nowhere")
    write_task(tmp_path / "trace")
    with pytest.raises(InputError, match="'trace' is a benchmark, not a task"):
        find(("animals", "trace"), root)
    write_task(tmp_path / "LLM-CL-Benchmark_500" / "C-STANCE")
    with pytest.raises(DataError, match="is missing") as raised:
        find("trace", root)
    assert raised.value.fix.endswith("LLM-CL-Benchmark_500")


# The check


def test_the_check_counts_what_is_wrong(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text("cue: ' A:'")
    rows = {
        "train": [("a A:", "1"), ("a A:", "1"), ("a A:", "2"), ("b A:", "1"), ("  A:", "1"), ("c A:", " ")],
        "eval": [("d A:", "1"), ("e A:", "1")],
        "test": [("a A:", "2"), ("b A:", "9"), ("b A:", "8"), ("e A:", "1")],
    }
    root = write_task(
        tmp_path / "task",
        **{split: [{"prompt": prompt, "answer": answer} for prompt, answer in pairs] for split, pairs in rows.items()},
    )
    report = check_sequence(("task", "tinyworld/skill"), root)
    first = report.tasks[0]
    assert (first.num_train, first.num_eval, first.num_test) == (6, 2, 4)
    assert (first.num_duplicates, first.num_test_in_train, first.num_eval_in_test, first.num_empty) == (1, 3, 1, 2)
    assert "task: 3 of 4 test prompts are also trained on." in report.warnings
    assert all(warning in format_report(report) for warning in report.warnings)
    assert report.tasks[1].num_eval is None


def test_the_embedded_sequence_is_clean():
    assert check_sequence(find("tinyworld").tasks).warnings == ()


def test_the_cleaned_sample_of_trace_only_lacks_rows(trace_root):
    report = check_sequence(find("trace", trace_root).tasks, trace_root)
    wrong = [warning for warning in report.warnings if "the official set has" not in warning]
    assert wrong == []
    fomc = next(task for task in report.tasks if task.task == "trace/FOMC")
    assert (fomc.num_train, fomc.num_eval, fomc.num_test, fomc.num_official) == (500, 100, 100, (5000, 496, 496))


# The archive


def test_the_archive_becomes_a_root(tmp_path):
    archive, output = tmp_path / "archive.zip", tmp_path / "trace"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("TRACE-Benchmark/README.md", "")
        opened.writestr("../../outside.json", "[]")
        opened.writestr("TRACE-Benchmark/LLM-CL-Benchmark_5000/../../../FOMC/train.json", "[]")
        for task in TRACE.tasks:
            for split in ("train", "eval", "test"):
                rows = INVENTED if split != "test" else [{"prompt": f"Name {task}.", "answer": "yes"}]
                opened.writestr(f"TRACE-Benchmark/LLM-CL-Benchmark_500/{task}/{split}.json", json.dumps(rows))
    command = [sys.executable, str(SCRIPT), str(archive), "--size", "500", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is not the release of sha256 11152d50" in done.stderr
    assert f"data.root={output}" in done.stdout
    assert "trace/FOMC has 3/3/1 rows in train, eval and test; the official set has 5,000/496/496." in done.stdout
    assert find("trace", str(output)).tasks[0] == "trace/C-STANCE"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.zip", "trace"]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    other = subprocess.run([*command[:3], "--size", "1000", "--output", str(tmp_path / "new")], capture_output=True, text=True)
    assert other.returncode == 2
    assert "has no LLM-CL-Benchmark_1000" in other.stderr
