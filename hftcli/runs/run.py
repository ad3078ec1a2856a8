"""A run on disk: every path and file name of it, and what the files hold, in one place.

    runs/<name>/            Run
      recipe.yaml             the recipe, resolved
      manifest.json           Manifest: what a stranger needs to repeat the run
      forgetting.json         ForgettingMatrix: scores after every round of a continual run
      tracked.json            what trackers were told of the run, by how many rows of scores, where `train.report_to` names any
      tensorboard/            the matrix and the metrics, where `train.report_to` names it
      job.sh                  the batch script of `--slurm`
      report.html             the run on one page
      rounds/00-sft/          Round
        round.json              RoundSpec: everything the worker needs, written by the runner
        start.json              HubStart: the commit of a start on the hub
        freeze_plan.json        FreezePlan: which parameters train
        outlook.json            Outlook: what the round is going to do
        progress.json           Progress: where the worker is
        metrics.jsonl           a row per logging step, with the trainer's own keys
        worker.log              all that the processes print
        checkpoint/             a plain Hugging Face folder, or a delta: what changed, and delta.json (DeltaRecord)
          hft.json                History: the rounds behind it, and the seal of its masters
        masters.safetensors     float32 masters of all that ever trained, where the checkpoint rounds them; the latest round's
        adapter/                the low-rank adapters, in PEFT's form, where a method trains them
        method/                 what a method leaves to the rounds that follow
        quiet/                  with `freeze.grain: directions`, `columns` or `entries`
          bases.safetensors       the directions, or the places of the columns or entries, in which its matrices train
          entries.safetensors     with `freeze.part: spiel`, the places of the entries that trained at the end
          moments.safetensors     second moments of earlier inputs; when the round ends, with those of its own rows
        importance.json         UnitScores: by what `freeze.rank` ranked the units, but for `random`
        checksums.json          Checksums: size and sha256 of the checkpoint's files
        tensorboard/            where `train.report_to` names it
        steps/40/               a step checkpoint: what a stopped round goes on from; gone when the round is done
          step.json               StepManifest: written last
        stop                    there while the front asks its ranks to stop
        scores.json             Scores: the round's tasks before and after
        predictions/            a Prediction per question and line: before/trace--FOMC.jsonl, after/trace--FOMC.jsonl
        failure.json            Failure: why the worker stopped, if it did
        result.json             RoundResult: written last; it means done

Files are written under a temporary name and renamed, so that a reader never meets half of one. Each of those above that is a
FileSection says which version of its form it has; those of earlier versions are read.
"""

import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hftcli.errors import InputError, RecipeError
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe.asking import AskingSection
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.recipe.sections import LaunchSection
from hftcli.recipe.source import RecipeFile
from hftcli.recipe.trainer_keys import TELLING_KEYS
from hftcli.runs.files import keep_model, read_model, write_model, write_text
from hftcli.runs.records import Checksums, Manifest, Outlook, RoundResult
from hftcli.runs.scores import Moment, Prediction, Scores
from hftcli.runs.seals import find_damage, flush_files
from hftcli.runs.spec import HubStart, RoundSpec

# How the names begin that a run's folder may hold while it is claimed, those of files being written among them.
CLAIM_NAMES = (".lock", ".holder", "..holder.", ".recipe.yaml.", ".manifest.json.")


class Inside:
    """A path by its name in the folder of a run or a round."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, owner: "Run | Round", kind: type) -> Path:
        return owner.folder / self.name


@dataclass(frozen=True)
class Round:
    """One round's folder."""

    folder: Path

    spec_path = Inside("round.json")
    start_path = Inside("start.json")
    plan_path = Inside("freeze_plan.json")
    outlook_path = Inside("outlook.json")
    progress_path = Inside("progress.json")
    metrics_path = Inside("metrics.jsonl")
    log_path = Inside("worker.log")
    checkpoint = Inside("checkpoint")
    masters_path = Inside("masters.safetensors")
    adapter = Inside("adapter")
    fisher_path = Inside("method/ewc.safetensors")
    bases_path = Inside("quiet/bases.safetensors")
    moments_path = Inside("quiet/moments.safetensors")
    entries_path = Inside("quiet/entries.safetensors")
    importance_path = Inside("importance.json")
    checksums_path = Inside("checksums.json")
    steps = Inside("steps")
    stop_path = Inside("stop")
    lock_path = Inside(".ranks.lock")  # held by every rank while it lives
    scores_path = Inside("scores.json")
    predictions = Inside("predictions")
    failure_path = Inside("failure.json")
    result_path = Inside("result.json")

    @property
    def name(self) -> str:
        """The folder's name: its place among the rounds, and what it trains."""
        return self.folder.name

    @property
    def run_folder(self) -> Path:
        """The folder of the run that it is a round of."""
        return self.folder.absolute().parent.parent

    @property
    def place(self) -> tuple[int, str]:
        """What rounds are ordered by: the number that the name begins with, of two digits or more."""
        number = self.name.partition("-")[0]
        return int(number) if number.isdigit() else 0, self.name

    @property
    def is_done(self) -> bool:
        """Whether the worker came to its end: its result is written last."""
        return self.result_path.exists()

    @property
    def saved_steps(self) -> list[int]:
        """Steps with a checkpoint, the last one first."""
        if not self.steps.is_dir():
            return []
        return sorted((int(path.name) for path in self.steps.iterdir() if path.name.isdigit()), reverse=True)

    def describe_kept(self) -> str:
        """What a stop of this round leaves, for a message."""
        has_finished = any(path.parent != self.folder for path in self.folder.parent.glob(f"*/{self.result_path.name}"))
        rest = "; finished rounds are untouched" if has_finished else ""
        if steps := self.saved_steps:
            return f"{self.name} goes on from its checkpoint at step {steps[0]}{rest}"
        if not (self.metrics_path.exists() and self.metrics_path.stat().st_size):
            return f"{self.name} had not begun to train{rest}"
        return f"{self.name} has no step checkpoint yet and starts again{rest}"

    def describe_loss(self) -> str:
        """What a second signal would cost, for a message."""
        if steps := self.saved_steps:
            return f"the steps since {steps[0]}"
        return "the steps of this round"

    def read_spec(self) -> RoundSpec:
        """What the worker was asked for."""
        return read_model(self.spec_path, RoundSpec)

    def find_start(self) -> str:
        """Where the round began: a folder, or a hub id at the commit that was found when the round was first started.

        An earlier round of the run is taken where that is now, if the run was moved or copied.
        """
        spec = self.read_spec()
        if self.start_path.exists():
            return f"{spec.model.path.partition('@')[0]}@{read_model(self.start_path, HubStart).commit}"
        before = Round(Path(spec.earlier[-1].folder)) if spec.earlier else None
        if before is None or before.checkpoint != Path(spec.model.path):
            return spec.model.path
        beside = Round(self.folder.parent / before.name).checkpoint
        return str(beside) if beside.is_dir() else spec.model.path

    def read_plan(self) -> FreezePlan:
        """What trains, and what is frozen."""
        return read_model(self.plan_path, FreezePlan)

    def read_outlook(self) -> Outlook | None:
        """What the round is going to do; None while that is not known."""
        return read_model(self.outlook_path, Outlook) if self.outlook_path.exists() else None

    def read_result(self) -> RoundResult:
        """Of a round that is done."""
        return read_model(self.result_path, RoundResult)

    def read_scores(self) -> Scores:
        """Of a round that is done."""
        return read_model(self.scores_path, Scores)

    def predictions_path(self, moment: Moment, task: str) -> Path:
        """The file of a task's answers before or after the round."""
        return self.predictions / moment / f"{task.replace('/', '--')}.jsonl"

    def write_predictions(self, moment: Moment, task: str, predictions: Sequence[Prediction]) -> None:
        """Write a task's answers, one on each line."""
        path = self.predictions_path(moment, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(prediction.model_dump_json() + "\n" for prediction in predictions))

    def read_predictions(self, moment: Moment, task: str) -> list[Prediction]:
        """Raises: FileNotFoundError: the task was not scored at that moment."""
        lines = self.predictions_path(moment, task).read_text(encoding="utf-8").split("\n")  # answers have U+2028 and its like
        return [Prediction.model_validate_json(line) for line in lines if line]

    def flush(self) -> None:
        """Have all that the round leaves on the disk, and not only in the machine's memory; its step checkpoints are there."""
        parts = [self.folder / name for name in ("checkpoint", "adapter", "method", "quiet", "predictions")]
        parts += [self.plan_path, self.metrics_path, self.importance_path, self.checksums_path, self.scores_path]
        paths = [path for part in parts if part.exists() for path in (part, *part.rglob("*"))]
        flush_files(self.folder, [str(path.relative_to(self.folder)) for path in paths])

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows that were logged, in order; one that was being written when the round was killed has no end, and is none."""
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    folder: Path

    recipe_path = Inside("recipe.yaml")
    manifest_path = Inside("manifest.json")
    matrix_path = Inside("forgetting.json")
    page_path = Inside("report.html")
    figures = Inside("figures")
    script_path = Inside("job.sh")
    tracked_path = Inside("tracked.json")
    holder_path = Inside(".holder")

    @cached_property
    def lock(self) -> FileLock:
        """Held from `claim` for as long as this object lives, or the process."""
        return FileLock(self.folder / ".lock")

    @property
    def rounds(self) -> list[Round]:
        """The rounds that were started, in order."""
        return sorted((Round(path.parent) for path in self.folder.glob("rounds/*/round.json")), key=attrgetter("place"))

    @property
    def last_finished(self) -> Round | None:
        """The latest round that is done; None before the first is."""
        return next((round_ for round_ in reversed(self.rounds) if round_.is_done), None)

    @property
    def unverified(self) -> list[Round]:
        """The finished rounds whose checkpoint was not what it had to be when they ended."""
        return [round_ for round_ in self.rounds if round_.is_done and not round_.read_result().verification.passed]

    def settle_asking(self, given: AskingSection) -> AskingSection:
        """How the run's questions are asked: as in its first round once that is begun, so that its scores can be compared."""
        first = next(iter(self.rounds), None)
        is_begun = first is not None and (first.metrics_path.exists() or first.is_done)
        return first.read_spec().scoring.asking if first is not None and is_begun else given.asking

    def read_manifest(self) -> Manifest:
        """What a stranger needs to repeat the run."""
        return read_model(self.manifest_path, Manifest)

    def round(self, name: str) -> Round:
        """The round of that name, be it there or not."""
        return Round(self.folder / "rounds" / name)

    def claim(self, recipe: Recipe, launch: LaunchSection, manifest: Manifest) -> None:
        """Make the folder this recipe's run, or find that it already is, and hold it.

        A run of another recipe that has trained anything is never written over; of one that has not, nothing stays.

        Args:
            launch: the recipe's, resolved.

        Raises:
            InputError: the folder holds something else, or another `hft` is at work in it.
        """
        text = dump_recipe(recipe)
        # A recipe alone is the user's own, beside whatever else is there.
        is_run = self.recipe_path.exists() and (self.holder_path.exists() or self.manifest_path.exists())
        others = self.folder.iterdir() if self.folder.exists() and not is_run else ()
        if any(not path.name.startswith(CLAIM_NAMES) for path in others):
            raise InputError(f"{self.folder} is not empty and holds no run", "give another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        is_trained = any(round_.metrics_path.exists() or round_.is_done for round_ in self.rounds)
        held = self.recipe_path.read_text(encoding="utf-8") if self.recipe_path.exists() else ""
        if is_trained and held != text:
            self._check_same(recipe, launch)
        if held != text and not is_trained:
            shutil.rmtree(self.folder / "rounds", ignore_errors=True)  # prepared for another recipe
            self.script_path.unlink(missing_ok=True)
        if held != text:
            write_text(self.recipe_path, text)
        if not self.manifest_path.exists() or (held != text and not is_trained):
            write_model(self.manifest_path, manifest)

    def _check_same(self, recipe: Recipe, launch: LaunchSection) -> None:
        """Compare what the recipe on disk means with what this one means: a key that is left out has its default.

        Raises:
            InputError: it would give another result; of `launch`, that is only how it splits the work.
        """
        note = ""
        try:
            held = load_recipe(self.recipe_path, is_written=True).model_dump(mode="json")
        except RecipeError as error:
            held = RecipeFile(self.recipe_path).values
            note = f"; compared as text, because this hft does not read the recipe that it holds:\n{error.message}"
        keys = find_differences(held, recipe.model_dump(mode="json"))
        # The output is this folder, by whatever name; and a tracker may come and go.
        untold = ("version", "output", *TELLING_KEYS)
        # A run's own recipe without a version is of the first form, in which true left it to the device as null does now.
        is_first_form = RecipeFile(self.recipe_path).values.get("version", 1) == 1
        if is_first_form and (held.get("train") or {}).get("bf16") is not False and recipe.train.bf16 is not False:
            untold += ("train.bf16",)
        differences = [key for key in keys if key not in untold and not key.startswith("launch.")]
        differences += find_differences(self.rounds[0].read_spec().launch.split, launch.split)
        if differences:
            raise InputError(
                f"{self.folder} holds the run of another recipe (differs in {', '.join(differences)}){note}",
                "give another --output, or remove the folder",
            )

    def _hold(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            holder = self.holder_path.read_text(encoding="utf-8") if self.holder_path.exists() else "unknown"
            raise InputError(
                f"{self.folder} is in use by another hft, process {holder}", "wait for it or stop it, or give another --output"
            ) from None
        write_text(self.holder_path, f"{os.getpid()} on {socket.gethostname()}")

    def record(self, round_: Round, result: RoundResult) -> None:
        """Take a finished round into the manifest."""
        manifest = self.read_manifest()
        rounds = {**manifest.rounds, round_.name: result}
        keep_model(self.manifest_path, manifest.model_copy(update={"rounds": rounds}))

    def remove_spent(self, round_: Round, result: RoundResult) -> None:
        """Remove what nothing goes on from any more: a finished round's step checkpoints, and the masters of those before it.

        Its own masters hold theirs, and were complete before its result was.
        """
        shutil.rmtree(round_.steps, ignore_errors=True)
        if result.verification.passed:
            for earlier in takewhile(lambda other: other != round_, self.rounds):
                earlier.masters_path.unlink(missing_ok=True)


def find_checkpoint_damage(checkpoint: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, a line for each; of one that no round of hft wrote, nothing is known."""
    round_ = Round(checkpoint.parent)
    if checkpoint.name != round_.checkpoint.name or not round_.checksums_path.exists():
        return []
    return find_damage(checkpoint, read_model(round_.checksums_path, Checksums).files)


def find_differences(held: Any, given: Any) -> list[str]:
    """Keys whose values differ between two nested mappings, with dots."""

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict) or not value:  # an empty section says something: it is there
            return {prefix: value}
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}".lstrip(".")).items()}

    old, new = flatten(held), flatten(given)
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def find_rounds(path: Path) -> list[Round]:
    """The finished rounds that a path means: a round's folder, or a run's.

    Raises:
        InputError: neither, or none is finished.
    """
    if Round(path).spec_path.exists():
        rounds = [Round(path)]
    elif Run(path).recipe_path.exists():
        rounds = Run(path).rounds
    else:
        raise InputError(f"{path} is neither a run nor a round", "give a folder with a recipe.yaml or a round.json")
    finished = [round_ for round_ in rounds if round_.is_done]
    if not finished:
        raise InputError(f"{path} has no finished round", "run its recipe again: it goes on where it stopped")
    return finished
