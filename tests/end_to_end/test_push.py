"""A run is shared with a stand-in of the hub: what arrives, what is said of faults, and that nothing is half there."""

import hashlib
import json

import pytest
from end_to_end.hub import GOOD, POOR, start_hub
from huggingface_hub import ModelCard
from written_runs import FACTS, SKILL, complete_round, write_run

from hftcli.errors import InputError
from hftcli.reporting.card import write_card
from hftcli.reporting.page import write_page
from hftcli.reporting.publishing import prepare_upload
from hftcli.runs.files import write_model
from hftcli.runs.history import HISTORY_NAME, extend_history
from hftcli.runs.run import Run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    found, server = start_hub()
    for name, value in (
        ("HF_ENDPOINT", found.url), ("HF_TOKEN", GOOD), ("HF_HUB_OFFLINE", "0"), ("HF_HUB_DISABLE_XET", "1"),
        ("HF_HOME", str(tmp_path / "hf")),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path) -> Run:
    """A run whose weights are a few bytes, which the hub does not look at."""
    found = Run(write_run(tmp_path / "mine", "eval.tasks=[tinyworld/facts, tinyworld/skill]"))
    complete_round(found, 0)
    (round_,) = found.rounds
    (round_.checkpoint / "model.safetensors").write_bytes(b"weights")
    write_model(round_.checkpoint / HISTORY_NAME, extend_history(tmp_path / "author", round_.read_spec(), "0f"))
    write_page(found, found.page_path)
    write_card(found, round_)
    return found


def test_what_arrives(hft, hub, run, tmp_path):
    done = hft("push", run.folder, "--repo", "me/half")
    assert done.stdout == f"{hub.url}/me/half\n"
    files = hub.repositories["me/half"]
    assert set(files) == {".gitattributes", "README.md", "config.json", "hft.json", "model.safetensors", "report.html"}
    oid = hashlib.sha256(b"weights").hexdigest()
    assert files["model.safetensors"].decode() == oid
    assert hub.objects[oid] == b"weights"
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert 'place = "me/half"' in card.content
    text = b"\n".join(files.values()).decode()
    assert str(tmp_path) not in text
    assert GOOD not in text


def test_a_dry_run_asks_nobody(hft, hub, run):
    done = hft("push", run.folder, "--repo", "me/half", "--dry-run")
    assert "model.safetensors" in done.stdout
    assert hub.requests == []


@pytest.mark.slow
def test_a_fault_of_the_hub_is_tried_again(hft, hub, run):
    hub.num_faults = 1
    hft("push", run.folder, "--repo", "me/half")
    assert "model.safetensors" in hub.repositories["me/half"]


@pytest.mark.slow
def test_a_repository_with_files_is_left_alone_unless_it_is_to_be_updated(hft, hub, run):
    hub.repositories["me/half"] = {".gitattributes": b"", "precious.bin": b"1"}
    done = hft("push", run.folder, "--repo", "me/half", code=2)
    assert "me/half is there already, with 1 files" in done.stderr
    assert set(hub.repositories["me/half"]) == {".gitattributes", "precious.bin"}
    hft("push", run.folder, "--repo", "me/half", "--update")
    assert {"README.md", "precious.bin"} <= set(hub.repositories["me/half"])


def test_of_a_model_that_was_there_nothing_is_left_that_would_be_read(hft, hub, run):
    held = (
        ".gitattributes",
        "model-00001-of-00002.safetensors",
        "delta.safetensors",
        "chat_template.jinja",
        "LICENSE",
        "a.png",
    )
    hub.repositories["me/half"] = dict.fromkeys(held, b"1")
    said = hft("push", run.folder, "--repo", "me/half", "--update").stderr
    assert "removed  chat_template.jinja, of the model that was there before" in said
    left = {".gitattributes", "LICENSE", "a.png"}
    assert set(hub.repositories["me/half"]) == set(prepare_upload(run, "me/half").files) | left


def test_nothing_private_goes_where_all_can_see_it(hft, hub, run):
    hub.repositories["me/half"] = {".gitattributes": b""}
    assert "is there already, and is public" in hft("push", run.folder, "--repo", "me/half", "--private", code=2).stderr
    assert set(hub.repositories["me/half"]) == {".gitattributes"}
    hub.private = {"me/half"}
    hft("push", run.folder, "--repo", "me/half", "--private")
    hft("push", run.folder, "--repo", "me/new", "--private")
    assert hub.private == {"me/half", "me/new"}


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"HF_TOKEN": POOR}, 2, "the token may not write to me/half"),
        pytest.param({"HF_TOKEN": "wrong"}, 2, "the hub does not know the token", marks=pytest.mark.slow),
        pytest.param({"HF_TOKEN": ""}, 2, "there is no token of the hub", marks=pytest.mark.slow),
        pytest.param({"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_said(hft, hub, run, monkeypatch, changes, code, expected):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert expected in hft("push", run.folder, "--repo", "me/half", code=code).stderr
    assert hub.repositories == {}


@pytest.mark.slow
def test_a_hub_that_is_not_there(hft, hub, run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = hft("push", run.folder, "--repo", "me/half", code=1)
    assert "asking who you are failed 4 times" in done.stderr


def test_a_secret_stays_at_home(hft, hub, run):
    config = run.rounds[0].checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "note": "hf_abcdefghijklmnopqrstuv"}))
    done = hft("push", run.folder, "--repo", "me/half", code=2)
    assert "config.json holds what looks like a secret" in done.stderr
    assert hub.requests == []


def test_the_card_says_what_was_forgotten(run):
    card = ModelCard.load(run.rounds[0].checkpoint / "README.md")
    assert card.data.tags == ["half-fine-tuning", "hft", "sft"]
    assert f"- **Forgot**: {FACTS} -30.0 points (95 % interval -" in card.content
    assert f"| {SKILL} | yes | 0.0 | 90.0 | +90.0 points |" in card.content


def test_what_the_round_did_not_write_stays(run):
    """The card came later, and may be edited."""
    (round_,) = run.rounds
    weights = round_.checkpoint / "model.safetensors"
    seal = {"num_bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    round_.checksums_path.write_text(json.dumps({"files": {"model.safetensors": seal}}))
    (round_.checkpoint / "README.md").write_text("my own words")
    files = prepare_upload(run, "me/half").files
    assert (files["model.safetensors"], files["README.md"]) == (weights, round_.checkpoint / "README.md")
    weights.write_bytes(b"weightz")
    with pytest.raises(InputError, match="not what its round wrote.*: model.safetensors has other bytes than were written"):
        prepare_upload(run, "me/half")


SNAPSHOT = "/c/hub/models--me--first/snapshots/0f3a"


@pytest.mark.parametrize(
    ("base", "is_delta", "num_rounds", "refused"),
    [
        ("/home/me/llama", False, 1, None),  # what anybody can have
        ("/runs/first/rounds/00-sft/checkpoint", True, 2, "a delta itself"),
        (SNAPSHOT, True, 2, "a delta itself"),
        ("/runs/first/rounds/00-sft/checkpoint", False, 2, "a model of hft's that is on no hub"),
        (SNAPSHOT, False, 2, None),
    ],
)
def test_a_delta_that_nobody_else_could_lay_over_its_base_stays(run, base, is_delta, num_rounds, refused):
    checkpoint = run.rounds[0].checkpoint
    files = {"config.json": "0f"} | ({"delta.json": "0f"} if is_delta else {})
    delta = {"base": {"path": base, "files": files}, "fingerprint": "0f", "dtype": None, "tensors": []}
    (checkpoint / "delta.json").write_text(json.dumps(delta))
    history = json.loads((checkpoint / HISTORY_NAME).read_text())
    history["rounds"] = [{**history["rounds"][0], "index": index} for index in range(num_rounds)]
    (checkpoint / HISTORY_NAME).write_text(json.dumps(history))
    if refused is None:
        assert "delta.json" in prepare_upload(run, "me/half").files
        return
    with pytest.raises(InputError) as caught:
        prepare_upload(run, "me/half")
    assert caught.value.message.endswith(f"its base {base} is {refused}: nobody else could make the model out of it")
    assert f"hft merge --delta {checkpoint} --output" in caught.value.fix
