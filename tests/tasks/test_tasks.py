"""Benchmarks: their orders, their questions, and what is refused."""

import pytest
from tasks.written_tasks import find
from tokenizers import Tokenizer

from hftcli import PACKAGE
from hftcli.errors import InputError
from hftcli.tasks import list_tasks, load_task
from hftcli.tasks.standard import STANDARD


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


@pytest.mark.parametrize("name", list_tasks())
def test_tasks_have_questions_with_answers(name):
    task = load_task(name)
    assert len(task.examples) >= 100
    assert all(example.prompt and example.answer for example in task.examples)
