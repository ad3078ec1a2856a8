"""Context distillation: loss and gradient by hand in float64, the rows before a row, and what it does not go with."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from end_to_end.running import assert_same
from methods.rounds import START, make_spec
from training.quiet_rounds import go_back, make_start, run
from training.quiet_rounds import make_spec as make_round_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli.data.tokens import TOKEN_FEATURES
from hftcli.errors import DataError, ModelError
from hftcli.launching.processes import StopRequest
from hftcli.methods.distill import Distill
from hftcli.recipe.methods import DistillSection, MethodSection
from hftcli.recipe.sections import CheckpointSection, DataSection
from hftcli.training.loss import SFT_OUTPUTS, find_columns, keep_logits, set_loss_kernel, shape_loss
from hftcli.training.round import run_round

BOS = AutoTokenizer.from_pretrained(START).bos_token_id
SHORT = {
    "train.max_steps": 3, "train.logging_steps": 1, "eval.tasks": "[]", "train.learning_rate": 1e-3, "data.max_length": 64,
    "train.global_batch_size": 8, "train.per_device_train_batch_size": 4, "train.bf16": False,
}  # fmt: skip


def draw_rows(num_rows: int, begins: bool) -> Dataset:
    """Rows of 5 to 9 tokens, the last two or three of which are trained; they begin with a text's first token, or not."""
    rows = []
    for number in range(num_rows):
        ids = torch.randint(5, 600, (5 + number % 5,)).tolist()
        ids[0] = BOS if begins else ids[0]
        first = len(ids) - 2 - number % 2
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return Dataset.from_list(rows, features=TOKEN_FEATURES)


def make_method(rows: dict[str, Dataset], replay: bool = False, **section: object) -> Distill:
    spec = make_spec({"distill": section} | ({"replay": {}} if replay else {}), (("old", START),) if replay else ())
    method = Distill(spec, DistillSection(**section))
    method.check_start(START, None)
    method.prepare_rows(rows["new"], rows)
    return method


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    padded = {name: [row[name] + [value] * (longest - len(row[name])) for row in rows] for name, value in fill.items()}
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {name: torch.tensor(values) for name, values in (padded | {"attention_mask": mask}).items()}


@pytest.mark.parametrize("begins", [True, False])
def test_loss_and_gradient_are_those_of_float64(begins):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32).train()
    teacher, exact = (AutoModelForCausalLM.from_pretrained(START, dtype=torch.float64) for _ in range(2))
    rows = draw_rows(12, begins)
    method = make_method({"new": rows}, demonstrations=2, strength=0.7)
    method.prepare_model(model, None, START, mixed=False, sharded=False)
    method.start(SimpleNamespace(model=model))
    with torch.no_grad():  # somewhere else than at the start
        for own, other in zip(model.parameters(), exact.parameters(), strict=True):
            own.add_(0.02 * torch.randn_like(own))
            other.copy_(own)
    batch = [rows[place] for place in (0, 3, 7)]
    losses, known = [], {tuple(row["input_ids"]) for row in rows}
    for row in batch:
        context = method.choose_context(row["input_ids"])
        bare = context[1:] if begins else context
        assert not begins or context[0] == BOS not in bare
        firsts = [ids[1:] if begins else ids for ids in known if ids != tuple(row["input_ids"])]
        assert any(bare == [*one, *two] for one in firsts for two in firsts if one != two)  # two other rows, whole
        own = row["input_ids"][1:] if begins else row["input_ids"]
        expected = teacher(torch.tensor([[*context, *own]])).logits[0].detach().log_softmax(-1)
        found = exact(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != -100:
                p, log_q = expected[place - len(row["labels"]) - 1], found[place - 1]
                losses.append(-log_q[label] + 0.7 * (p.exp() * (p - log_q)).sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    set_loss_kernel(model, "chunked")
    keep_logits(model, SFT_OUTPUTS, [method.penalize_tokens])
    shape_loss(model, [])
    inputs = pad(batch)
    method.read_ahead(model, inputs, find_columns(inputs["labels"]))
    found = model(**inputs, use_cache=False, fused_lm_head=True)
    own_loss = -found.log_probs.sum() / found.label_mask.sum()
    own_loss.backward()
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_replayed_rows_are_preceded_by_their_own_and_texts_of_no_task_by_none():
    torch.manual_seed(0)
    rows = {"new": draw_rows(9, True), "old": draw_rows(9, True)}
    method = make_method(rows, replay=True, demonstrations=1)
    for task, other in (("new", "old"), ("old", "new")):
        own, foreign = ({tuple(ids[1:]) for ids in rows[name]["input_ids"]} for name in (task, other))
        contexts = {tuple(method.choose_context(ids)[1:]) for ids in rows[task]["input_ids"]}
        assert contexts <= own
        assert not contexts & foreign
        assert len(contexts) > 1
    assert method.choose_context([BOS, 7, 8, 9]) is None


def test_a_row_that_stands_twice_is_not_told_its_answer():
    row = {"input_ids": [BOS, 5, 6, 7], "labels": [-100, -100, 6, 7]}
    other = {"input_ids": [BOS, 8, 9, 10], "labels": [-100, -100, 9, 10]}
    method = make_method({"new": Dataset.from_list([row, row, row, other], features=TOKEN_FEATURES)}, demonstrations=1)
    assert method.choose_context(row["input_ids"]) == [BOS, 8, 9, 10]
    with pytest.raises(DataError, match="of the 4 rows of new 2 different ones have"):
        make_method(method.rows, demonstrations=2)


def test_rows_that_do_not_fit_are_said():
    torch.manual_seed(0)
    rows = {"new": draw_rows(10, True)}  # two each of 5 to 9 tokens
    assert len(make_method(rows, demonstrations=3, max_tokens=18).candidates["new"]) == 4
    with pytest.raises(DataError, match="of the 10 rows of new 2 different ones have 5 or fewer"):
        make_method(rows, demonstrations=3, max_tokens=17)
    with pytest.raises(ModelError, match="lays 100000 tokens or more before a row of data.max_length 32, and .* positions"):
        make_method(rows, max_tokens=100000)


@pytest.mark.parametrize(
    ("length", "section", "fix"),
    [
        (128, {"max_tokens": 200}, "set method.distill.max_tokens to 128 or less, or lower data.max_length"),
        (254, {"demonstrations": 4}, "lower data.max_length to 252 or less"),
        (256, {"demonstrations": 4}, "lower data.max_length to 252 or less"),
        (256, {"max_tokens": 300}, "lower data.max_length and method.distill.max_tokens, to 256 or less together"),
    ],
)
def test_what_is_said_to_fit_fits(monkeypatch, length, section, fix):
    monkeypatch.setattr("hftcli.methods.distill.describe_model", lambda path: SimpleNamespace(max_positions=256))
    spec = make_spec({"distill": section})
    method = Distill(spec.model_copy(update={"data": DataSection(max_length=length)}), DistillSection(**section))
    with pytest.raises(ModelError) as caught:
        method.check_start(START, None)
    assert caught.value.fix == fix


def read_losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "rounds" / "00-sft" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_no_strength_is_plain_training_and_a_strength_acts_from_the_first_step(hft, settings, tmp_path):
    given = {"plain": {}, "none": {"method.distill.strength": 0}, "held": {"method.distill.strength": 1}}
    for name, values in given.items():
        hft("sft", "--output", tmp_path / name, *settings(SHORT | values))
    plain, none, held = (read_losses(tmp_path / name) for name in given)
    assert none == pytest.approx(plain, abs=1e-6)
    assert held[0] > plain[0] + 0.01


@pytest.mark.parametrize(
    ("command", "values", "said"),
    [
        ("dpo", {}, "a reference of its own"),
        ("sft", {"train.loss_kernel": "chunked"}, "never has all"),
        ("sft", {"train.label_smoothing_factor": 0.1}, "would have no effect beside train.label_smoothing_factor"),
        ("sft", {"train.packing": True}, "lays several into one sequence"),
        ("sft", {"method.ift.mix": 0.2}, "has the model read tokens of its own"),
        ("sft", {"method.peft.type": "OFT"}, "may begin elsewhere"),
        ("sft", {"launch.num_processes": 2, "launch.zero_stage": 3}, "holds only pieces"),
        ("sft", {"method.distill.demonstrations": 0}, "greater than or equal to 1"),
        ("sft", {"method.distill.on_policy": True}, "SDFTTrainer"),
        ("sft", {"method.distill.max_tokens": 9000}, "positions"),
    ],
)
def test_what_it_does_not_go_with_is_said(hft, settings, command, values, said):
    assert said in hft(command, "--dry-run", *settings({"method.distill.strength": 1} | values), code=2).stderr


@pytest.mark.parametrize("grain", ["matrices", "directions"])
def test_a_round_that_was_killed_goes_on_against_the_same_start(tmp_path, grain):
    start = make_start(tmp_path / "start")
    held = {
        "checkpoint": CheckpointSection(save_steps=1, keep=9),
        "method": MethodSection(distill=DistillSection(demonstrations=2)),
    }
    done = run(tmp_path / "done" / "00", make_round_spec(start, {"grain": grain}, **held))
    resumed = go_back(done, 2, tmp_path / "resumed" / "00")
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    assert_same(done, resumed)


@pytest.mark.slow
def test_two_ranks_equal_one_process(hft, settings, tmp_path):
    for num in (1, 2):
        launch = {"launch.num_processes": num, "launch.zero_stage": 2, "method.distill.demonstrations": 2}
        hft("sft", "--output", tmp_path / str(num), *settings(SHORT | launch))
    assert read_losses(tmp_path / "2") == pytest.approx(read_losses(tmp_path / "1"), abs=1e-5)
