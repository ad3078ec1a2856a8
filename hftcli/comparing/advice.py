"""What to try for a model and rows, and what it showed: candidates, successive halving, what to expect of a further seed.

Every candidate is measured within its run. What counts of it is the point that learned most of those that forgot no more than
was allowed, which is the step that a run with that budget keeps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

from hftcli.comparing.points import Trail
from hftcli.comparing.statistics import estimate_mean, find_t_bound

RATES = (1e-5, 5e-5, 2e-4, 1e-3)
QUIET_FACTOR = 2.0  # a smaller space takes larger rates
KEPT = 3  # of so many candidates one goes on, and trains so many times as long
NUM_RUNGS = 3
NAMED_ROWS = (64, 256)  # read of those to keep: at least, as by default, and at most, as of a round's own
LEAST_STEPS = 5  # of a run, which is measured so many times


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        arm: what trains, and what defends the old.
        settings: `key=value` of it.
    """

    arm: str
    settings: tuple[str, ...]
    learning_rate: float

    @property
    def name(self) -> str:
        """For a folder."""
        return f"{self.arm.replace(' + ', '-').replace(' ', '-')}-{self.learning_rate:g}"


@dataclass(frozen=True)
class Finding:
    """What a candidate showed.

    Attributes:
        num_steps: of its run.
        learning, forgetting: at the point that counts, in nats per token; 0 and 0 where none is within the limit.
    """

    candidate: Candidate
    num_steps: int
    learning: float
    forgetting: float


@dataclass(frozen=True)
class Expectation:
    """What a further seed does, 95 of 100 times, if seeds are normally distributed.

    Attributes:
        low, high: None with one seed.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Promise:
    """What a recipe is expected to do on a further seed.

    Attributes:
        is_certain: whether one of its points is expected to lie within the limit.
    """

    learning: Expectation
    forgetting: Expectation
    num_seeds: int
    is_certain: bool


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        arms: of every arm the best candidate.
        left_out: arms that cannot be and candidates whose training failed, and why.
        best: None where nothing was learned within the limit.
        sentence: what may be said of it.
    """

    arms: tuple[Finding, ...]
    left_out: dict[str, str]
    best: Finding | None
    learning: Expectation | None
    forgetting: Expectation | None
    num_seeds: int
    sentence: str
    recipe: Path | None
    page: Path | None


def list_candidates(rows: Path, named: Path | None, num_named: int = 0) -> list[Candidate]:
    """What is tried: the quiet half, all weights, the coin's half, and what defends the old in the loss or among the rows.

    The quiet half, which forgot least where ways were compared, stands first: a search whose time runs out has tried it.

    Args:
        rows: the rows to train on.
        named: rows to keep, for the quiet half to stay off and for others to replay; None where there are none.
        num_named: how many they are.
    """
    alone = f"data.path={json.dumps(str(rows))}"
    full = ("freeze.trainable_fraction=1.0",)
    samples = min(max(num_named, NAMED_ROWS[0]), NAMED_ROWS[1])
    keep = [] if named is None else [f"freeze.keep.path={json.dumps(str(named))}", f"freeze.keep.samples={samples}"]
    quiet = ("freeze=quiet", *keep)
    arms: dict[str, tuple[str, ...]] = {"quiet": (*quiet, alone), "full": (*full, alone), "half": (alone,)}
    arms["full + anchor"] = (*full, alone, "method.anchor.strength=1")
    if named is not None:
        both = f"data.sources={json.dumps([{'path': str(rows)}, {'path': str(named)}])}"
        arms |= {"full + replay": (*full, both), "quiet + replay": (*quiet, both)}
    else:
        arms["full + self-replay"] = (*full, alone, "method.self_replay.fraction=0.25")
    return [
        Candidate(arm, settings, rate * (QUIET_FACTOR if arm.startswith("quiet") else 1.0))
        for arm, settings in arms.items()
        for rate in RATES
    ]


def judge(trail: Trail, limit: float) -> tuple[float, float]:
    """Learning and forgetting at the point that counts; where none is within the limit, the start's, which are 0.

    Args:
        limit: of forgetting, in nats per token.
    """
    return max(((0.0, 0.0), *(point for point in trail if point[1] <= limit)), key=lambda point: (point[0], -point[1]))


def rank(findings: Sequence[Finding]) -> list[Finding]:
    """The best first: what learned most within the limit, and of equals what forgot least."""
    return sorted(findings, key=lambda one: (-one.learning, one.forgetting))


def list_rungs(num_candidates: int, num_steps: int) -> list[tuple[int, int]]:
    """How many candidates train for how many steps, rung by rung; the last trains all steps."""
    return [
        (max(2, num_candidates // KEPT**rung), max(LEAST_STEPS, num_steps // KEPT ** (NUM_RUNGS - 1 - rung)))
        for rung in range(NUM_RUNGS)
    ]


def fit_steps(
    num_candidates: int, num_steps: int, num_seeds: int, seconds: float, per_run: float, per_step: float
) -> int | None:
    """The steps of the longest runs for which the whole search takes no longer than it may; None where no number does.

    Args:
        num_steps: that would be best.
        seconds: that there are.
        per_run, per_step: seconds.
    """
    steps = num_steps
    while steps >= LEAST_STEPS:
        rungs = [*list_rungs(num_candidates, steps), (num_seeds, steps)]
        if sum(count * (per_run + length * per_step) for count, length in rungs) <= seconds:
            return steps
        steps = steps * 9 // 10
    return None


def expect(values: Sequence[float]) -> Expectation:
    """What a further seed does, by those that were seen: Student's t prediction interval."""
    mean = estimate_mean(values)
    if mean.high is None:
        return Expectation(mean.mean, None, None)
    count = len(values)
    reach = find_t_bound(count - 1) * stdev(values) * math.sqrt(1 + 1 / count)
    return Expectation(mean.mean, mean.mean - reach, mean.mean + reach)


def promise_by(ends: Sequence[tuple[float, float]], leasts: Sequence[float], limit: float) -> Promise:
    """What a further seed does within the budget.

    Args:
        ends: what each seed learned and lost, in nats per token; 0 and 0 of one that lost more than the limit at every point.
        leasts: the least that each had lost at one of its points; infinite of such a one.
        limit: of what may be lost. Where a further seed's least may be more, it may learn nothing.
    """
    learning, forgetting = (expect([end[place] for end in ends]) for place in (0, 1))
    least = expect(leasts).high if math.inf not in leasts else math.inf
    is_certain = least is not None and least <= limit
    if learning.low is not None and not is_certain:
        learning = replace(learning, low=min(learning.low, 0.0))
    return Promise(learning, forgetting, len(ends), is_certain)


def describe(promise: Promise, limit: float) -> str:
    """What may be said of the recipe, and no more than the seeds carry."""
    learning, forgetting, num_seeds = promise.learning, promise.forgetting, promise.num_seeds
    if learning.low is None or forgetting.high is None:
        return (
            f"one seed learned {learning.mean:.3f} and lost {forgetting.mean:+.3f} nats per token: no interval, and no promise"
        )
    told = (
        f"{num_seeds} fresh seeds learned {learning.mean:.3f} and lost {forgetting.mean:+.3f} nats per token; of a further one "
        f"expect {learning.low:.3f} to {learning.high:.3f} learned, {forgetting.low:+.3f} to {forgetting.high:+.3f} lost"
    )
    if not promise.is_certain:
        return f"{told}: it may lose more than {limit:g} at every point, and then keeps nothing"
    if learning.low <= 0:
        return f"{told}: that it learns anything is not shown"
    return told if forgetting.high <= limit else f"{told}: that it stays within {limit:g} is not shown"


def summarize(findings: Mapping[int, Sequence[Finding]]) -> list[Finding]:
    """Of every arm its best candidate, as it did where it trained longest; the best arm first.

    Args:
        findings: by rung.
    """
    last: dict[Candidate, Finding] = {}
    for rung in sorted(findings):
        last |= {one.candidate: one for one in findings[rung]}
    best: dict[str, Finding] = {}
    for one in sorted(last.values(), key=lambda one: (-one.num_steps, -one.learning, one.forgetting)):
        best.setdefault(one.candidate.arm, one)
    return sorted(best.values(), key=lambda one: (-one.num_steps, -one.learning, one.forgetting))
