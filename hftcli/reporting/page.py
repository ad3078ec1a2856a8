"""A run on one page: self-contained HTML that opens from disk, in a light and a dark dress, at any width.

The figures are SVG and CSS inside the page, so that they take its colours and its width; page.html.jinja says how it looks.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hftcli.comparing.answers import read_answers
from hftcli.comparing.forgetting import ForgettingMatrix, ForgettingMetrics, Row, compute_metrics, read_matrix
from hftcli.comparing.items import ItemChange, read_item_changes
from hftcli.comparing.statistics import NATS, POINTS
from hftcli.errors import InputError
from hftcli.freezing.roles import FAMILIES, Parameter, Roles, Unit, assign_roles, list_patterns
from hftcli.freezing.selection import FreezePlan
from hftcli.recipe.loading import load_recipe
from hftcli.recipe.recipe import Recipe
from hftcli.reporting.answers import describe_traits, list_shown
from hftcli.reporting.card import takes_turns
from hftcli.reporting.curves import CURVES, draw_curves
from hftcli.reporting.energy import list_energies
from hftcli.reporting.headline import OBJECTIVES, describe_start, make_headline
from hftcli.reporting.measures import describe_adjusted, describe_cuts, describe_transitions, describe_ways
from hftcli.reporting.places import hide_folders, list_texts, show_place
from hftcli.reporting.rounding import list_roundings
from hftcli.reporting.rounds import describe_pairs, find_speed
from hftcli.reporting.share import describe_share, measure_share
from hftcli.reporting.terminal import format_bytes
from hftcli.reporting.trails import draw_trails
from hftcli.runs.files import write_text
from hftcli.runs.records import RoundResult
from hftcli.runs.run import Round, Run
from hftcli.runs.scores import Score
from hftcli.runs.versions import describe_versions
from hftcli.tasks.general import SUFFIX

TEMPLATE = "page.html.jinja"
LAYER_ROLES = ("attention", "mixer", "mlp", "router", "experts", "norm", "small")  # from left to right
NUM_DRAWS = 48  # of a round that are shown
CELL, GAP, MARGIN = 14, 8, 34  # of the plan's picture, in pixels


def write_page(run: Run, path: Path) -> None:
    """Write the page of a run with at least one finished round.

    Raises:
        InputError: no such run, or no round is finished.
    """
    page = make_page(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def make_page(run: Run) -> str:
    """The page as text. See write_page."""
    if not run.recipe_path.exists():
        raise InputError(f"{run.folder} is no run, and only a run has a page", "give a folder that hft made with --output")
    recipe, manifest = load_recipe(run.recipe_path, is_written=True), run.read_manifest()
    rounds = [(round_, round_.read_result()) for round_ in run.rounds if round_.is_done]
    if not rounds:
        raise InputError(f"{run.folder} has no finished round", "run its recipe again: it goes on where it stopped")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    matrix = read_matrix(run.folder) if run.matrix_path.exists() else None
    answers = read_answers(run)
    plans = [round_.read_plan() for round_, _ in rounds]
    sources = [source.path for _, result in rounds for source in result.data.sources]
    paths = list(list_texts([recipe.model_dump(mode="json"), manifest.parent, sources]))
    return environment.get_template(TEMPLATE).render(
        name=run.folder.resolve().name,
        objective=OBJECTIVES[recipe.objective],
        num_rounds=len(run.rounds),
        num_finished=len(rounds),
        facts=list(_list_facts(recipe, rounds, plans)),
        knowledge=list(_describe_knowledge(run, rounds)),
        ways=_list_ways(rounds),
        traits=describe_traits(answers),
        changed=list_shown(answers),
        matrices=list(_describe_matrices(matrix)) if matrix else [],
        metrics=_describe_metrics(matrix) if matrix else [],
        pairs=[(round_.name, describe_pairs(result.pairs)) for round_, result in rounds if result.pairs is not None],
        trails=[trail for round_, result in rounds for trail in draw_trails(round_, result)],
        curves=[plot for key in CURVES if (plot := draw_curves([round_ for round_, _ in rounds], key)) is not None],
        headline=make_headline(run),
        start=describe_start(run),
        steps=list(_list_next_steps(run, rounds)),
        pictures=[_draw_plan(round_, plan) for (round_, _), plan in zip(rounds, plans, strict=True)],
        energies=list_energies((round_.name, result) for round_, result in rounds),
        roundings=list_roundings((round_.name, result) for round_, result in rounds),
        redraws=[_describe_redraws(round_, result) for round_, result in rounds if result.redraws],
        speeds=[_describe_speed(round_, result) for round_, result in rounds],
        manifest=[
            (name, hide_folders(value, paths)) for name, value in _list_manifest(manifest.model_dump(mode="json"), rounds)
        ],
        recipe=hide_folders(run.recipe_path.read_text(encoding="utf-8"), paths),
    )


def _list_next_steps(run: Run, rounds: Sequence[tuple[Round, RoundResult]]) -> Iterator[tuple[str, str]]:
    """Commands that go on from here, and what for."""
    name = hide_folders(show_place(run.folder))
    if len(rounds) < len(run.rounds):
        yield (
            f"hft {load_recipe(run.recipe_path, is_written=True).objective} --recipe {name}/recipe.yaml --output {name}",
            "go on where it stopped",
        )
        return
    if takes_turns(rounds[-1][0].checkpoint):
        yield f"hft chat {name} --beside start", "talk to it, and to what it was before"
    yield f"hft report {name} --lost", "every question that was lost or won, with the answers"
    yield f"hft verify {name}", "prove that the frozen half did not move"
    vary = "--vary freeze.trainable_fraction=0.5,1.0 --vary train.learning_rate=A,B,C"
    yield f"hft compare --recipe {name}/recipe.yaml {vary} --seeds 3", "set half against full, over learning rates and seeds"
    yield f"hft push {name} --repo OWNER/NAME --dry-run", "share it"


def _list_facts(
    recipe: Recipe, rounds: Sequence[tuple[Round, RoundResult]], plans: Sequence[FreezePlan]
) -> Iterator[tuple[str, str]]:
    """The head of the page in a few numbers."""
    found = [
        (measure_share(plan, result), describe_share(plan, result)) for plan, (_, result) in zip(plans, rounds, strict=True)
    ]
    (least, trained), (most, last) = min(found), max(found)
    trained = trained if most - least < 5e-4 else f"{trained} to {last}"
    yield "model", hide_folders(recipe.model.path, [recipe.model.path])
    yield "parameters", f"{plans[0].num_parameters:,}"
    yield "trained in a round", trained
    yield "besides freezing", ", ".join((*recipe.freeze.additions, *recipe.method.names)) or "nothing"
    resumed = [f"{round_.name} from step {result.resumed_from}" for round_, result in rounds if result.resumed_from is not None]
    seconds = _format_seconds(sum(result.seconds["training"] for _, result in rounds))
    yield "training", ", ".join([seconds, *resumed])
    if endings := [f"{round_.name}{result.ending}" for round_, result in rounds if result.ending]:
        yield "weights", ", ".join(endings)
    yield "peak memory", format_bytes(max(result.peak_memory_bytes for _, result in rounds))
    passed = all(result.verification.passed for _, result in rounds)
    is_full = all(not plan.frozen for plan in plans)
    kept = "bit for bit as it was" + (f" once converted to {converted}" if (converted := _find_conversion(rounds)) else "")
    yield "frozen", "nothing" if is_full else kept if passed else "NOT as it was: see hft verify"


def _find_conversion(rounds: Sequence[tuple[Round, RoundResult]]) -> str | None:
    """The data type that the start's weights were converted to; None where they were not."""
    return next((result.verification.converted_to for _, result in rounds if result.verification.converted_to), None)


@dataclass(frozen=True)
class Knowledge:
    """A task before the first and after the last round; what is not known is empty text."""

    task: str
    num_examples: int
    before: str
    after: str
    change: str
    interval: str
    transitions: tuple[str, ...]
    adjusted: tuple[str, ...]
    nll: str
    marks: tuple[float, float] | None  # before and after in per cent of the bar


def _list_ways(rounds: Sequence[tuple[Round, RoundResult]]) -> list[str]:
    """How the tasks were asked, and of which answers were cut, a line each."""
    before, after = rounds[0][0].read_scores().before, rounds[-1][0].read_scores().after
    said = describe_ways(before) + describe_cuts(before, ", before") + describe_cuts(after, ", after")
    return said.split("\n")[1:]


def _describe_knowledge(run: Run, rounds: Sequence[tuple[Round, RoundResult]]) -> Iterator[Knowledge]:
    first, last = rounds[0][0].read_scores(), rounds[-1][0].read_scores()
    changes = read_item_changes(run)
    for task, before in first.before.items():
        if task in last.after:
            yield _describe_task(task, before, last.after[task], changes.get(task))


def _describe_task(task: str, before: Score, after: Score, items: ItemChange | None) -> Knowledge:
    scores = None if before.score is None or after.score is None else (before.score, after.score)
    interval = items.change.interval if items else None
    return Knowledge(
        task=Path(task).name if task.endswith(SUFFIX) else task,  # of a file, the manifest has the whole path
        num_examples=after.num_examples,
        before=POINTS.show(before.score),
        after=POINTS.show(after.score),
        change=POINTS.show(scores[1] - scores[0], signed=True) if scores else "",
        interval=" to ".join(POINTS.show(value, signed=True) for value in interval) if interval else "",
        transitions=describe_transitions(items),
        adjusted=describe_adjusted(items),
        nll=f"{NATS.show(before.nll)} to {NATS.show(after.nll)}",
        marks=(100 * scores[0], 100 * scores[1]) if scores else None,
    )


@dataclass(frozen=True)
class Cell:
    """A score after a round: `own` right after its own task's round, `seen` later, `unseen` before."""

    text: str
    kind: str
    share: float  # of the colour, in per cent


@dataclass(frozen=True)
class MatrixTable:
    """One kind of score: rows are the model after each round, columns the tasks."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def _describe_matrices(matrix: ForgettingMatrix) -> Iterator[MatrixTable]:
    """The matrix as tables: what is trained, then what is not."""
    for name, rows in (("scores", matrix.scores), ("lenient scores", matrix.lenient)):
        if rows is not None:
            cells = [
                tuple(_make_cell(score, "own" if t == i + 1 else "seen" if t > i else "unseen") for i, score in enumerate(row))
                for t, row in enumerate(rows)
            ]
            yield MatrixTable(f"{name}, points", matrix.tasks, _name_rows(matrix, cells))
    if matrix.general:
        cells = [tuple(_make_cell(score, "seen") for score in row) for row in zip(*matrix.general.values(), strict=True)]
        names = tuple(hide_folders(name, [name]) for name in matrix.general)
        yield MatrixTable("tasks that are never trained, points", names, _name_rows(matrix, cells))


def _name_rows(matrix: ForgettingMatrix, cells: Sequence[tuple[Cell, ...]]) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    names = ["base", *(f"after {task}" for task in matrix.row_names[1:])]
    return tuple(zip(names, cells, strict=True))


def _make_cell(score: float | None, kind: str) -> Cell:
    return Cell("", "none", 0.0) if score is None else Cell(POINTS.show(score), kind, 100 * score)


def _describe_metrics(matrix: ForgettingMatrix) -> list[tuple[str, ...]]:
    """Name, strict and lenient value, definition."""
    kinds: tuple[Sequence[Row] | None, ...] = (matrix.scores, matrix.lenient)
    found = [rows and compute_metrics(matrix.tasks, rows) for rows in kinds]
    lines = []
    for name, field in ForgettingMetrics.model_fields.items():
        if name != "per_task":
            signed = name not in ("op", "plasticity")
            values = [POINTS.show(getattr(metrics, name), signed) if metrics else "" for metrics in found]
            lines.append((name, *values, " ".join((field.description or "").split())))
    return lines


@dataclass(frozen=True)
class Picture:
    """What a round trained: a square per unit, layers from top to bottom, roles from left to right.

    Attributes:
        squares: x, y, width, height, whether it trained, and what it is, for a pointer that rests on it.
        labels: x, y and text.
        columns: unit names by role.
        outside: roles outside the layers, and whether they trained.
    """

    name: str
    summary: str
    width: int
    height: int
    squares: tuple[tuple[int, int, int, int, bool, str], ...]
    labels: tuple[tuple[int, int, str, str], ...]
    columns: tuple[tuple[str, str], ...]
    outside: tuple[tuple[str, bool], ...]


def _draw_plan(round_: Round, plan: FreezePlan) -> Picture:
    """Without squares where the round's checkpoint is gone, which says what family the model is of."""
    config = round_.checkpoint / "config.json"
    model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"] if config.exists() else None
    names = (*plan.trained, *plan.frozen)
    roles = plan.rule.roles
    units = assign_roles(model_type, [Parameter(name, ()) for name in names], roles) if model_type else ()
    trained = set(plan.trained)

    def trains(unit: Unit) -> bool:
        return any(parameter.name in trained for parameter in unit.parameters)

    layers = sorted({unit.layer for unit in units if unit.layer is not None})
    rows: dict[int | None, int] = {layer: row for row, layer in enumerate(layers)}
    family: Roles = {} if model_type is None else FAMILIES[model_type] if roles is None else roles
    inside = sorted((unit for unit in units if unit.layer is not None), key=lambda unit: _find_place(family, unit))
    by_role = {
        role: list(dict.fromkeys(_shorten_unit(unit) for unit in members))
        for role, members in groupby(inside, key=lambda unit: unit.role)
    }
    height = CELL if len(layers) <= 16 else CELL // 2
    places, labels, x = {}, [], MARGIN
    for role, columns in by_role.items():
        labels.append((x, 12, role if len(columns) * CELL > 6 * len(role) else role[:4], "start"))
        for column in columns:
            places[role, column] = x
            x += CELL
        x += GAP
    squares = tuple(
        (
            places[unit.role, _shorten_unit(unit)], 18 + rows[unit.layer] * height, CELL - 2, height - 2, trains(unit),
            f"{unit.name}: {'trained' if trains(unit) else 'frozen'}",
        )
        for unit in inside
    )  # fmt: skip
    every = max(len(layers) // 8, 1)
    labels += [
        (MARGIN - 6, 18 + row * height + height - 3, str(layer), "end") for row, layer in enumerate(layers) if row % every == 0
    ]
    return Picture(
        name=round_.name,
        summary=f"{plan.trainable_fraction:.1%} of the weights, {plan.num_trainable_units} of {plan.num_units} units in layers",
        width=x,
        height=20 + len(layers) * height,
        squares=squares,
        labels=tuple(labels),
        columns=tuple((role, ", ".join(columns)) for role, columns in by_role.items()),
        outside=tuple((unit.role, trains(unit)) for unit in units if unit.layer is None),
    )


def _find_place(family: Roles, unit: Unit) -> tuple[int, int]:
    """Of a unit's column: by role, and then as the family's entry lists its units."""
    listed = re.findall(r"\w+", " ".join(list_patterns(family, unit.role)))
    short = _shorten_unit(unit)
    return LAYER_ROLES.index(unit.role), next(
        (place for place, word in enumerate(listed) if short.startswith(word)), len(listed)
    )


def _shorten_unit(unit: Unit) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return unit.name.rpartition(f".{unit.layer}.")[2].rpartition(".")[2]


def _describe_redraws(round_: Round, result: RoundResult) -> tuple[str, list[tuple[str, str, str]], int]:
    """The round, its first draws, and how many more there are."""
    rows = [
        (f"{draw.first_step} to {draw.last_step}", draw.trained, f"{draw.num_trainable:,}")
        for draw in result.redraws[:NUM_DRAWS]
    ]
    return round_.name, rows, len(result.redraws) - len(rows)


def _describe_speed(round_: Round, result: RoundResult) -> tuple[str, ...]:
    speed, training = find_speed(result), _format_seconds(result.seconds["training"])
    return (
        round_.name,
        f"{result.num_steps:,}",
        f"{result.num_tokens:,}",
        f"{speed:,.0f}" if speed is not None else "",
        training if result.resumed_from is None else f"{training} from step {result.resumed_from}",
        _format_seconds(result.seconds["scoring"]),
        _format_seconds(math.fsum(result.seconds.values())),
        format_bytes(result.peak_memory_bytes),
        format_bytes(result.gradient_bytes) if result.gradient_bytes else "",
        format_bytes(result.optimizer_bytes),
        result.precision,
    )


def _format_seconds(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.1f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _list_manifest(manifest: Mapping[str, Any], rounds: Sequence[tuple[Round, RoundResult]]) -> Iterator[tuple[str, str]]:
    yield "command", " ".join(manifest["command"])
    yield "created", manifest["created"]
    yield "started from", manifest["parent"] or "a model that no round of hft made"
    yield "Python", manifest["python"]
    yield "platform", manifest["platform"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    for round_, result in rounds:
        if different := describe_versions(result.versions, manifest["versions"]):
            yield f"versions of {round_.name}", different
    hardware = rounds[-1][1].hardware
    cores = f"{hardware.num_cores} cores, {hardware.num_threads} threads a process"
    yield "hardware", f"{hardware.num_processes} x {hardware.device}, {cores}, {format_bytes(hardware.memory_bytes)}"
    for round_, result in rounds:
        data = result.data
        sources = "; ".join(f"{source.path} ({source.fingerprint[:12]})" for source in data.sources)
        rows = f"{data.num_used:,} of {data.num_rows:,} rows{data.mixed}"
        yield f"data of {round_.name}", f"{rows}, {data.num_tokens:,} tokens: {sources}"
        yield f"plan of {round_.name}", result.fingerprint
