"""Files name the version of their form: one without it is of the first, and one of a newer hft is refused by name."""

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from hftcli.comparing.forgetting import ForgettingMatrix, read_matrix
from hftcli.comparing.points import ScoredTasks
from hftcli.errors import NewerFile
from hftcli.measuring.evaluation import Evaluation
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.section import FileSection, Version
from hftcli.runs.files import read_model, write_model
from hftcli.runs.history import History
from hftcli.runs.made import DeltaRecord, MergeManifest
from hftcli.runs.records import Checksums, Manifest, Outlook, RoundResult
from hftcli.runs.scores import Scores
from hftcli.runs.spec import HubStart, RoundSpec

VERSION_1 = Path(__file__).parent / "version_1"
ROUND = VERSION_1 / "sft" / "rounds" / "00-sft"
IDENTITY = {"path": "start", "files": {"config.json": "0f"}}

# A file of the first version of each form.
FIRST: dict[type[BaseModel], dict] = {
    RoundSpec: json.loads((ROUND / "round.json").read_text()),
    RoundResult: json.loads((ROUND / "result.json").read_text()),
    Scores: json.loads((ROUND / "scores.json").read_text()),
    Checksums: json.loads((ROUND / "checksums.json").read_text()),
    Manifest: json.loads((VERSION_1 / "continual" / "manifest.json").read_text()),
    ForgettingMatrix: json.loads((VERSION_1 / "continual" / "forgetting.json").read_text()),
    DeltaRecord: {"version": 1, "base": IDENTITY, "fingerprint": "0f", "dtype": "float32", "tensors": ["head"], "rows": []},
    MergeManifest: {
        "kind": "interpolation", "command": [], "created": "", "version": "0.1.0", "inputs": {"base": IDENTITY},
        "weight": 0.5, "plan": None, "files": {},
    },
    History: {"rounds": [{"index": 0, "objective": "sft", "task": None, "fingerprint": "0f", "parent": "m"}]},
    HubStart: {"commit": "0f"},
    Outlook: {
        "data": json.loads((ROUND / "result.json").read_text())["data"], "num_sequences": 6, "num_steps": 2,
        "num_warmup_steps": 1, "is_warmup_dropped": False, "num_trainable": 5, "num_parameters": 9, "fingerprint": "0f",
        "memory_bytes": 99,
    },
    Evaluation: {
        "model": "m", "base": None, "dtype": "float32", "max_length": 8, "max_examples": None, "versions": {}, "tasks": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FIRST)
def test_first_version_is_read_and_what_is_written_names_its_own(tmp_path, kind):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(FIRST[kind]))
    found = read_model(path, kind)
    assert found.version == 1
    write_model(path, found)
    assert read_model(path, kind) == found
    written = json.loads(path.read_text())
    assert next(iter(written)) == "version"
    assert covers(written, {**FIRST[kind], "version": 1}) or kind in (RoundResult, Manifest)


def covers(written: object, first: object) -> bool:
    """Whether all keys of a file are there as they were, in its sections too."""
    if isinstance(written, dict) and isinstance(first, dict):
        return all(name in written and covers(written[name], value) for name, value in first.items())
    if isinstance(written, list) and isinstance(first, list):
        return len(written) == len(first) and all(map(covers, written, first))
    return written == first


@pytest.mark.parametrize("kind", FIRST)
def test_newer_version_is_refused_whatever_it_holds(tmp_path, kind):
    path = tmp_path / "file.json"
    version = kind.model_fields["version"].default + 1
    path.write_text(json.dumps({"version": version, "colour": "green"}))
    with pytest.raises(NewerFile) as caught:
        read_model(path, kind)
    assert f"{path} was written by a newer hft: its form has version {version}" in caught.value.message
    assert caught.value.fix == "upgrade hft"


def test_version_of_hft_is_read_where_the_first_form_of_a_merge_has_it(tmp_path):
    (tmp_path / "merge.json").write_text(json.dumps(FIRST[MergeManifest]))
    assert read_model(tmp_path / "merge.json", MergeManifest).hft_version == "0.1.0"


def test_delta_is_written_as_before():
    text = DeltaRecord.model_validate(FIRST[DeltaRecord]).model_dump_json()
    assert text == json.dumps(FIRST[DeltaRecord], separators=(",", ":"))


def test_matrix_file_of_the_users_own_needs_no_version(tmp_path):
    path = tmp_path / "matrix.json"
    path.write_text('{"tasks": ["a"], "scores": [[0.5], [1]]}')
    assert read_matrix(path).scores == ((0.5,), (1.0,))
    path.write_text('{"version": 2, "tasks": ["a"], "scores": [[0.5], [1]]}')
    with pytest.raises(NewerFile, match=r"matrix\.json was written by a newer hft"):
        read_matrix(path)


def test_recipe_on_disk_names_its_version(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe(None)))
    assert (tmp_path / "recipe.yaml").read_text().startswith("version: 2\n")
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe(None)
    (tmp_path / "recipe.yaml").write_text("version: 3\ncolour: green\n")
    with pytest.raises(NewerFile, match=r"recipe\.yaml was written by a newer hft"):
        load_recipe(tmp_path / "recipe.yaml")


def test_part_of_an_evaluation_has_the_version_of_the_whole():
    assert ScoredTasks.model_fields["version"].default == Evaluation.model_fields["version"].default


def test_form_with_a_later_version_reads_the_first_and_writes_its_own(tmp_path):
    class Form(FileSection):
        version: Version = 3
        """Version of the file's form."""

    path = tmp_path / "form.json"
    path.write_text("{}")
    assert read_model(path, Form).version == 1
    write_model(path, Form())
    assert json.loads(path.read_text()) == {"version": 3}
