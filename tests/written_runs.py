"""The files that finished runs leave, written by hand: for tests of what reads runs."""

import json
import shutil
from pathlib import Path

from hftcli import PACKAGE
from hftcli.freezing.roles import Parameter, assign_roles
from hftcli.freezing.rule import FreezeRule
from hftcli.freezing.selection import make_plan
from hftcli.recipe.loading import QUICK_START_RECIPES, load_recipe
from hftcli.runners import make_manifest
from hftcli.runs.files import write_model
from hftcli.runs.made import CheckpointIdentity, MergeManifest
from hftcli.runs.records import DataReport, Hardware, RoundResult, Source
from hftcli.runs.run import Round, Run
from hftcli.runs.scores import CurvePoint, PairScores, Prediction, Score, Scores
from hftcli.runs.spec import RoundSpec, Scoring
from hftcli.runs.verification import Verification

FACTS, REWORDED, SKILL = "tinyworld/facts", "tinyworld/facts-reworded", "tinyworld/skill"


def write_run(
    folder: Path,
    *overrides: str,
    rows: tuple[dict[str, float | Score], ...] = ({FACTS: 1.0, SKILL: 0.0}, {FACTS: 0.7, SKILL: 0.9}),
    tasks: tuple[str | None, ...] = (None,),
    objective: str = "sft",
    fingerprint: str = "0f",
    pairs: PairScores | None = None,
    is_finished: bool = True,
    points: tuple[dict[str, float | Score], ...] = (),
    learned: tuple[str, ...] = (),
) -> Path:
    """The files that a finished run leaves, with these scores: of the start, then after each round; and within it."""
    recipe = load_recipe(QUICK_START_RECIPES[objective], [*overrides, f"output={folder}"], objective)
    run = Run(folder)
    run.claim(recipe, recipe.launch, make_manifest(None))
    for index, task in enumerate(tasks):
        round_ = run.round(f"{index:02d}-{objective}")
        round_.folder.mkdir(parents=True)
        spec = RoundSpec(
            objective="dpo" if objective == "dpo" else "sft", index=index, model=recipe.model, data=recipe.data,
            freeze=recipe.freeze, train=recipe.train, launch=recipe.launch, task=task,
            scoring=Scoring(temperature=recipe.eval.temperature or 0.0, asking=recipe.eval.asking, learned=learned),
        )  # fmt: skip
        write_model(round_.spec_path, spec)
        before, after = (
            {name: value if isinstance(value, Score) else make_score(value) for name, value in row.items()}
            for row in (rows[0] if index == 0 else {}, rows[index + 1])
        )
        measured = tuple(
            CurvePoint(
                step=step,
                scores={name: value if isinstance(value, Score) else make_score(value) for name, value in row.items()},
            )
            for step, row in enumerate(points, start=1)
        )
        write_model(round_.scores_path, Scores(before=before, after=after, points=measured))
        if is_finished:
            write_model(round_.result_path, make_result(fingerprint, pairs))
    return folder


def fail_verification(round_: Round) -> None:
    """Have the result of a finished round say that a frozen parameter moved."""
    result = round_.read_result()
    found = result.verification.model_copy(update={"violations": ("model.norm.weight",)})
    write_model(round_.result_path, result.model_copy(update={"verification": found}))


def make_score(score: float | None, nll: float = 1.0) -> Score:
    return Score(score=score, lenient=None, nll=nll, num_examples=100)


def make_result(fingerprint: str, pairs: PairScores | None) -> RoundResult:
    data = DataReport(
        format="messages", num_rows=10, num_used=10, num_dropped=0, num_truncated=0, num_sequences=10, num_tokens=100,
        num_trained_tokens=50, length_percentiles={"p50": 10}, key="0",
        sources=(Source(path="/data/train.jsonl", fingerprint=fingerprint, num_bytes=1),),
    )  # fmt: skip
    return RoundResult(
        fingerprint="0", rank_fingerprints=("0",), precision="float32", num_steps=1, train_loss=1.0, num_tokens=100,
        seconds={"training": 1.0, "scoring": 1.0}, peak_memory_bytes=1, gradient_bytes=0, optimizer_bytes=0, updates={},
        data=data, pairs=pairs, verification=Verification(num_frozen=1, num_trained=1, violations=(), unmoved=()),
        hardware=Hardware(device="cpu", num_processes=1, num_cores=1, num_threads=1, memory_bytes=1),
    )  # fmt: skip


def write_made(folder: Path, run: Path, scores: dict[str, float], **how: object) -> Path:
    """The files that `hft merge` or `hft reset`, and then `hft eval`, leave of a run's model."""
    folder.mkdir()
    tuned = CheckpointIdentity(path=str(run / "rounds" / "00-sft" / "checkpoint"), files={})
    manifest = MergeManifest(command=(), created="", hft_version="", inputs={"base": tuned, "tuned": tuned}, files={}, **how)
    write_model(folder / "merge.json", manifest)
    tasks = {name: {"score": score, "lenient": None, "nll": 1.0, "num_examples": 100} for name, score in scores.items()}
    (folder / "evaluation.json").write_text(json.dumps({"tasks": tasks, "model": "m"}))
    return folder


def make_predictions(*scores: float) -> list[Prediction]:
    return [
        Prediction(index=index, prediction=None, score=score, lenient=None, nll=1.0, num_tokens=1)
        for index, score in enumerate(scores)
    ]


def make_answers(*scores: float, num_choices: int = 4) -> list[Prediction]:
    """Of multiple choice."""
    bare = (-1.0,) * num_choices
    return [prediction.model_copy(update={"bare_log_likelihoods": bare}) for prediction in make_predictions(*scores)]


def complete_round(run: Run, index: int) -> None:
    """A plan, a loss curve, a config and predictions for a round."""
    round_ = run.rounds[index]
    names = [f"model.layers.{layer}.self_attn.{unit}_proj.weight" for layer in range(4) for unit in "qkvo"]
    parameters = [Parameter(name, (8, 8)) for name in ("model.embed_tokens.weight", *names)]
    write_model(round_.plan_path, make_plan(assign_roles("llama", parameters), FreezeRule(), index))
    rows = [f'{{"step": {step}, "loss": {8.0 / step}}}' for step in range(1, 21)]
    round_.metrics_path.write_text("\n".join([*rows, '{"train_runtime": 3.0}']))
    round_.checkpoint.mkdir()
    shutil.copy(PACKAGE / "tinyworld" / "model" / "config.json", round_.checkpoint)
    round_.write_predictions("before", FACTS, make_predictions(1, 1, 1, 1))
    round_.write_predictions("after", FACTS, make_predictions(1, 0, 0, 1))
