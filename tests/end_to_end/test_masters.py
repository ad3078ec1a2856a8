"""What is printed is of the files, and what they round away is carried on: one script of plain transformers says so."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from end_to_end.plain_scorer import PlainModel
from safetensors.torch import load_file, save_file

from hftcli import PACKAGE
from hftcli.models.proof import verify_round
from hftcli.runs.run import Round, Run
from hftcli.runs.scores import HELD_OUT, Score

NUM_ROWS = 8
TASKS = {"newcomers": 8, "topic": 4, "sum": 4}  # tokens after which an answer is cut
SHORT = {
    "model.dtype": "bfloat16",
    "data.max_length": 96,
    "train.max_steps": 13,
    "train.global_batch_size": 8,
    "train.per_device_train_batch_size": 8,
    "train.learning_rate": 3e-4,
    "launch.num_processes": 1,
    "eval.max_examples": NUM_ROWS,
}
mixed_or_not = pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])


def list_rows(task: str) -> list[tuple[str, str]]:
    """The first questions of one of tinyworld's tasks."""
    path = PACKAGE / "tinyworld" / "sequence" / task / "test.json"
    return [(row["prompt"], row["answer"]) for row in json.loads(path.read_text())[:NUM_ROWS]]


ALL_ROWS = [row for task in TASKS for row in list_rows(task)]


@pytest.fixture(scope="module")
def change(shared, tmp_path_factory) -> dict[str, object]:
    """A short round of a model that is stored in bfloat16 from then on, on the very questions that it is asked."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in ALL_ROWS))
    return SHORT | {
        "model.path": shared / "models" / "stories260K",
        "data.path": rows,
        "eval.tasks": "[tinyworld/newcomers,tinyworld/topic]",
        "eval.held_out.path": rows,
    }


def assert_scored(folder: Path, mixed: bool, found: dict[str, Score], round_: Round | None = None) -> None:
    """That scores are what a plain script finds in a folder; with the round that left it, every answer too."""
    model = PlainModel(folder, mixed)
    for name, score in found.items():
        if name == HELD_OUT:
            # hft reads them in several batches, the script in one: in bfloat16 the sums depend on how many rows a batch has.
            assert score.nll == pytest.approx(model.read_mean(ALL_ROWS), abs=1e-2 if mixed else 1e-4)
            continue
        task = name.removeprefix("tinyworld/")
        opinion = model.score(list_rows(task), TASKS[task])
        assert score.nll == pytest.approx(opinion.nll, abs=1e-4)
        if score.score is not None:
            assert score.score == opinion.score
        if score.score is not None and round_ is not None:
            answers = [item.prediction for item in round_.read_predictions("after", name)]
            assert [answer.strip() for answer in answers] == [text.strip() for text in opinion.written]


@pytest.fixture(scope="module")
def trained(hft, settings, change, tmp_path_factory) -> Path:
    """A run whose file drops much of its update, in float32 arithmetic."""
    run = tmp_path_factory.mktemp("runs") / "sft"
    hft("sft", "--output", run, *settings(change | {"train.bf16": False, "train.learning_rate": 2e-5}))
    return run


def get_round(run: Path) -> Round:
    return Run(run).rounds[-1]


def test_scores_are_of_the_file_and_the_dropped_update_is_said(hft, trained, shared):
    round_ = get_round(trained)
    scores, report = round_.read_scores(), round_.read_result().masters
    assert_scored(round_.checkpoint, False, scores.after, round_)
    start = load_file(shared / "models" / "stories260K" / "model.safetensors")
    start = {name: values.to(torch.bfloat16) for name, values in start.items()}
    masters, stored = load_file(round_.masters_path), load_file(round_.checkpoint / "model.safetensors")
    assert set(masters) == set(round_.read_plan().trained)
    update = sum((masters[name] - start[name].float()).double().square().sum() for name in masters)
    dropped = sum((masters[name] - stored[name].float()).double().square().sum() for name in masters)
    assert report.dropped_fraction == pytest.approx((dropped / update).sqrt().item(), rel=1e-6)
    assert 0.3 < report.dropped_fraction < 1
    norm = next(name for name in masters if "layernorm" in name)
    assert report.dropped[norm] == pytest.approx(1.0)
    shown = hft("report", trained).stdout
    assert f"drops {report.dropped_fraction:.1%} of the norm of the update" in shown
    assert f"<td>{report.dropped_fraction:.1%}</td>" in (trained / "report.html").read_text()


@pytest.mark.parametrize("grain", ["directions", "columns", "entries"])
def test_the_start_is_asked_as_its_file_holds_it_whatever_part_is_to_train(
    hft, settings, trained, change, tmp_path, monkeypatch, grain
):
    monkeypatch.setenv("HFT_CACHE", str(tmp_path / "cache"))  # where no other round has asked it
    given = {"model.path": trained, "freeze.grain": grain, "train.bf16": False, "train.max_steps": 1}
    hft("sft", "--output", tmp_path / "part", *settings(change | given))
    assert_scored(get_round(trained).checkpoint, False, get_round(tmp_path / "part").read_scores().before)


def test_masters_that_do_not_round_to_the_file_fail_the_proof(hft, trained, tmp_path):
    round_ = Round(shutil.copytree(get_round(trained).folder, tmp_path / "round"))
    assert verify_round(round_).num_masters == len(round_.read_plan().trained)
    masters = load_file(round_.masters_path)
    name = next(iter(masters))
    masters[name].view(-1)[3] += 1.0
    save_file(masters, round_.masters_path, {"format": "pt"})
    found = verify_round(round_)
    assert found.unlike_masters == (name, "masters.safetensors has other bytes than were written")
    assert f"not the rounding of the float32 masters: {name}" in hft("verify", round_.folder, code=3).stdout
    round_.masters_path.write_bytes(round_.masters_path.read_bytes()[:-4])
    (line,) = verify_round(round_).unlike_masters
    assert line.startswith("masters.safetensors has ")
    assert "instead of" in line
    round_.masters_path.unlink()
    assert verify_round(round_).passed


def test_a_copy_without_its_masters_begins_from_the_file_and_says_so(hft, settings, trained, change, tmp_path):
    copied = shutil.copytree(get_round(trained).checkpoint, tmp_path / "copied")
    said = {}
    for name, path in (("whole", trained), ("copied", copied)):
        again = change | {"model.path": path, "train.bf16": False}
        said[name] = hft("sft", "--dry-run", "--output", tmp_path / f"run-{name}", *settings(again)).stdout
    assert "begins from the float32 masters beside its checkpoint" in said["whole"]
    assert "its float32 masters are not beside it: begins from its files, which hold them rounded" in said["copied"]


@pytest.mark.slow
@mixed_or_not
def test_every_score_of_sft_then_dpo_is_that_of_the_files(hft, settings, change, tmp_path, mixed):
    given = change | {"train.bf16": mixed}
    hft("sft", "--output", tmp_path / "sft", *settings(given))
    first = get_round(tmp_path / "sft")
    assert_scored(first.checkpoint, mixed, first.read_scores().after, first)
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "chosen": a, "rejected": " nothing"}) + "\n" for p, a in ALL_ROWS))
    pairs = {"model.path": tmp_path / "sft", "data.path": rows, "eval.held_out.path": rows}
    hft("dpo", "--output", tmp_path / "dpo", *settings(given | pairs))
    second = get_round(tmp_path / "dpo")
    assert second.read_result().masters.start == "taken"
    assert set(load_file(second.masters_path)) == {*first.read_plan().trained, *second.read_plan().trained}
    assert_scored(first.checkpoint, mixed, second.read_scores().before)
    assert_scored(second.checkpoint, mixed, second.read_scores().after, second)
    assert verify_round(second).passed

    models = [PlainModel(folder, mixed) for folder in (first.checkpoint, second.checkpoint)]
    both = [row for prompt, answer in ALL_ROWS for row in ((prompt, answer), (prompt, " nothing"))]
    before, after = (-torch.tensor([nats for nats, _ in model.read(both)]).view(-1, 2) for model in models)
    margins = (0.1 * (after - before)).diff(dim=1).neg().flatten().tolist()
    likelier = (after[:, 0] > after[:, 1]).tolist()
    scores = second.read_result().pairs.after
    assert scores.reward_margin == pytest.approx(sum(margins) / len(margins), abs=1e-2 if mixed else 1e-5)
    assert scores.reward_accuracy == sum(margin > 0 for margin in margins) / len(margins)
    assert scores.likelihood_accuracy == sum(likelier) / len(likelier)


@pytest.mark.slow
@mixed_or_not
def test_every_score_of_three_rounds_is_that_of_the_files_and_one_file_of_masters_is_left(
    hft, settings, shared, tmp_path, mixed
):
    tasks = ",".join(f"tinyworld/{task}" for task in TASKS)
    given = SHORT | {"train.bf16": mixed, "model.path": shared / "models" / "stories260K", "eval.tasks": "[]"}
    hft("continual", "--tasks", tasks, "--output", tmp_path / "run", *settings(given))
    rounds = Run(tmp_path / "run").rounds
    for round_ in rounds:
        assert_scored(round_.checkpoint, mixed, round_.read_scores().after, round_)
    assert [round_.masters_path.exists() for round_ in rounds] == [False, False, True]
    assert [round_.read_result().masters.start for round_ in rounds] == ["none", "taken", "taken"]
    ever = {name for round_ in rounds for name in round_.read_plan().trained}
    assert set(load_file(rounds[-1].masters_path)) == ever
    hft("verify", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "num_steps"), [("[NumGLUE-cm,FOMC,ScienceQA]", 13), ("trace", 4)], ids=["three", "eight"])
def test_rounds_of_small_steps_are_a_float32_history_rounded_once(hft, settings, shared, tmp_path, tasks, num_steps):
    """Steps at 5e-7, each of which moves next to no weight of a bfloat16 file."""
    given = SHORT | {"model.dtype": "null"}
    start = shutil.copytree(shared / "models" / "stories15M", tmp_path / "wide")
    weights = {name: values.float() for name, values in load_file(start / "model.safetensors").items()}
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    given |= {
        "data.root": shared / "data" / "trace", "continual.tasks": tasks, "data.max_length": 128,
        "data.max_examples": 8 * num_steps, "train.max_steps": num_steps, "train.learning_rate": 5e-7, "eval.max_examples": 2,
    }  # fmt: skip
    for name, path in (("narrow", shared / "models" / "stories15M"), ("wide", start)):
        hft("continual", "--output", tmp_path / f"run-{name}", *settings(given | {"model.path": path}))
    narrow, wide = (Run(tmp_path / f"run-{name}").rounds for name in ("narrow", "wide"))
    assert not any(round_.masters_path.exists() for round_ in wide)  # nothing is rounded: there is nothing to carry
    for one, other in zip(narrow, wide, strict=True):
        stored, history = (load_file(round_.checkpoint / "model.safetensors") for round_ in (one, other))
        for name, values in stored.items():
            assert torch.equal(values, history[name].to(torch.bfloat16)), (one.name, name)
        assert one.read_result().masters.dropped_fraction > 0.9
        assert other.read_result().masters.dropped_norm == 0
    masters = load_file(narrow[-1].masters_path)
    moved = max((masters[name] - weights[name]).abs().max().item() for name in masters)
    assert moved > len(narrow) * num_steps * 5e-7 / 4  # the sum of all rounds' steps, not of one's


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@mixed_or_not
def test_two_ranks_begin_from_the_masters_and_leave_theirs(hft, settings, trained, change, tmp_path, stage, mixed):
    if mixed and stage == 0:
        pytest.skip("refused: DeepSpeed would keep no float32 masters")
    tiny = {"train.learning_rate": 1e-6, "train.max_steps": 2, "train.bf16": mixed, "train.per_device_train_batch_size": 4}
    split = {"launch.num_processes": 2, "launch.zero_stage": stage, "model.path": trained}
    hft("sft", "--output", tmp_path / "run", *settings(change | tiny | split))
    before, after = get_round(trained), get_round(tmp_path / "run")
    masters, began = load_file(after.masters_path), load_file(before.masters_path)
    assert set(masters) == {*before.read_plan().trained, *after.read_plan().trained}
    for name in began:  # two steps of 1e-6 at most, which the file's rounding would hide
        assert (masters[name] - began[name]).abs().max() < 2.1e-6 + began[name].abs().max() * 2**-23
    assert after.read_result().verification.num_masters == len(masters)
    scores = after.read_scores()
    for name, score in scores.after.items():
        assert score.nll == pytest.approx(scores.before[name].nll, rel=5e-3)  # some entries are rounded the other way now
    if not mixed:
        assert_scored(after.checkpoint, mixed, scores.after, after)
    hft("verify", tmp_path / "run")


@pytest.mark.slow
def test_a_round_that_is_stopped_while_its_file_is_scored_ends_with_the_same_masters(
    hft, settings, start, trained, change, tmp_path
):
    given = change | {"train.bf16": False, "model.path": trained}
    hft("sft", "--output", tmp_path / "whole", *settings(given))
    stopped = start(tmp_path / "stopped", given)
    stopped.wait_for("saving")
    stopped.front.send_signal(signal.SIGTERM)
    stopped.end(75)
    hft("sft", "--output", tmp_path / "stopped", *settings(given))
    whole, resumed = get_round(tmp_path / "whole"), get_round(tmp_path / "stopped")
    assert resumed.read_result().resumed_from == SHORT["train.max_steps"]
    assert whole.masters_path.read_bytes() == resumed.masters_path.read_bytes()
    assert whole.read_scores() == resumed.read_scores()


@pytest.mark.slow
def test_a_delta_and_a_merged_adapter_carry_masters_too(hft, settings, trained, change, tmp_path):
    given = {key: value for key, value in change.items() if key != "eval.max_examples"} | {
        "train.bf16": False,
        "eval.tasks": "[]",
    }
    hft("sft", "--output", tmp_path / "delta", *settings(given | {"model.path": trained, "checkpoint.format": "delta"}))
    hft("sft", "--output", tmp_path / "full", *settings(given | {"model.path": trained}))
    delta, full = get_round(tmp_path / "delta"), get_round(tmp_path / "full")
    assert delta.masters_path.read_bytes() == full.masters_path.read_bytes()
    hft("sft", "--output", tmp_path / "lora", *settings(given | {"model.path": tmp_path / "delta", "method.lora": "{}"}))
    lora = get_round(tmp_path / "lora")
    report = lora.read_result().masters
    assert (report.start, report.num_tensors) == ("taken", len(load_file(lora.masters_path)))
    below, merged = load_file(delta.masters_path), load_file(lora.masters_path)
    adapter, plan = load_file(lora.adapter / "adapter_model.safetensors"), lora.read_plan()
    assert plan.trained
    for name in set(plan.trained) & set(below):
        place = f"base_model.model.{name.removesuffix('.weight')}"
        product = adapter[f"{place}.lora_B.weight"] @ adapter[f"{place}.lora_A.weight"]
        assert torch.allclose(merged[name], below[name] + 4 * product, atol=1e-7)  # lora_alpha / r
    for name in set(below) - set(plan.trained):
        assert torch.equal(merged[name], below[name])
    hft("verify", tmp_path / "lora")
