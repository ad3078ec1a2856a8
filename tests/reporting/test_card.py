"""Model cards hold what the hub reads, and name no folder of their author's."""

import pytest
from huggingface_hub import ModelCard
from written_runs import FACTS, SKILL, complete_round, make_score, write_made, write_run

from hftcli.reporting.card import CARD_NAME, find_base, make_card, write_card, write_made_card
from hftcli.reporting.latex import make_tables
from hftcli.reporting.page import make_page
from hftcli.runs.files import read_model, write_model
from hftcli.runs.history import HISTORY_NAME, History, describe_round
from hftcli.runs.made import CheckpointIdentity, MergeManifest
from hftcli.runs.records import Source
from hftcli.runs.run import Run
from hftcli.runs.scores import HELD_OUT
from hftcli.runs.spec import HubStart

USED = {"many.jsonl": 1000, "few.jsonl": 7}


@pytest.fixture
def run(tmp_path) -> Run:
    found = Run(write_run(tmp_path / "mine"))
    complete_round(found, 0)
    write_card(found, found.rounds[0])
    return found


def read_card(folder) -> ModelCard:
    return ModelCard.load(folder / CARD_NAME)


def test_the_card_says_what_was_learned_and_forgotten(run, tmp_path):
    card = read_card(run.rounds[0].checkpoint)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert f"- **Learned**: {SKILL} +90.0 points." in card.content
    assert f"- **Forgot**: {FACTS} -30.0 points" in card.content
    assert "sha256 `0f`" in card.content
    assert "arXiv" in card.content
    assert str(tmp_path) not in card.content


def test_what_stands_in_nats_is_called_so(tmp_path):
    """Beside points, in a table that says which unit its cells are of."""
    rows = tuple({FACTS: points, HELD_OUT: make_score(None, nll)} for points, nll in ((1.0, 2.5), (0.7, 1.25)))
    run = Run(write_run(tmp_path / "run", rows=rows))
    complete_round(run, 0)
    card, table = make_card(run, run.rounds[0]), make_tables([run.folder])
    assert f"| {HELD_OUT} | yes | 2.500 nats | 1.250 nats | 1.250 nats per token likelier |" in card
    assert "Scores are in points of 100, or in nats per token where a cell says so, of" in " ".join(card.split())
    assert "& 2.500 nats & 1.250 nats & 1.250 nats per token likelier &" in table
    assert "scores in points, or in nats per token where a cell says so, before and after training;" in table
    assert f"| {FACTS} | no | 100.0 | 70.0 | -30.0 points |" in card


def test_each_source_of_a_mixture_has_its_own_rows(run):
    (round_,) = run.rounds
    result = round_.read_result()
    sources = tuple(Source(path=f"/data/{name}", fingerprint="0f", num_bytes=1, num_used=used) for name, used in USED.items())
    data = result.data.model_copy(update={"sources": sources, "num_used": 1007})
    write_model(round_.result_path, result.model_copy(update={"data": data}))
    content = make_card(run, round_)
    assert "1,000 rows used" in content
    assert "7 rows used" in content
    assert "1,007 rows used" not in content


def test_of_a_mixture_by_weights_the_rows_that_were_drawn_count(run):
    (round_,) = run.rounds
    result = round_.read_result()
    sources = tuple(
        Source(path=f"/data/{name}", fingerprint="0f", num_bytes=1, num_used=used, num_sequences=7, weight=1)
        for name, used in USED.items()
    )
    data = result.data.model_copy(update={"sources": sources, "num_used": 1007})
    write_model(round_.result_path, result.model_copy(update={"data": data}))
    assert data.mixed == ", 14 of them drawn"
    content = make_card(run, round_)
    assert "7 of 1,000 rows drawn, " in content
    assert "rows used" not in content
    texts, others = sources
    texts = texts.model_copy(update={"format": "text", "num_sequences": 3000})  # pieces of 1,000 rows
    data = data.model_copy(update={"sources": (texts, others)})
    write_model(round_.result_path, result.model_copy(update={"data": data}))
    assert data.mixed == ", 3,007 sequences drawn from them"
    content = make_card(run, round_)
    assert "3,000 sequences drawn from 1,000 rows, " in content
    assert "7 of 7 rows drawn, " in content
    assert "3,000 of 1,000" not in content


def test_what_else_acted_is_said(tmp_path):
    run = Run(write_run(tmp_path / "mean", "freeze.interpolate=0.5"))
    complete_round(run, 0)
    assert "| besides freezing | freeze.interpolate |" in make_card(run, run.rounds[0])
    assert "<dd>freeze.interpolate</dd>" in make_page(run)


def test_each_round_of_a_sequence_has_the_card_of_its_time(tmp_path):
    """The first knows of one round, and a task's name is no dataset of the hub."""
    tasks = ("tinyworld/topic", "tinyworld/reverse")
    rows = tuple(dict.fromkeys(tasks, score) for score in (0.1, 0.5, 0.9))
    run = Run(write_run(tmp_path / "run", rows=rows, tasks=tasks, objective="continual"))
    for index, round_ in enumerate(run.rounds):
        complete_round(run, index)
        result = round_.read_result()
        source = Source(path=tasks[index], fingerprint="0f", num_bytes=None)
        data = result.data.model_copy(update={"format": "task", "sources": (source,)})
        write_model(round_.result_path, result.model_copy(update={"data": data}))
    first, second = (make_card(run, round_) for round_ in run.rounds)
    assert "in each of" not in first
    assert "in each of 2 rounds, drawn anew for each" in " ".join(second.split())
    assert "datasets:" not in second


def test_a_run_that_starts_from_a_run_tells_of_its_rounds(run, tmp_path):
    """What preference optimization froze, fine-tuning before it may have trained."""
    (first,) = run.rounds
    past = describe_round(first.read_spec(), "abcd")
    write_model(first.checkpoint / HISTORY_NAME, History(rounds=(past,)))
    (first.checkpoint / CARD_NAME).write_text("---\nlicense: mit\ndatasets: [owner/rows]\n---\n# A model\n")
    second = Run(write_run(tmp_path / "second", f"model.path={first.checkpoint}", objective="dpo"))
    complete_round(second, 0)
    words = " ".join(make_card(second, second.rounds[0]).split())
    assert "the model of tinyworld that is embedded in hft after supervised fine-tuning and then preference" in words
    assert "as far as the last run goes: the rounds before it drew their own" in words
    assert "| round 1 before this run | supervised fine-tuning, plan `abcd` |" in words
    assert "license: mit" in words
    assert "datasets: - owner/rows" in words
    start = "the model that this run started from, which an earlier round had trained"
    assert f"## What it learned and what it forgot in its last run Against {start}: - **Learned**" in words
    assert f"of the weights in this folder, against {start}; intervals" in words
    assert "before training" not in words
    assert f"1 of 1 round finished; before: {start}</p>" in make_page(second)
    assert f"before: {start};" in make_tables([second.folder])
    write_model(first.checkpoint / HISTORY_NAME, History(rounds=(past, past.model_copy(update={"index": 1}))))
    assert "which 2 earlier rounds had trained" in make_card(second, second.rounds[0])


def test_a_run_that_starts_from_no_run_is_set_against_the_model_before_training(run):
    words = " ".join(make_card(run, run.rounds[0]).split())
    assert "## What it learned and what it forgot - **Learned**" in words
    assert "against the model before training; intervals" in words
    assert "1 of 1 round finished</p>" in make_page(run)
    assert "before:" not in make_tables([run.folder])


@pytest.mark.parametrize(
    ("place", "head", "expected"),
    [
        ("models--owner--name/snapshots/0123abcd", "license: mit", ("owner/name", "owner/name", "0123abcd", "mit")),
        ("plain", "license: mit", ("plain", None, None, "mit")),
        ("plain", None, ("plain", None, None, None)),
        ("own", "license: mit\nbase_model: a/b\ntags: [half-fine-tuning]", ("a/b", "a/b", None, "mit")),
    ],
)
def test_the_base_is_what_its_own_card_says(run, tmp_path, place, head, expected):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if head is not None:
        (folder / CARD_NAME).write_text(f"---\n{head}\n---\n# A model\n")
    spec = run.rounds[0].read_spec()
    write_model(run.rounds[0].spec_path, spec.model_copy(update={"model": spec.model.model_copy(update={"path": str(folder)})}))
    base = find_base(run)
    assert (base.name, base.hub_id, base.revision, base.licence) == expected


def test_a_model_that_was_made_has_the_licence_of_what_it_was_made_of(run, tmp_path):
    made = write_made(tmp_path / "mean", run.folder, {}, kind="interpolation", weight=0.25)
    write_made_card(read_model(made / "merge.json", MergeManifest), made)
    card = read_card(made)
    assert card.data.license == "apache-2.0"
    assert "0.25 of the tuned one" in card.content
    assert "| tuned: mine, 00-sft |" in card.content


def test_a_delta_that_was_laid_out_is_the_model_of_its_run(run, tmp_path):
    (run.rounds[0].checkpoint / "delta.json").write_text("{}")
    identity = CheckpointIdentity(path=str(run.rounds[0].checkpoint), files={})
    manifest = MergeManifest(kind="delta", command=(), created="", hft_version="", inputs={"delta": identity}, files={})
    (tmp_path / "whole").mkdir()
    write_made_card(manifest, tmp_path / "whole")
    card = read_card(tmp_path / "whole")
    assert f"- **Learned**: {SKILL} +90.0 points." in card.content
    assert "from_pretrained" in card.content
    assert "hft merge" not in card.content


def test_a_start_that_was_converted_is_not_called_untouched(run):
    (round_,) = run.rounds
    result = round_.read_result()
    converted = result.verification.model_copy(update={"converted_to": "bfloat16"})
    write_model(round_.result_path, result.model_copy(update={"verification": converted}))
    (round_.checkpoint / CARD_NAME).unlink()
    write_card(run, round_)
    words = " ".join(read_card(round_.checkpoint).content.split())
    assert "what was frozen is bit for bit as it was once converted to bfloat16" in words
    assert "1 of 1 frozen parameters bit-identical to the start once it is converted to bfloat16 (model.dtype)" in words
    assert "bit for bit as it was once converted to bfloat16" in make_page(run)


def test_the_base_is_the_commit_that_was_trained(run):
    """What `main` is on the hub by now may be another one."""
    (round_,) = run.rounds
    spec = round_.read_spec()
    write_model(round_.spec_path, spec.model_copy(update={"model": spec.model.model_copy(update={"path": "owner/name"})}))
    write_model(round_.start_path, HubStart(commit="0123abcd"))
    base = find_base(run)
    assert (base.hub_id, base.revision) == ("owner/name", "0123abcd")
