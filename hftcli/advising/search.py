"""A search for the recipe of a model and rows, within a time: `hft advise`.

The rows are divided: by those that are held out, learning is measured. What must not be lost is divided as well: one half is
for the ways of training, to name or to replay, and the other is asked. Candidates that do badly in short runs are not trained
longer (comparing/advice.py); the best is trained on fresh seeds, and what these did is what is promised.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from hftcli import runners
from hftcli.advising.rows import Order, divide_rows
from hftcli.comparing.advice import (
    LEAST_STEPS,
    Advice,
    Candidate,
    Finding,
    Promise,
    describe,
    fit_steps,
    judge,
    list_candidates,
    list_rungs,
    promise_by,
    rank,
    summarize,
)
from hftcli.comparing.comparison import compare_runs
from hftcli.comparing.points import read_point
from hftcli.errors import InputError, OverBudget, TrainingError
from hftcli.recipe.loading import dump_recipe, load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.reporting.versus import write_comparison
from hftcli.runs.files import write_text
from hftcli.runs.run import Round
from hftcli.runs.spec import Progress

NUM_EPOCHS = 3
SEARCH_SEED = 0


class Search:
    """A search in a folder; begun again, it goes on where it stopped, with another such time."""

    def __init__(self, order: Order, on_progress: Callable[[Round, Progress], None], tell: Callable[[str], None]):
        self.order = order
        self.on_progress = on_progress
        self.tell = tell
        self.started = time.monotonic()
        self.left_out: dict[str, str] = {}
        self.findings: dict[int, list[Finding]] = {}
        self.longest = 0.0  # seconds of the longest run

    @property
    def seconds_left(self) -> float:
        """Of the time that the search may take."""
        return self.order.seconds - (time.monotonic() - self.started)

    def run(self) -> Advice:
        """All of it.

        Raises:
            InputError: rows or settings that cannot be searched with, or too little time.
        """
        self.rows = divide_rows(self.order)
        candidates = list_candidates(self.rows.trained, self.rows.named, self.rows.num_named)
        for rung, (num_candidates, num_steps) in enumerate(list_rungs(len(candidates), self._settle_steps(candidates))):
            if rung:
                candidates = [one.candidate for one in rank(self.findings[rung - 1])[:num_candidates]]
            self.findings[rung] = []
            for number, candidate in enumerate(candidates, start=1):
                if self.findings[rung] and self.seconds_left < (self.order.num_seeds + 1) * self.longest:
                    self.tell("the time is nearly over: what has run so far decides")
                    break
                self.tell(f"round {rung + 1} of 3, {number} of {len(candidates)}: {candidate.name}, {num_steps} steps")
                if (found := self._try(candidate, num_steps)) is not None:
                    self.findings[rung].append(found)
            if not any(self.findings.values()):
                raise InputError("no way of training could be tried", "; ".join(set(self.left_out.values())))
        # The first point of a longer run comes later, and may lie beyond the limit where a shorter run's did not.
        ranked = [one for rung in sorted(self.findings, reverse=True) for one in rank(self.findings[rung]) if one.learning > 0]
        if not ranked:
            return self._report(None, None, "nothing within the limit was found")
        return self._confirm(ranked)

    def _settle_steps(self, candidates: Sequence[Candidate]) -> int:
        """The steps of the longest runs, by what a short one takes."""
        kept = self.order.folder / "steps.json"
        if kept.exists():
            return int(json.loads(kept.read_text(encoding="utf-8")))
        batch = self._make_recipe(candidates[0], LEAST_STEPS, SEARCH_SEED).train.global_batch_size
        most = max(-(-NUM_EPOCHS * self.rows.num_trained // batch), LEAST_STEPS)
        _, first = list_rungs(len(candidates), most)[0]
        per_run, per_step = self._measure_pace(candidates, first)
        steps = fit_steps(len(candidates), most, self.order.num_seeds, self.seconds_left, per_run, per_step)
        if steps is None:
            taken = per_run + first * per_step
            raise InputError(
                f"{self.order.seconds:.0f} s are too few: a run of {first} steps takes {taken:.0f} s",
                f"give --time {taken * (2 * len(candidates) + self.order.num_seeds) / 60:.0f}m, or a smaller model",
            )
        write_text(kept, json.dumps(steps))
        return steps

    def _measure_pace(self, candidates: Sequence[Candidate], num_steps: int) -> tuple[float, float]:
        """Seconds that a run takes besides its steps, and seconds of a step; measured once in a search, and kept.

        The second run is timed, as the first makes what is kept for all, and in a new folder: one that an earlier start of the
        search finished, or began, would seem to take next to nothing.
        """
        kept = self.order.folder / "pace.json"
        if kept.exists():
            pace = json.loads(kept.read_text(encoding="utf-8"))
            return float(pace["per_run"]), float(pace["per_step"])
        timed = (self._make_recipe(candidates[1], num_steps, seed) for seed in count(SEARCH_SEED))
        recipes = (
            self._make_recipe(candidates[0], num_steps, SEARCH_SEED),
            next(one for one in timed if not one.folder.exists()),
        )
        for candidate, recipe in zip(candidates, recipes, strict=False):
            self.tell(f"how long a run takes: {candidate.name}, {num_steps} steps")
            begun = time.monotonic()
            run = runners.run_single(recipe, self.on_progress)
        per_step = run.rounds[-1].read_result().seconds["training"] / num_steps
        per_run = max(time.monotonic() - begun - num_steps * per_step, 0.0)
        write_text(kept, json.dumps({"per_run": per_run, "per_step": per_step}))
        return per_run, per_step

    def _try(self, candidate: Candidate, num_steps: int) -> Finding | None:
        """A run of the search; None where the candidate's arm cannot be, or its training failed."""
        if candidate.arm in self.left_out or candidate.name in self.left_out:
            return None
        begun = time.monotonic()
        try:
            run = runners.run_single(self._make_recipe(candidate, num_steps, SEARCH_SEED), self.on_progress)
        except (InputError, TrainingError) as error:
            # An input is wrong for all of an arm, as where a model cannot have it; what fails, as without memory, is one run.
            name = candidate.arm if isinstance(error, InputError) else candidate.name
            self.left_out[name] = error.message
            self.tell(f"left out: {name}: {error.message}")
            return None
        self.longest = max(self.longest, time.monotonic() - begun)
        return Finding(candidate, num_steps, *judge(read_point(run.folder, (), "nll").trail, self.order.limit))

    def _make_recipe(self, candidate: Candidate, num_steps: int, seed: int, budget: bool = False) -> Recipe:
        name = f"{candidate.name}-{num_steps}-{seed}{'-kept' * budget}"
        given = [
            f"model.path={json.dumps(self.order.model)}", *self.rows.settings, *candidate.settings,
            f"train.learning_rate={candidate.learning_rate}", f"train.max_steps={num_steps}", f"train.seed={seed}",
            f"freeze.seed={seed}", f"eval.num_points={LEAST_STEPS}",
            f"output={json.dumps(str(self.order.folder / name))}",
        ]  # fmt: skip
        if budget:
            given += ["stop.by=nll", f"stop.max_forgetting={self.order.limit}"]
        return load_recipe(None, [*given, *self.order.overrides], "sft")

    def _confirm(self, ranked: Sequence[Finding]) -> Advice:
        """Train the best on fresh seeds, and where these show that one may lose too much at every point, the next."""
        tried: list[tuple[Finding, Promise]] = []
        for finding in ranked:
            tried.append((finding, promise := self._train_anew(finding)))
            if promise.is_certain or self.order.num_seeds == 1 or self.seconds_left < self.order.num_seeds * self.longest:
                break
            self.tell(f"{finding.candidate.name}: a seed may lose more than the limit at every point; the next best is tried")
        best, promise = next((one for one in tried if one[1].is_certain), tried[0])
        return self._report(best, promise, describe(promise, self.order.limit))

    def _train_anew(self, best: Finding) -> Promise:
        """Fresh seeds of a candidate, within the budget."""
        ends: list[tuple[float, float]] = []
        leasts: list[float] = []
        for seed in range(1, self.order.num_seeds + 1):
            if ends and self.seconds_left < self.longest:
                self.tell(f"the time is over after {len(ends)} of {self.order.num_seeds} fresh seeds")
                break
            self.tell(f"fresh seed {seed} of {self.order.num_seeds}: {best.candidate.name}, {best.num_steps} steps")
            try:
                run = runners.run_single(self._make_recipe(best.candidate, best.num_steps, seed, budget=True), self.on_progress)
            except OverBudget:  # the recipe would keep nothing: the model stays what it was
                self.tell(f"fresh seed {seed} lost more than the limit at every point: nothing of it is kept")
                ends.append((0.0, 0.0))
                leasts.append(math.inf)
                continue
            point = read_point(run.folder, (), "nll")
            ends.append((point.learning, point.forgetting))
            leasts.append(min(lost for _, lost in point.trail))
        return promise_by(ends, leasts, self.order.limit)

    def _report(self, best: Finding | None, promise: Promise | None, sentence: str) -> Advice:
        arms = tuple(summarize(self.findings))
        recipe = None if best is None else self._write_recipe(best)
        learning, forgetting, num_seeds = (
            (promise.learning, promise.forgetting, promise.num_seeds) if promise else (None, None, 0)
        )
        advice = Advice(arms, self.left_out, best, learning, forgetting, num_seeds, sentence, recipe, self._write_page())
        write_text(self.order.folder / "advice.json", json.dumps(asdict(advice), indent=1, default=str) + "\n")
        return advice

    def _write_recipe(self, best: Finding) -> Path:
        path = self.order.folder / "recipe.yaml"
        recipe = self._make_recipe(best.candidate, best.num_steps, self.order.num_seeds + 1, budget=True)
        head = (
            f"# hft sft {path}\n# Of {self.rows.num_rows} rows, the {self.rows.num_held_out} under eval.held_out are not "
            "trained on: once you are content,\n# data.path may name them all.\n"
        )
        write_text(path, head + dump_recipe(recipe.model_copy(update={"output": str(self.order.folder / "run")})))
        return path

    def _write_page(self) -> Path | None:
        """Learning against forgetting of the runs that trained longest, of at least two on the same rows."""
        alone = f"data.path={json.dumps(str(self.rows.trained))}"
        for findings in reversed(self.findings.values()):
            folders = [
                self._make_recipe(one.candidate, one.num_steps, SEARCH_SEED).folder
                for one in findings
                if alone in one.candidate.settings
            ]
            if len(folders) > 1:
                page = self.order.folder / "advice.html"
                write_comparison(compare_runs(folders, (), "nll"), "", page)
                return page
        return None
