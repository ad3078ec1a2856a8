"""Label rows as questions: what a pattern makes of them, bad rows and bad patterns, and held-out rows as multiple choice."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hftcli import PACKAGE
from hftcli.data.prepare import prepare_dataset
from hftcli.data.rows import read_choices
from hftcli.errors import DataError, RecipeError
from hftcli.freezing.rule import FreezeRule
from hftcli.launching.processes import StopRequest
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.sections import DataSection, LaunchSection, ModelSection, TrainSection
from hftcli.runs.files import write_model
from hftcli.runs.run import Round
from hftcli.runs.scores import HELD_OUT
from hftcli.runs.spec import RoundSpec, Scoring
from hftcli.training.round import run_round

MODEL = PACKAGE / "tinyworld" / "model"
PATTERN = {"prompt": "{premise} Question: {hypothesis}?\nAnswer:", "verbalizers": {0: "yes", 1: "no"}}
ROWS = [
    {"idx": 7, "premise": "It rains.", "hypothesis": "is it wet", "label": 0},
    {"idx": 8, "premise": "It is {late}.", "hypothesis": "is it 12", "label": 1},
    {"idx": 9, "premise": "It snows.", "hypothesis": "is it warm", "label": "1"},
]


def write(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def make_data(path: Path, pattern: dict = PATTERN, **values: object) -> DataSection:
    return DataSection.model_validate({"path": str(path), "max_length": 64, "pattern": pattern, **values})


def test_a_row_is_its_question_with_the_word_for_its_label(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = make_data(write(tmp_path, ROWS))
    rows, report = prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache")
    texts = [
        ("It rains. Question: is it wet?\nAnswer:", " yes"),
        ("It is {late}. Question: is it 12?\nAnswer:", " no"),
        ("It snows. Question: is it warm?\nAnswer:", " no"),
    ]
    assert (report.format, report.num_rows, report.unused_columns) == ("pattern", 3, ("idx",))
    for row, (prompt, answer) in zip(rows, texts, strict=True):
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == prompt + answer
        trained = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(trained[:-1]).strip() == answer.strip()
        assert trained[-1] == tokenizer.eos_token_id
    task = read_choices("held", data)
    assert [(row.prompt, row.answer, row.options) for row in task.examples] == [
        (prompt, answer, (" yes", " no")) for prompt, answer in texts
    ]
    assert task.bare_prompt == "Question: ?\nAnswer:"


def test_another_pattern_is_another_entry_of_the_cache(tmp_path):
    tokenizer, path = AutoTokenizer.from_pretrained(MODEL), write(tmp_path, ROWS)
    other = {**PATTERN, "verbalizers": {0: "no", 1: "yes"}}
    made = [prepare_dataset(make_data(path, one), TrainSection(), tokenizer, tmp_path / "cache")[0] for one in (PATTERN, other)]
    assert made[0]["input_ids"] != made[1]["input_ids"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"premise": "a", "hypothesis": "b", "label": 2}, "row 2: column 'label': the label 2 has no word"),
        ({"premise": "a", "hypothesis": "b", "label": None}, "row 2: column 'label': the label None has no word"),
        ({"premise": "a", "label": 1}, "row 2: it has no column 'hypothesis'"),
        ({"premise": "a", "hypothesis": "b"}, "row 2: it has no column 'label'"),
        ({"premise": ["a"], "hypothesis": "b", "label": 1}, "row 2: column 'premise': expected a text or a number"),
        ({"premise": " ", "hypothesis": "b", "label": 1}, "row 2: column 'premise': expected a text or a number"),
        ({"premise": float("nan"), "hypothesis": "b", "label": 1}, "row 2: column 'premise': expected a text or a number"),
        ({"premise": float("inf"), "hypothesis": "b", "label": 1}, "row 2: column 'premise': expected a text or a number"),
    ],
)
def test_bad_rows_are_named(tmp_path, caplog, bad, said):
    path = write(tmp_path, [ROWS[0], bad, ROWS[1]])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for read in (
        lambda data: prepare_dataset(data, TrainSection(), tokenizer, tmp_path / "cache"),
        lambda data: read_choices("held", data),
    ):
        with pytest.raises(DataError) as raised:
            read(make_data(path))
        assert f"{path}: {said}" in raised.value.message
        assert raised.value.exit_code == 2
    kept = make_data(path, bad_rows="drop")
    assert len(prepare_dataset(kept, TrainSection(), tokenizer, tmp_path / "cache")[0]) == 2
    caplog.clear()
    assert len(read_choices("held", kept).examples) == 2
    assert f"{path}: 1 bad rows are left out; the first: {path}: {said}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "Yes?"}, "names no column"),
        ({"prompt": "{premise"}, "expected '}' before end of string"),
        ({"prompt": "{premise.x}"}, "the name of a column and nothing else, as in {premise}"),
        ({"prompt": "{0}"}, "the name of a column and nothing else"),
        ({"prompt": "{premise!r}"}, "the name of a column and nothing else"),
        ({"prompt": "{premise} {label}"}, "has the column 'label' in it, which is the answer"),
        ({"verbalizers": {0: "yes"}}, "two labels or more"),
        ({"verbalizers": {0: "yes", 1: " yes"}}, "two labels have the word 'yes'"),
        ({"verbalizers": {0: "yes", 1: ""}}, "a label has no word"),
        ({"verbaliser": {}}, "unknown key 'verbaliser' under data.pattern (did you mean 'verbalizers'?)"),
    ],
)
def test_a_bad_pattern_is_said_with_the_recipe(tmp_path, changes, said):
    path = tmp_path / "recipe.yaml"
    values = {"model": {"path": "tinyworld"}, "data": {"path": "rows.jsonl", "pattern": PATTERN | changes}}
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, objective="sft")
    assert said in raised.value.message
    assert "data.pattern" in raised.value.message


def test_labels_may_be_numbers_in_a_recipe_and_stay_what_they_are_when_it_is_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {path: tinyworld}\ndata:\n  path: rows.jsonl\n  pattern:\n    prompt: '{a}'\n    label: gold\n"
        "    verbalizers: {0: x, '01': y, true: z}\n"
    )
    recipe = load_recipe(path, objective="sft")
    assert recipe.data.pattern.verbalizers == {"0": "x", "01": "y", "true": "z"}
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path, objective="sft") == recipe


@pytest.mark.parametrize("objective", ["dpo", "continual"])
def test_a_pattern_has_no_effect_elsewhere(objective):
    with pytest.raises(RecipeError, match=f"data.pattern would have no effect under `hft {objective}`"):
        load_recipe(None, ["data.pattern={prompt: 'a {b}', verbalizers: {0: x, 1: y}}"], objective)


@pytest.mark.parametrize(
    "key",
    ["shots=2", "max_examples=5", "chat=true", "max_new_tokens=4", "temperature=0.5", "allow_code=true", "generate=false"],
)
def test_how_tasks_are_asked_has_no_effect_on_the_choices_of_held_out_rows(key):
    """But for whether a right answer must be one that can be given."""
    given = ["model.path=m", "data={path: r, pattern: {prompt: 'a {b}', verbalizers: {0: x, 1: y}}}"]
    held_out = [*given, "eval.held_out.path=h"]
    for base in (given, held_out):
        with pytest.raises(RecipeError, match=f"eval.{key.partition('=')[0]} would have no effect: name what to ask"):
            load_recipe(None, [*base, f"eval.{key}"], "sft")
    assert load_recipe(None, [*held_out, "eval.strict=true"], "sft").eval.strict
    with pytest.raises(RecipeError, match="eval.strict would have no effect"):
        load_recipe(None, [*given, "eval.strict=true"], "sft")
    asked = [*held_out, "eval.tasks=[tinyworld/facts]", f"eval.{key}"]
    if key != "shots=2":
        load_recipe(None, asked, "sft")
        return
    with pytest.raises(RecipeError, match="eval.shots answers questions before those of eval.tasks, and none before"):
        load_recipe(None, asked, "sft")


def read_by_hand(model: torch.nn.Module, tokenizer, prompt: str, word: str) -> tuple[float, int]:
    """Log-likelihood of what follows a prompt, and how many tokens it is."""
    ids, start = tokenizer(prompt + word)["input_ids"], len(tokenizer(prompt)["input_ids"])
    if ids[-1] == tokenizer.eos_token_id:
        ids, start = ids[:-1], start - 1
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, ids[place]].item() for place in range(start, len(ids))), len(ids) - start


def test_held_out_rows_are_scored_as_multiple_choice(tmp_path):
    names = ["Anna", "Bert", "Cleo", "Dora", "Emil", "Fred"]
    rows = [
        {"premise": f"{name} is here.", "hypothesis": f"is {name} here", "label": place % 2} for place, name in enumerate(names)
    ]
    trained, held = write(tmp_path, rows[:4]), write(tmp_path, rows, "held.jsonl")
    round_ = Round(tmp_path / "00")
    round_.folder.mkdir()
    write_model(
        round_.spec_path,
        RoundSpec(
            objective="sft", index=0, model=ModelSection(path=str(MODEL)), data=make_data(trained), held_out=make_data(held),
            freeze=FreezeRule(), launch=LaunchSection(num_processes=1), scoring=Scoring(learned=(HELD_OUT,), num_points=3),
            train=TrainSection(bf16=False, max_steps=3, learning_rate=1e-3, global_batch_size=4, warmup_steps=0),
        ),
    )  # fmt: skip
    run_round(round_, StopRequest(round_))
    scores = round_.read_scores()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for folder, score in ((MODEL, scores.before[HELD_OUT]), (round_.checkpoint, scores.after[HELD_OUT])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        num_right, nats, num_tokens = 0, 0.0, 0
        for row in rows:
            prompt = f"{row['premise']} Question: {row['hypothesis']}?\nAnswer:"
            read = [read_by_hand(model, tokenizer, prompt, word) for word in (" yes", " no")]
            num_right += (read[1][0] > read[0][0]) == bool(row["label"])
            nats, num_tokens = nats - read[row["label"]][0], num_tokens + read[row["label"]][1]
        assert score.score == num_right / len(rows)
        assert score.nll == pytest.approx(nats / num_tokens, rel=1e-4)
    assert scores.after[HELD_OUT].nll < scores.before[HELD_OUT].nll
    assert [point.step for point in scores.points] == [1, 2, 3]
    last = scores.points[-1]
    assert last.scores[HELD_OUT].score == scores.after[HELD_OUT].score
    assert last.learning["score"] == pytest.approx(scores.after[HELD_OUT].score - scores.before[HELD_OUT].score)
