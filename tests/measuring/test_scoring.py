"""`hft eval` as a whole: what it prints and writes, what it knows of a run, and what it refuses."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hftcli import PACKAGE
from hftcli.commands.measure import check_asked
from hftcli.errors import InputError, ModelError
from hftcli.measuring.evaluation import Evaluation, Item
from hftcli.measuring.scoring import Examination, examine_model, prepare_exam
from hftcli.models.checkpoint import load_finished
from hftcli.recipe.asking import AskingSection
from hftcli.runs.files import read_model
from hftcli.runs.run import Run

EMBEDDED = PACKAGE / "tinyworld" / "model"
FACTS = "tinyworld/facts"
CPU = torch.device("cpu")


def examine(**asked) -> Evaluation:
    return examine_model(Examination(**{"model": str(EMBEDDED), "tasks": (FACTS,), **asked}), {}, lambda *_: None)[0]


def test_scores_items_and_json(hft, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Where is it?", "choices": ["here", "there"], "answer": 0}\n')
    done = hft(
        "eval", "--model", "tinyworld", "--tasks", f"{rows},{FACTS}", "--max-examples", 9, "--output", tmp_path / "x.json",
        "--json",
    )  # fmt: skip
    evaluation = read_model(tmp_path / "x.json", Evaluation)
    printed = json.loads(done.stdout)
    assert printed.pop("units") == {"score": "a share, 0 to 1; tables show it in points, times 100", "nll": "nats per token"}
    assert evaluation == Evaluation.model_validate(printed)
    assert list(evaluation.tasks) == [str(rows), FACTS]
    assert evaluation.base_text is None
    items = [Item.model_validate_json(line) for line in (tmp_path / "x.items.jsonl").read_text().splitlines()]
    assert [(item.task, item.index) for item in items] == [(str(rows), 0), *((FACTS, index) for index in range(9))]
    for task, score in evaluation.tasks.items():
        own = [item for item in items if item.task == task]
        assert score.score == sum(item.score for item in own) / len(own) == sum(item.score for item in own) / score.num_examples


def test_the_base_is_asked_the_same_questions(hft, tmp_path):
    """Beside a base whose weights are those of the model but for the mlp of a layer."""
    base = copy_model(tmp_path / "base", lambda weights: weights["model.layers.1.mlp.down_proj.weight"].mul_(-1))
    rows = tmp_path / "rows.jsonl"
    names = ["Ada", "Bo", "Cy", "Di", "Eve", "Fay"]
    questions = [
        {"question": f"Where does {name} live?", "choices": ["here", "there", "far"], "answer": place % 3}
        for place, name in enumerate(names)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    arguments = ["--model", "tinyworld", "--base", base, "--tasks", f"{rows},{FACTS}", "--max-examples", 6]
    shown = hft("eval", *arguments, "--output", tmp_path / "x.json").stdout
    assert f"before, {base}, and after" in shown
    assert "won, less guessing" in shown
    found = read_model(tmp_path / "x.json", Evaluation)
    alone = examine(model=str(base), tasks=(str(rows), FACTS), max_examples=6)
    assert found.base_tasks == alone.tasks
    assert found.tasks[FACTS].score == 1 > found.base_tasks[FACTS].score
    items = [Item.model_validate_json(line) for line in (tmp_path / "x.items.jsonl").read_text().splitlines()]
    for task, change in found.items.items():
        own = [item for item in items if item.task == task]
        assert change.transitions.num_won == sum(item.score > item.base_score for item in own)
        assert change.transitions.num_lost == sum(item.score < item.base_score for item in own)
        assert change.change.mean == pytest.approx(found.tasks[task].score - found.base_tasks[task].score)
    assert (found.items[FACTS].adjusted, found.items[str(rows)].adjusted is None) == (None, False)


def test_a_file_of_mmlu_is_asked_as_it_is(hft, shared, tmp_path):
    path = shared / "data" / "eval" / "mmlu_test_40per_subject.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    model = shared / "models" / "stories260K"
    hft("eval", "--model", model, "--tasks", path, "--max-examples", 20, "--output", tmp_path / "x.json")
    score = read_model(tmp_path / "x.json", Evaluation).tasks[str(path)]
    assert score.num_examples == 20
    assert set(score.others) == {"acc_norm", "acc_content"}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:20]]
    items = [Item.model_validate_json(line) for line in (tmp_path / "x.items.jsonl").read_text().splitlines()]
    for row, item in zip(rows, items, strict=True):
        assert item.num_choices == 4
        likeliest = max(range(4), key=item.log_likelihoods.__getitem__)
        assert item.prediction == "ABCD"[likeliest]
        assert item.score == (likeliest == row["answer"])
    assert score.score == sum(item.score for item in items) / 20


@pytest.mark.slow
def test_a_run_knows_its_base_and_its_scores_come_again(hft, settings, shared, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Where is it?", "choices": ["here", "there"], "answer": 0}\n' * 3)
    values = {"train.max_steps": 3, "train.bf16": "false", "eval.tasks": json.dumps([FACTS, str(rows)])}
    hft("sft", "--output", tmp_path / "run", *settings(values))
    scores = Run(tmp_path / "run").last_finished.read_scores().after
    found = json.loads(hft("eval", "--model", tmp_path / "run", "--tasks", f"{FACTS},{rows}", "--json").stdout)
    assert found["base"] == str(EMBEDDED.resolve())
    for name, score in scores.items():
        assert found["tasks"][name]["score"] == score.score
        assert found["tasks"][name]["nll"] == pytest.approx(score.nll, rel=1e-3)
    drift = found["base_text"]
    assert drift["source"] == "samples of the base"
    assert drift["kl"] > 0
    assert drift["num_texts"] == 64


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--model", "tinyworld"], "there is nothing to measure"),
        (["--model", "tinyworld", "--text", "x.jsonl"], "--text and --prompts compare a model with its base"),
        *(
            (["--model", "tinyworld", "--base", "tinyworld", *option], f"{option[0]} says how tasks are asked, and none is")
            for option in (
                ["--shots", 5],
                ["--chat"],
                ["--no-chat"],
                ["--strict"],
                ["--allow-code"],
                ["--no-generate"],
                ["--max-new-tokens", 9],
            )
        ),
        (["--model", "tinyworld", "--tasks", FACTS, "--no-chat"], f"each of {FACTS} has a way of its own to be asked"),
        (["--model", "tinyworld", "--tasks", FACTS, "--output", "x.txt"], "expected a file that ends in .json"),
        (["--model", "tinyworld", "--tasks", "trace/FOMC"], "--root is missing: the rows of trace/FOMC do not ship"),
        (["--model", "tinyworld", "--tasks", FACTS, "--max-length", "8"], "fix: raise --max-length"),
    ],
)
def test_what_can_be_refused_at_once(hft, arguments, fault):
    assert fault in hft("eval", *arguments, code=2).stderr


def copy_model(folder, change=None):
    shutil.copytree(EMBEDDED, folder)
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_does_not_load(tmp_path):
    with pytest.raises(ModelError, match="config does not load|no weights|no such folder"):
        examine(model=str(tmp_path))
    cut = copy_model(tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        load_finished(cut.parent, torch.float32, CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    lacking = copy_model(tmp_path / "lacking", lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=f"lacks 1 parameters, the first is {name}"):
        load_finished(lacking, torch.float32, CPU)
    wide = copy_model(tmp_path / "wide", lambda weights: weights.update({name: weights[name][:4].clone()}))
    with pytest.raises(ModelError, match="does not load"):
        load_finished(wide, torch.float32, CPU)


def test_both_models_stop_at_the_ends_of_both(tmp_path):
    """A base whose generation stops at another token than that of the model that was trained from it."""
    folders, ends = {}, {"model": 5, "base": 7}
    for name, end in ends.items():
        folders[name] = str(copy_model(tmp_path / name))
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Where is it?", "answers": ["here"]}\n')
    for given, expected in (({"base": folders["base"]}, {5, 7}), ({}, {5})):
        exam = prepare_exam(Examination(folders["model"], (str(rows),), **given))
        assert {5, 7} & set(exam.own[str(rows)].end_ids) == expected


def test_a_base_with_other_tokens_is_refused(shared):
    with pytest.raises(ModelError, match="has another tokenizer"):
        examine(base=str(shared / "models" / "stories260K"))


def test_questions_longer_than_the_model_are_refused():
    with pytest.raises(ModelError, match="--max-length is 100000, but .* positions"):
        examine(max_length=100_000)


@pytest.mark.slow
def test_several_processes_find_what_one_does(hft, tmp_path):
    """Answers by likelihood, written ones and choices; and of a base."""
    rows = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(7)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for num_processes in (1, 3):
        tasks = f"{FACTS},tinyworld/skill,{tmp_path / 'choices.jsonl'}"
        shown = hft(
            "eval", "--model", EMBEDDED, "--base", EMBEDDED, "--tasks", tasks, "--max-examples", 20, "--num-processes",
            num_processes, "--output", tmp_path / f"{num_processes}.json", "--json",
        )  # fmt: skip
        items = [json.loads(line) for line in (tmp_path / f"{num_processes}.items.jsonl").read_text().splitlines()]
        found.append((json.loads(shown.stdout), items))
    (alone, items), (together, others) = found
    for name, score in alone["tasks"].items():
        assert together["tasks"][name]["score"] == score["score"]
        assert together["tasks"][name]["nll"] == pytest.approx(score["nll"], rel=1e-5)
    assert alone["base_tasks"].keys() == together["base_tasks"].keys()
    assert [(item["task"], item["index"], item["score"], item["prediction"]) for item in items] == [
        (item["task"], item["index"], item["score"], item["prediction"]) for item in others
    ]


@pytest.mark.slow
def test_a_first_rank_that_is_killed_ends_the_others(tmp_path):
    """They would wait for it for as long as a task of another program may take."""
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from hftcli.measuring.ranks import leading\n"
        "from hftcli.measuring.scoring import Examination\n"
        f"with leading(Examination(model={str(EMBEDDED)!r}, tasks=({FACTS!r},)), 2):\n"
        "    print(*pathlib.Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read_text().split(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False, timeout=120)
    (other,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{other}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists()


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(tmp_path):
    """A model that only the first rank can read to its end: the second finds its file gone."""
    program = (
        "import os, sys, time\n"
        "from hftcli.measuring.ranks import leading\n"
        "with leading('no examination', 2):\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "rank 1 of 2 ended with code 1" in done.stderr


@pytest.mark.parametrize(
    ("option", "asking"),
    [
        ("--no-generate", {"generate": False}),
        ("--shots", {"shots": 5}),
        ("--chat", {"chat": True}),
        ("--max-new-tokens", {"max_new_tokens": 8}),
        ("--strict", {"strict": True}),
    ],
)
def test_a_foreign_task_refuses_what_would_not_change_how_it_is_asked(option, asking):
    with pytest.raises(InputError, match=f"{option} has no effect on harness:arc_easy"):
        examine(tasks=(FACTS, "harness:arc_easy"), asking=AskingSection(**asking))


def test_a_length_that_no_task_takes_is_refused():
    with pytest.raises(InputError, match="--max-length has no effect on harness:arc_easy"):
        check_asked(None, ("harness:arc_easy",), False, {}, 64, None)
    check_asked(None, ("harness:arc_easy", FACTS), False, {}, 64, None)
    check_asked("base", ("harness:arc_easy",), False, {}, 64, None)  # whose samples it cuts


def test_a_cut_of_what_is_not_written_is_refused():
    with pytest.raises(InputError, match="--no-generate writes nothing"):
        check_asked(None, (FACTS,), False, {"generate": False, "max_new_tokens": 3}, None, None)
