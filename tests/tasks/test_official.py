"""The official forms: prompts of lm-evaluation-harness, scorers by hand, and every gold answer right."""

import json
import sys

import pytest

from hftcli.errors import DataError, InputError
from hftcli.tasks import load_task, official
from hftcli.tasks.examples import Example
from hftcli.tasks.metrics import METRICS
from hftcli.tasks.programs import run_program


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_are_the_harness_s(tmp_path):
    row = {"subject": "high_school_biology", "question": " Which? ", "choices": ["x", "y"], "answer": 1}
    (mmlu,) = load_task(write(tmp_path, row)).examples
    assert mmlu.prompt == (
        "The following are multiple choice questions (with answers) about high school biology.\n\nWhich?\nA. x\nB. y\nAnswer:"
    )
    assert (mmlu.answer, mmlu.options) == (" B", (" A", " B"))
    (gsm8k,) = load_task(write(tmp_path, {"question": "Two?", "answer": "It is 2.\n#### 2"})).examples
    assert (gsm8k.prompt, gsm8k.answer) == ("Question: Two?\nAnswer:", " It is 2.\n#### 2")
    with pytest.raises(DataError, match="row 1: 'answer': expected a text that ends in ####"):
        load_task(write(tmp_path, {"question": "Two?", "answer": "2"}))


@pytest.mark.parametrize(
    ("prediction", "strict", "lenient"),
    [
        ("so #### 1,250", 1, 1),
        ("so #### $1250", 0, 1),
        ("It is $1,250.", 0, 1),
        ("1250 and 3", 0, 0),
        ("#### 1250.\nQuestion: what is 3", 1, 1),
        ("", 0, 0),
    ],
)
def test_gsm8k_is_scored_by_its_number(prediction, strict, lenient):
    metric, example = METRICS["gsm8k"], Example("", " a <<1=1>>way\n#### 1,250")
    assert (metric.strict(prediction, example), metric.lenient(prediction, example)) == (strict, lenient)


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("import math\nassert math.gcd(4, 6) == 2", True),
        ("assert 1 == 2", False),
        ("import socket\nsocket.socket()", False),
        ("open('made', 'w')", False),
        ("import os\nos.unlink('guard.py')", False),
        ("import os\nos.fork()", False),
        ("import os\nos.execv('/bin/true', ['true'])", False),
        ("import os, signal\nos.kill(os.getppid(), 9)", False),
        ("kept = bytearray(4 << 30)", False),
        ("raise SystemExit(0)", False),
        ("print('PASSED-')\nimport os\nos._exit(0)", False),
        ("open('/etc/hostname').read()", True),
    ],
)
def test_programs_are_guarded(program, passes):
    assert run_program(program) is passes


def test_a_program_ends_in_time(monkeypatch):
    monkeypatch.setattr("hftcli.tasks.programs.SECONDS", 1)
    assert run_program("while True:\n    pass") is False


def test_humaneval_s_own_solutions_pass_and_others_do_not(shared):
    examples = load_task(str(shared / "data" / "eval" / "humaneval.jsonl")).examples
    metric = METRICS["code"]
    for example in examples[:8]:
        assert metric.strict(example.answer, example) == 1
        assert metric.strict(example.answer + "\n\ndef check(candidate):\n    nonsense", example) == 1  # cut before it
        assert metric.strict("    return None\n", example) == 0


def test_ifeval_s_rules_are_the_harness_s(tmp_path):
    row = {"key": 7, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    limit = {"num_sentences": 2, "relation": "at least"}
    sentences = {"instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [limit]}
    path = write(tmp_path, row, {"key": 8, "prompt": "Two.", **sentences})
    try:
        import lm_eval.tasks.ifeval.utils  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="IFEval's rules are lm-evaluation-harness's, which is not installed"):
            load_task(path)
        return
    task = load_task(path)
    assert len(task.examples) + sum(task.left_out.values()) == 2
    metric = METRICS["instructions"]
    assert [metric.strict(text, task.examples[0]) for text in ("a b", "a, b", "")] == [1, 0, 0]
    assert metric.lenient("Well, yes:\na b", task.examples[0]) == 1


def test_what_a_library_says_while_it_is_imported_is_no_result(tmp_path, monkeypatch, capsys):
    """As lm-evaluation-harness's IFEval, which says "Downloaded punkt_tab" on stdout, where `hft eval --json` prints JSON."""
    package = tmp_path / "lm_eval" / "tasks" / "ifeval"
    package.mkdir(parents=True)
    (package / "utils.py").write_text("print('Downloaded')")
    (tmp_path / "langdetect.py").write_text("class DetectorFactory: seed = None")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lm_eval", "langdetect")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    official._load_rules.__wrapped__()
    assert capsys.readouterr() == ("", "Downloaded\n")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lm_eval", "langdetect")]:
        del sys.modules[name]
