"""What a round reads before it has weights."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from hftcli.errors import DataError
from hftcli.recipe.loading import load_recipe
from hftcli.runners import make_held_out_section, prepare_single
from hftcli.runs.scores import HELD_OUT
from hftcli.training.overlap import count_shared, list_named
from hftcli.training.reading import holds_questions, read_assignment, read_named, tokenize_rows
from hftcli.training.saving import load_saved_tokenizer


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Where?", "answers": ["Here"]}, True),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 0}, True),
        ({"question": "How many?", "answer": "#### 7"}, False),  # GSM8K's rows can be trained on as they are
        ({"messages": []}, False),
        ({"picture": "x"}, False),
    ],
)
def test_rows_to_keep_may_be_questions(tmp_path, row: dict, expected: bool):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert holds_questions(path) == expected
    assert not holds_questions(tmp_path / "missing.jsonl")
    path.write_text("not JSON")
    assert not holds_questions(path)


def test_rows_that_two_sets_share_are_counted():
    """Of five rows one that stands twice and another, packed or not; of three pairs the one that is the same in all parts."""
    held_out = Dataset.from_dict({"input_ids": [[1, 2], [1, 2], [3], [4, 5], [2, 1]]})
    alone = {"input_ids": [[1, 2], [3], [3], [1], [2, 1, 4]]}
    packed = {"input_ids": [[1, 2, 3], [3, 1, 2, 1, 4]], "seq_lengths": [[2, 1], [1, 1, 3]]}
    for trained in (alone, packed):
        assert count_shared(held_out, Dataset.from_dict(trained)) == 3
    pairs = {"prompt_ids": [[1], [1], [1, 2]], "chosen_ids": [[2, 3], [2], [3]], "rejected_ids": [[4], [4], [4]]}
    other = {"prompt_ids": [[1], [1]], "chosen_ids": [[2, 3], [2]], "rejected_ids": [[4], [5]]}
    assert count_shared(Dataset.from_dict(pairs), Dataset.from_dict(other)) == 1


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_held_out_rows_that_are_also_trained_on_are_said(tmp_path, objective: str, caplog):
    rows = [{"prompt": f"{name}:", "completion": "yes", "chosen": "yes", "rejected": "no"} for name in "abcdef"]
    for row in rows:
        for key in ("chosen", "rejected") if objective == "sft" else ("completion",):
            del row[key]
    for name, part in (("train", rows[:4]), ("other", rows[2:]), ("new", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, expected in (("other", (4, 2)), ("new", (2, 0))):
        caplog.clear()
        given = [
            f"data.path={tmp_path}/train.jsonl",
            f"eval.held_out.path={tmp_path}/{name}.jsonl",
            f"output={tmp_path}/{name}",
        ]
        base = "tinyworld" if objective == "sft" else "tinyworld-dpo"
        run, round_ = prepare_single(load_recipe(base, given, objective))
        run.lock.release()
        report = tokenize_rows(read_assignment(round_.read_spec()), lambda done, total: None).report
        assert (report.num_held_out, report.num_held_out_in_train) == expected
        unit = "sequences" if objective == "sft" else "pairs"
        assert (f"eval.held_out: 2 of 4 held-out {unit} are also trained on" in caplog.text) == (name == "other")


def write_rows_to_cut(folder: Path, is_pair: bool) -> tuple[list[str], str]:
    """Rows that fit, and beside one of them those that a cut to 32 tokens shortens, or leaves nothing of.

    Returns:
        What the recipe is given for them, and the file of the second.
    """

    def write(name: str, *texts: tuple[str, str]) -> str:
        keys = ("chosen", "rejected") if is_pair else ("completion",)
        rows = [{"prompt": prompt} | dict(zip(keys, (answer, "no"), strict=False)) for prompt, answer in texts]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    long = "Who is the baker? " * 100
    others = write("others.jsonl", ("Who?", "yes"), ("Who?", long), (long, "yes"), (long, "Yes."))
    return [f"data.path={write('own.jsonl', ('Where?', 'here'), ('When?', 'now'))}", "data.max_length=32"], others


LOST = "of 4 rows, 2 are left out and 1 are cut: they have more than data.max_length, 32 tokens"


@pytest.mark.parametrize("base", ["tinyworld", "tinyworld-dpo"])
def test_held_out_rows_that_do_not_fit_are_said(tmp_path, base: str, caplog):
    given, others = write_rows_to_cut(tmp_path, is_pair=base == "tinyworld-dpo")
    given += [f"eval.held_out.path={others}", "eval.tasks=[]", f"output={tmp_path / 'run'}"]
    run, round_ = prepare_single(load_recipe(base, given))
    run.lock.release()
    report = tokenize_rows(read_assignment(round_.read_spec()), lambda done, total: None).report
    assert (report.num_used, report.num_dropped, report.num_truncated, report.num_held_out) == (2, 0, 0, 2)
    assert [record.message for record in caplog.records if LOST in record.message] == [f"eval.held_out: {LOST}"]


def test_held_out_pairs_are_cut_as_those_that_train(tmp_path):
    given = ["data.drop_identical=true", "data.max_length=99", "data.bad_rows=drop"]
    held_out = make_held_out_section(load_recipe("tinyworld-dpo", [*given, f"output={tmp_path}"]))
    assert (held_out.drop_identical, held_out.max_length, held_out.bad_rows) == (True, 99, "drop")


@pytest.mark.parametrize(
    ("path", "asked", "found"),
    [
        ("tinyworld/facts", ("tinyworld/facts", "tinyworld/facts-reworded"), ("tinyworld/facts",)),
        ("rows/birds/test.json", ("birds", "trace/FOMC", "q.jsonl"), ("birds",)),
        ("rows/../q.jsonl", ("birds", "q.jsonl"), ("q.jsonl",)),
        ("trace/FOMC", ("birds", "FOMC", "tinyworld/facts"), ("FOMC",)),
        ("rows/FOMC/test.json", ("birds", "trace/FOMC"), ("trace/FOMC",)),
        ("rows/birds/train.json", ("birds",), ()),
        ("owner/name", ("birds", "q.jsonl"), ()),
    ],
)
def test_tasks_whose_test_rows_are_named_are_told_by_their_file(tmp_path, monkeypatch, path, asked, found):
    """And two of one benchmark that share a file by their names."""
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list_named(path, asked, "rows") == found


@pytest.mark.parametrize(
    "given",
    [
        ["freeze.grain=directions", "freeze.keep={path: tinyworld/facts, samples: 4}"],
        ["freeze.rank=fisher", "freeze.importance.path=tinyworld/facts"],
    ],
)
def test_questions_that_are_to_be_kept_and_are_asked_are_counted(tmp_path, caplog, given):
    for name, asked, expected in (("same", "tinyworld/facts", 7), ("other", "tinyworld/facts-reworded", 0)):
        caplog.clear()
        others = [f"eval.tasks=[{asked}, tinyworld/skill]", "eval.max_examples=7", f"output={tmp_path}/{name}"]
        run, round_ = prepare_single(load_recipe("tinyworld", [*given, *others]))
        run.lock.release()
        report = tokenize_rows(read_assignment(round_.read_spec()), lambda done, total: None).report
        assert report.num_asked_in_named == expected
        said = "names the rows of tinyworld/facts, of which 7 questions are asked: they say nothing of others"
        assert (said in caplog.text) == (expected == 7)


def test_fine_tuning_asks_and_keeps_tasks_that_lie_under_a_root(tmp_path, monkeypatch):
    """From any folder, and though there is a folder by the task's name."""
    for task in ("birds", "FOMC"):
        (tmp_path / "rows" / task).mkdir(parents=True)
        (tmp_path / "rows" / task / "test.json").write_text(json.dumps([{"prompt": f"{task}:", "answer": "A"}] * 2))
    (tmp_path / "trace" / "FOMC").mkdir(parents=True)
    (tmp_path / "trace" / "FOMC" / "train.json").write_text(json.dumps([{"prompt": "another", "answer": "B"}]))
    monkeypatch.chdir(tmp_path)
    given = ["data.root=rows", "eval.tasks=[birds, trace/FOMC]", "freeze.grain=directions", "freeze.keep.path=trace/FOMC"]
    run, round_ = prepare_single(load_recipe("tinyworld", [*given, "output=run"]))
    run.lock.release()
    spec = round_.read_spec()
    assert (spec.data.root, spec.freeze.keep.path) == (str(tmp_path / "rows"), "trace/FOMC")
    monkeypatch.chdir(tmp_path.parent)
    assignment = read_assignment(spec)
    assert [[row.prompt for row in task.task.examples] for task in assignment.asked.values()] == [["birds:"] * 2, ["FOMC:"] * 2]
    kept, _ = read_named(spec, assignment.tokenizer, "freeze.keep", spec.freeze.keep)
    texts = [assignment.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in kept]
    assert [text.replace(" ", "") for text in texts] == ["FOMC:A"] * 2


NAMED = [
    ["freeze.grain=directions", "freeze.keep.path=named.jsonl"],
    ["freeze.rank=fisher", "freeze.importance.path=named.jsonl"],
]
TALK = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<|user|> Me."}]}


def read_rows_named(folder, base: str, *given: str) -> Dataset:
    """What is read of the rows that `freeze` names."""
    run, round_ = prepare_single(load_recipe(base, [*given, "eval.tasks=[]", f"output={folder / 'run'}"]))
    run.lock.release()
    rows = tokenize_rows(read_assignment(round_.read_spec()), lambda done, total: None)
    return rows.kept or rows.scored


@pytest.mark.parametrize("named", NAMED)
def test_what_data_says_of_rows_holds_for_those_that_are_named(tmp_path, monkeypatch, named):
    """What the messages advise works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (TALK, {**TALK, "images": ["x"]}, TALK)))
    with pytest.raises(DataError, match="column 'images' carries meaning") as caught:
        read_rows_named(tmp_path, "tinyworld", *named)
    assert re.search("data.ignore_columns.*data.bad_rows: drop", caught.value.fix)
    ids = {}
    for given, expected in (("bad_rows=drop", 2), ("ignore_columns=[images]", 3)):
        found = read_rows_named(tmp_path, "tinyworld", *named, f"data.{given}")
        assert len(found) == expected
        ids[given] = found[0]["input_ids"]
    escaped = ["data.bad_rows=drop", "data.special_tokens_in_text=escape"]
    assert len(read_rows_named(tmp_path, "tinyworld", *named, *escaped)[0]["input_ids"]) > len(ids["bad_rows=drop"])


@pytest.mark.parametrize("named", NAMED)
def test_rows_that_are_named_and_do_not_fit_are_said(tmp_path, monkeypatch, named, caplog):
    monkeypatch.chdir(tmp_path)
    given, others = write_rows_to_cut(tmp_path, is_pair=False)
    Path(others).rename("named.jsonl")
    assert len(read_rows_named(tmp_path, "tinyworld", *named, *given)) == 2
    key = named[1].partition(".path")[0]
    assert [record.message for record in caplog.records if LOST in record.message] == [f"{key}: {LOST}"]


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize(
    ("files", "message", "fix"),
    [
        ({"named.jsonl/test.jsonl": TALK, "named.jsonl/dev.jsonl": TALK}, "there is no split train", "give a file"),
        ({"named.jsonl": {"prompt": "a", "chosen": "b", "rejected": "c"}}, "they are preference pairs", "give rows that"),
        ({}, r"{key}.path named.jsonl: no such file", ""),
    ],
)  # fmt: skip
def test_of_rows_that_are_named_there_is_a_path_alone(tmp_path, monkeypatch, named, files, message, fix):
    monkeypatch.chdir(tmp_path)
    for name, row in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    key = named[1].partition(".path")[0]
    for base in ("tinyworld", "tinyworld-dpo"):
        with pytest.raises(DataError) as caught:
            read_rows_named(tmp_path, base, *named)
        assert message.format(key=key) in str(caught.value).replace(f"{tmp_path}/", "")
        assert caught.value.fix.startswith(fix)


def test_special_tokens_of_held_out_questions_are_refused_where_those_of_rows_are(tmp_path):
    pattern = "data.pattern={prompt: '{b}:', verbalizers: {0: Right, 1: Wrong}}"
    for name, texts in (("own", ("Is it?", "Was it?")), ("held", ("Will it?", "Can <|user|> it?"))):
        rows = [{"b": text, "label": place} for place, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.path={tmp_path / 'own.jsonl'}", pattern, f"eval.held_out.path={tmp_path / 'held.jsonl'}", "eval.tasks=[]"]
    for policy in ("keep", "refuse"):
        others = [f"data.special_tokens_in_text={policy}", f"output={tmp_path / policy}"]
        run, round_ = prepare_single(load_recipe("tinyworld", [*given, *others]))
        run.lock.release()
        task = read_assignment(round_.read_spec())
        if policy == "keep":
            assert tokenize_rows(task, lambda done, total: None).asked.keys() == {HELD_OUT}
            continue
        with pytest.raises(DataError, match=r"question 2: its text holds the special tokens <\|user\|>$"):
            tokenize_rows(task, lambda done, total: None)


@pytest.mark.parametrize("is_removed", [False, True])
def test_the_chat_template_that_is_saved_is_the_one_that_rows_had(tmp_path, is_removed):
    """The file is the user's, who may edit or remove it while the round trains."""
    template = tmp_path / "mine.jinja"
    template.write_text("{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}")
    run, round_ = prepare_single(
        load_recipe("tinyworld", [f"model.chat_template={template}", "eval.tasks=[]", f"output={tmp_path / 'run'}"])
    )
    run.lock.release()
    assignment = read_assignment(round_.read_spec())
    if is_removed:
        template.unlink()
    else:
        template.write_text("{{ messages[0]['content'] }}")
    saved = load_saved_tokenizer(assignment)
    assert saved.chat_template == "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
