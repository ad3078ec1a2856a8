"""What a run learned and what it forgot, in a line for each: the head of its page and of its model card."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from hftcli.comparing.intervals import find_share_interval
from hftcli.comparing.items import ItemChange, read_item_changes
from hftcli.comparing.statistics import NATS, POINTS
from hftcli.runs.history import find_earlier
from hftcli.runs.records import RoundResult
from hftcli.runs.run import Round, Run
from hftcli.runs.scores import HELD_OUT, PairScore, Score
from hftcli.tasks.general import SUFFIX

OBJECTIVES = {"sft": "supervised fine-tuning", "dpo": "preference optimization", "continual": "continual learning"}
UNKNOWN = "not measured: no question was asked that it could answer before. Name some under eval.tasks"
UNASKED = "not measured: name the task of the rows under eval.tasks, or rows like them under eval.held_out"


@dataclass(frozen=True)
class Change:
    """What became of one task between the start of a run and its end.

    Attributes:
        task: its name; of a file, the file's alone.
        is_learned: whether the run trained on it, or on rows like it.
        before, after: scores in points; in nats per token, and named so, where only the likelihood was measured.
        change: with its unit.
        interval: of 95 %, over the questions; empty where there is none.
    """

    task: str
    is_learned: bool
    before: str
    after: str
    change: str
    interval: str

    @property
    def sentence(self) -> str:
        """The task with its change and interval."""
        return f"{self.task} {self.change}" + (f" (95 % interval {self.interval})" if self.interval else "")


@dataclass(frozen=True)
class Headline:
    """What a run learned and what it forgot, as text."""

    learned: str
    forgot: str


def describe_start(run: Run) -> str:
    """What a run's changes are measured against, where that is a model that hft had trained before; empty where it is not."""
    count = len(find_earlier(run))
    rounds = "an earlier round" if count == 1 else f"{count} earlier rounds"
    return f"the model that this run started from, which {rounds} had trained" if count else ""


def list_changes(run: Run) -> list[Change]:
    """Every task that was measured before the first and after the last finished round."""
    rounds = [round_ for round_ in run.rounds if round_.is_done]
    before, after = rounds[0].read_scores().before, rounds[-1].read_scores().after
    trained, items = list_trained(rounds), read_item_changes(run)
    return [
        _describe_change(task, task in trained, score, after[task], items.get(task))
        for task, score in before.items()
        if task in after
    ]


def list_trained(rounds: Sequence[Round]) -> set[str]:
    """The names of what rounds train on, as tasks have them."""
    specs = [round_.read_spec() for round_ in rounds]
    rows = {place for spec in specs for place in (spec.data.path, *(source.path for source in spec.data.sources)) if place}
    asked = {name for spec in specs for name in (*spec.scoring.before, *spec.scoring.after)}
    alike = {name for name in asked if str(Path(name).resolve()) in rows}  # a recipe's paths are of the user's folder
    told = {name for spec in specs for name in spec.scoring.learned}  # of an earlier hft only where it measured within rounds
    return {HELD_OUT, *rows, *alike, *told, *(spec.task for spec in specs if spec.task is not None)}


def _describe_change(task: str, is_learned: bool, before: Score, after: Score, items: ItemChange | None) -> Change:
    name = Path(task).name if task.endswith(SUFFIX) else task
    if before.score is None or after.score is None:
        gain = (before.nll or 0.0) - (after.nll or 0.0)
        likelier = "likelier" if gain >= 0 else "less likely"
        first, last = (f"{NATS.show(nll)} nats" if nll is not None else "" for nll in (before.nll, after.nll))
        return Change(name, is_learned, first, last, f"{NATS.show(abs(gain))} nats per token {likelier}", "")
    interval = items.change.interval if items else None
    shown = " to ".join(POINTS.show(value, signed=True) for value in interval) if interval else ""
    change = f"{POINTS.show(after.score - before.score, signed=True)} points"
    return Change(name, is_learned, POINTS.show(before.score), POINTS.show(after.score), change, shown)


def make_headline(run: Run) -> Headline:
    """Of a run with at least one finished round."""
    rounds = [(round_, round_.read_result()) for round_ in run.rounds if round_.is_done]
    if len(run.rounds) > 1:
        return _make_sequence_headline(run, rounds)
    changes = list_changes(run)
    learned = [change.sentence for change in changes if change.is_learned]
    for _, result in rounds:
        learned += _describe_pairs(result)
    forgot = [change.sentence for change in changes if not change.is_learned]
    return Headline("; ".join(learned) or UNASKED, "; ".join(forgot) or UNKNOWN)


def _make_sequence_headline(run: Run, rounds: Sequence[tuple[Round, RoundResult]]) -> Headline:
    """Means over the tasks, and what was never trained."""
    specs = [round_.read_spec() for round_, _ in rounds]
    scores = [round_.read_scores() for round_, _ in rounds]
    own = [(spec.task, found.after[spec.task].score) for spec, found in zip(specs, scores, strict=True) if spec.task]
    gains = [
        score - before for task, score in own if score is not None and (before := scores[0].before[task].score) is not None
    ]
    losses = [
        last - score for task, score in own[:-1] if score is not None and (last := scores[-1].after[task].score) is not None
    ]
    learned = UNASKED
    if gains:
        learned = f"{POINTS.show(fmean(gains), signed=True)} points on each of {len(gains)} tasks, by the end of its own round"
    forgot = []
    if losses:
        forgot.append(f"{POINTS.show(fmean(losses), signed=True)} points on each earlier task since then (BWT)")
    forgot += [change.sentence for change in list_changes(run) if not change.is_learned]
    return Headline(learned, "; ".join(forgot) or UNKNOWN)


def _describe_pairs(result: RoundResult) -> Iterator[str]:
    if result.pairs is not None:
        before, after = (show_accuracy(score) for score in (result.pairs.before, result.pairs.after))
        count = result.pairs.after.num_pairs
        yield f"the preferred answer gets the higher reward in {after} % of {count} held-out pairs; before, {before}"


def show_accuracy(score: PairScore) -> str:
    """Of preference pairs, in points, with Wilson's interval of 95 %; of the reference itself, half, which is no estimate."""
    shown = POINTS.show(score.reward_accuracy)
    if score.reward_accuracy == 0.5 and score.reward_margin == 0:
        return shown
    low, high = find_share_interval(score.reward_accuracy, score.num_pairs)
    return f"{shown} ({POINTS.show(low)} to {POINTS.show(high)})"
