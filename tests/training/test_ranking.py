"""Units ranked by what they matter: scores as numpy has them, plans that follow them, kept and resumed, and by which rows."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.quiet_rounds import go_back, make_pairs_spec, make_spec, make_start, read_batch, read_inputs, read_model, run

from hftcli.errors import DataError
from hftcli.launching.processes import StopRequest
from hftcli.measuring.drift import draw_texts
from hftcli.models.description import load_tokenizer
from hftcli.recipe.methods import MethodSection
from hftcli.recipe.sections import CheckpointSection
from hftcli.runs.run import Round
from hftcli.runs.spec import EarlierRound
from hftcli.training.ranking import make_key, take_scores
from hftcli.training.reading import read_assignment, tokenize_rows
from hftcli.training.round import run_round

MATRICES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
UNITS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in MATRICES]
ONE_STEP = {"max_steps": 1, "global_batch_size": 16, "per_device_train_batch_size": 16}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("ranking") / "start")


@pytest.fixture(scope="module")
def weights(start: Path) -> dict[str, np.ndarray]:
    return {name: values.double().numpy() for name, values in load_file(start / "model.safetensors").items()}


def read_scores(round_: Round) -> dict[str, float]:
    content = round_.importance_path.read_bytes()
    plan = round_.read_plan()
    assert plan.importance == hashlib.sha256(content).hexdigest()
    assert plan.is_ranked
    return json.loads(content)["scores"]


def check_plan(round_: Round, scores: dict[str, float], freezes_most: bool = True) -> None:
    """In every layer, what trains of attention and of the mlp comes before what is frozen."""
    trained = set(round_.read_plan().trained)
    for layer in (0, 1):
        for part in ("self_attn", "mlp"):
            names = [name for name in UNITS if name.startswith(f"model.layers.{layer}.{part}")]
            train = [scores[name] for name in names if f"{name}.weight" in trained]
            frozen = [scores[name] for name in names if f"{name}.weight" not in trained]
            assert max(train) < min(frozen) if freezes_most else min(train) > max(frozen)
    assert round_.read_result().verification.passed


def list_units(weights: dict[str, np.ndarray]) -> dict[str, list[str]]:
    return {unit: [name for name in weights if name.startswith(f"{unit}.")] for unit in UNITS}


def test_magnitude(start: Path, weights: dict, tmp_path: Path):
    round_ = run(tmp_path / "00", make_spec(start, {"rank": "magnitude"}, train=ONE_STEP))
    scores = read_scores(round_)
    for unit, names in list_units(weights).items():
        expected = np.abs(np.concatenate([weights[name].ravel() for name in names])).mean()
        assert scores[unit] == pytest.approx(expected, rel=1e-6)
    assert scores["model.layers.0.input_layernorm"] == 1.0  # where training has not been yet
    check_plan(round_, scores)


def test_wanda_of_what_the_model_writes_of_itself_and_of_rows(start: Path, weights: dict, tmp_path: Path):
    model = read_model(start)
    texts = [ids for ids, _ in draw_texts(model, load_tokenizer(start), torch.device("cpu"))]
    inputs = read_inputs(model, {unit: unit for unit in UNITS}, texts)
    rule = {"rank": "wanda", "importance": {"freezes": "least"}}
    own = run(tmp_path / "00", make_spec(start, rule, train=ONE_STEP))
    scores = read_scores(own)
    for unit, read in inputs.items():
        expected = (np.abs(weights[f"{unit}.weight"]) * np.sqrt(np.square(read).mean(0))).mean()
        assert scores[unit] == pytest.approx(expected, rel=1e-5)
    assert scores.keys() == set(UNITS)
    check_plan(own, scores, freezes_most=False)
    rule = {"rank": "wanda", "importance": {"path": "tinyworld/facts", "samples": 4}}
    given = run(tmp_path / "01", make_spec(start, rule, train=ONE_STEP))
    found = read_scores(given)
    assert all(found[unit] != scores[unit] for unit in UNITS)
    check_plan(given, found)


def test_spectrum(start: Path, weights: dict, tmp_path: Path):
    round_ = run(tmp_path / "00", make_spec(start, {"rank": "spectrum"}, train=ONE_STEP))
    scores = read_scores(round_)
    for unit in UNITS:
        values = np.linalg.svd(weights[f"{unit}.weight"], compute_uv=False)
        low, high = np.percentile(values, [25, 75])
        rows, columns = sorted(weights[f"{unit}.weight"].shape)
        edge = (high - low) / 1.349 * (1 + np.sqrt(rows / columns))
        noise = max(values[values <= edge].sum(), np.finfo(float).eps * values[0])
        assert scores[unit] == pytest.approx(values[values > edge].sum() / noise / values[0], rel=1e-6)
    check_plan(round_, scores)


def test_fisher(start: Path, weights: dict, tmp_path: Path):
    """Squared gradients text by text, the labels drawn as the model would go on."""
    round_ = run(tmp_path / "00", make_spec(start, {"rank": "fisher", "seed": 5}, train=ONE_STEP))
    scores, model = read_scores(round_), read_model(start)
    texts = [ids for ids, _ in draw_texts(model, load_tokenizer(start), torch.device("cpu"))]
    generator, sums = torch.Generator().manual_seed(5), dict.fromkeys(UNITS, 0.0)
    for ids in texts:
        model.zero_grad()
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (-log_probs.gather(-1, drawn).sum()).backward()
        for unit, names in list_units(weights).items():
            sums[unit] += sum(np.square(model.get_parameter(name).grad.double().numpy()).sum() for name in names)
    for unit, names in list_units(weights).items():
        size = sum(weights[name].size for name in names)
        assert scores[unit] == pytest.approx(sums[unit] / size / len(texts), rel=2e-3)
    check_plan(round_, scores)


def test_gradient_of_the_new_rows(start: Path, weights: dict, tmp_path: Path):
    round_ = run(tmp_path / "00", make_spec(start, {"rank": "gradient"}, train=ONE_STEP))
    scores, model, batch = read_scores(round_), read_model(start), read_batch(round_)
    model(**batch).loss.backward()
    num_tokens = int((batch["labels"][:, 1:] != -100).sum())
    for unit, names in list_units(weights).items():
        gradient = np.concatenate([model.get_parameter(name).grad.double().numpy().ravel() for name in names])
        assert scores[unit] == pytest.approx(np.abs(gradient).mean() * num_tokens, rel=1e-3)
    check_plan(round_, scores)


def test_scores_of_the_new_rows_are_of_the_task_s_own_whatever_replay_adds(start: Path, tmp_path: Path):
    found = []
    for method in ({}, {"replay": {"fraction": 0.5}}, {"replay": {"fraction": 0.5, "when": "after"}}):
        section = MethodSection.model_validate(method)
        spec = make_spec(start, {"rank": "gradient", "importance": {"samples": 8}}, place=1, method=section)
        earlier = (EarlierRound(task="tinyworld/newcomers", folder=str(tmp_path)),)
        task = read_assignment(spec.model_copy(update={"earlier": earlier}))
        rows = tokenize_rows(task, lambda done, total: None)
        found.append((len(rows.train), make_key(task, rows), take_scores(task, rows)))
    sizes, keys, scores = zip(*found, strict=True)
    assert sizes == (16, 16 + 8, 4 * 8 + 8)
    assert len({*keys}) == 1
    assert scores[0] == scores[1] == scores[2]


def test_gradient_of_pairs_is_that_of_the_preference(start: Path, tmp_path: Path):
    round_ = run(tmp_path / "00", make_pairs_spec(start, {"rank": "gradient"}, "precompute"))
    check_plan(round_, read_scores(round_))


def test_scores_are_kept_and_a_killed_round_ends_in_the_same_bits(start: Path, tmp_path: Path):
    spec = make_spec(
        start, {"rank": "magnitude", "grain": ["matrices", "directions"]}, checkpoint=CheckpointSection(save_steps=1, keep=9)
    )
    done = run(tmp_path / "00", spec)
    assert done.read_plan().directions
    assert done.read_plan().fingerprint == run(tmp_path / "01", spec).read_plan().fingerprint
    resumed = go_back(done, 2, tmp_path / "02")
    run_round(resumed, StopRequest(resumed))
    assert resumed.read_result().resumed_from == 2
    for path in ("checkpoint/model.safetensors", "importance.json", "freeze_plan.json"):
        assert (resumed.folder / path).read_bytes() == (done.folder / path).read_bytes(), path


def test_rows_that_are_missing_are_named(start: Path, tmp_path: Path):
    rule = {"rank": "fisher", "importance": {"path": "missing.jsonl"}}
    with pytest.raises(DataError, match=r"freeze\.importance\.path missing\.jsonl: no such file"):
        run(tmp_path / "00", make_spec(start, rule))
