"""Which tasks count as learned in a round and which as known, and what no task could decide."""

import json
from pathlib import Path

import pytest

from hftcli.errors import InputError
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.runners import prepare_continual
from hftcli.runs.measured import split_tasks
from hftcli.runs.scores import HELD_OUT


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Two files of questions, and two folders of tasks."""
    for name in ("q", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "Where?", "answers": ["Here"]}) + "\n")
    for path in ("tasks/A", "tasks/B", "tasks/BoolQA/BoolQA"):
        (tmp_path / path).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / path / f"{split}.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}]))
    (tmp_path / "linked").symlink_to(tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*given: str, objective: str = "sft") -> Recipe:
    return load_recipe(None, ["model.path=m", "eval.num_points=2", *given], objective)


@pytest.mark.parametrize(
    ("given", "learned", "known"),
    [
        (("data.path=./q.jsonl", "eval.tasks=[q.jsonl, other.jsonl]"), ("q.jsonl",), ("other.jsonl",)),
        (("data.path=q.jsonl", "eval.tasks=[tasks/../q.jsonl, ./other.jsonl]"), ("tasks/../q.jsonl",), ("./other.jsonl",)),
        (("data.sources=[{path: tasks/B}, {path: ./other.jsonl}]", "data.root=tasks", "eval.tasks=[A, B, other.jsonl]"),
         ("B", "other.jsonl"), ("A",)),
        (("data.path=tasks/A/train.json", "data.root=tasks", "eval.tasks=[A, B]"), ("A",), ("B",)),
        (("data.path=tasks/A/test.json", "data.root=linked", "eval.tasks=[A, B]"), ("A",), ("B",)),
        (("data.path=linked/A", "data.root=tasks", "eval.tasks=[A, B]"), ("A",), ("B",)),
        (("data.path=tasks/BoolQA/BoolQA/train.json", "data.root=tasks", "eval.tasks=[A, standard/BoolQA]"),
         ("standard/BoolQA",), ("A",)),
        (("data.path=tinyworld/skill", "eval.tasks=[tinyworld/facts, tinyworld/skill]"), ("tinyworld/skill",),
         ("tinyworld/facts",)),
        (("data.path=.", "eval.tasks=[q.jsonl]"), (), ("q.jsonl",)),
        (("data.path=q.jsonl", "eval.tasks=[other.jsonl]", "eval.held_out.path=h.jsonl"), (HELD_OUT,), ("other.jsonl",)),
    ],
)  # fmt: skip
def test_a_task_of_the_rows_that_are_trained_on_is_learned(place, given, learned, known):
    """However the paths are written; a folder in which a file of questions lies among others is not that file."""
    for num_points in (2, "null"):  # a run that is measured at its ends alone tells them apart as well
        found = split_tasks(read(*given, f"eval.num_points={num_points}"))
        assert (found["learned"], found["known"]) == (learned, known)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("stop.max_forgetting=0.1", "data.path=./q.jsonl"), "was known before: q.jsonl asks for what is trained on"),
        (("stop.min_learning=0.1", "data.path=other.jsonl"), "stop.min_learning needs something that asks for"),
        (("checkpoint.best=learning", "data.path=other.jsonl"), "checkpoint.best needs something that asks for"),
    ],
)
def test_what_no_task_could_decide_is_refused(place, given, expected):
    with pytest.raises(InputError) as caught:
        split_tasks(read("eval.tasks=[q.jsonl]", *given))
    assert expected in caught.value.message
    assert caught.value.fix
    swapped = {"data.path=./q.jsonl": "data.path=./other.jsonl", "data.path=other.jsonl": "data.path=./q.jsonl"}
    assert split_tasks(read("eval.tasks=[q.jsonl]", *(swapped.get(key, key) for key in given)))["num_points"] == 2


@pytest.mark.parametrize("by", ["score", "nll"])
def test_the_way_out_of_a_limit_on_preferences_leads_out(place, by):
    given = ["data.path=pairs.jsonl", "stop.min_learning=0.1", "eval.tasks=[q.jsonl]"]
    with pytest.raises(InputError) as caught:
        split_tasks(read(*given, f"stop.by={by}", objective="dpo"))
    assert caught.value.fix == "give eval.held_out, with stop.by: score"
    split_tasks(read(*given, "eval.held_out.path=more.jsonl", "stop.by=score", objective="dpo"))


def test_a_task_of_the_sequence_that_is_asked_besides_counts_as_known_until_its_round(place):
    """And is scored after every round, not by likelihood alone."""
    tasks = ["tinyworld/newcomers", "tinyworld/topic", "tinyworld/reverse", "tinyworld/sum"]
    asked = f"eval.tasks=[tinyworld/facts, {tasks[3]}]"
    given = ["model.path=tinyworld", f"continual.tasks=[{', '.join(tasks)}]", asked, f"output={place}/run"]
    run = prepare_continual(read(*given, "stop.max_forgetting=0.1", objective="continual"))
    run.lock.release()
    found = [round_.read_spec().scoring for round_ in run.rounds]
    both = ("tinyworld/facts", tasks[3])
    assert [scoring.known for scoring in found] == [both, (tasks[0], *both), (*tasks[:2], *both), (*tasks[:3], both[0])]
    assert [scoring.learned for scoring in found] == [(task,) for task in tasks]
    assert [scoring.likelihood for scoring in found] == [(tasks[2],), (), (), ()]
    for scoring in found:
        assert {*both} < {*scoring.after}
        assert not {*scoring.after} & {*scoring.likelihood}
        assert len({*scoring.after}) == len(scoring.after)
    assert found[0].before == (*tasks, both[0])
